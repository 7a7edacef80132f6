"""What llama.cpp makes of the base and of factors put on it: losses, divergences, answers; as it will be served.

The model is mapped and not repacked, so it costs no second copy, and freed after each look.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.model import Model
from gguflora.errors import EngineError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.bindings import captured_log, free_lora, load_lora, put_prefix, set_loras
from gguflora.training.samples import Sample

POSITIONS: Final = 128
"""Tokens evaluated at once."""

_WARN: Final = 3  # of enum ggml_log_level


class ServedModel:
    """A base in llama.cpp with at most one adapter; a context manager that frees it.

    Args:
        path: the GGUF file.
        n_ctx: tokens of a text, at most.
        threads: that compute.
        exact: keep keys and values in 32 bits.

    Raises:
        EngineError: if llama.cpp cannot load it, or has not enough memory.
    """

    def __init__(self, path: Path, n_ctx: int, threads: int, *, exact: bool = False) -> None:
        self.model = Model(path, verbose=False, repack=False)
        self._resources = ExitStack()
        self._resources.callback(self.model.free)
        self._prefix: Prefix | None = None
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = min(n_ctx, POSITIONS)
        parameters.n_threads = parameters.n_threads_batch = threads
        if exact:
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with captured_log(hidden_from=_WARN) as log:  # it warns of every context longer than the base was trained with
            self._context: Any = llama_cpp.llama_init_from_model(self.model.pointer, parameters)
        if not self._context:
            self._resources.close()
            raise EngineError(f"{path}: llama.cpp could not make a context of {n_ctx} tokens: {' '.join(log).strip()}")
        self._resources.callback(lambda: llama_cpp.llama_free(self._context))
        self._lora: Any = None
        self._resources.callback(lambda: free_lora(self._lora))

    def put_lora(self, path: Path | None, scale: float = 1.0) -> None:
        """Put a GGUF LoRA on the base, in place of the one before; None takes it off.

        Raises:
            HotSwapError: if llama.cpp refuses it.
        """
        before, self._lora = self._lora, None if path is None else load_lora(self.model.pointer, path)
        self.set_scale(scale)
        free_lora(before)

    def set_scale(self, scale: float) -> None:
        """Scale the LoRA."""
        set_loras(self._context, [] if self._lora is None else [(self._lora, scale)])

    def put_prefix(self, prefix: Prefix | None) -> None:
        """Let every text begin with a soft prompt."""
        self._prefix = prefix

    def losses(self, sample: Sample) -> NDArray[np.float64]:
        """The loss of each learned token of a sample, in nats."""
        found = []
        for at, logits in self._logits(sample.tokens[:-1], sample.trained[1:]):
            target = sample.tokens[at + 1]
            values = logits.astype(np.float64)
            top = values.max()
            found.append(top + np.log(np.exp(values - top).sum()) - values[target])
        return np.array(found)

    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """Mean loss of the learned tokens of all samples, in nats."""
        return float(np.concatenate([self.losses(sample) for sample in samples]).mean())

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The logits at each position, one after the other; each is valid until the next."""
        for _, logits in self._logits(tokens, [True] * len(tokens)):
            yield logits

    def answer(self, tokens: Sequence[int], most: int) -> str:
        """The most likely answer to a prompt, token by token."""
        *_, (_, logits) = self._logits(tokens, [False] * (len(tokens) - 1) + [True])
        place, said = self._first + len(tokens), bytearray()
        for _ in range(most):
            token = int(logits.argmax())
            if self.model.is_end(token):
                break
            said += self.model.piece(token)
            self._decode([token], place, [True])
            logits, place = self._row(0), place + 1
        return said.decode("utf-8", errors="replace")

    def close(self) -> None:
        """Free everything. Idempotent."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _first(self) -> int:
        """Position of the first token."""
        return 0 if self._prefix is None else self._prefix.n_tokens

    def _logits(self, tokens: Sequence[int], wanted: Sequence[bool]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Evaluate a text from its beginning; positions whose logits are wanted, and these."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        if self._prefix is not None:
            put_prefix(self._context, self._prefix)
        for start in range(0, len(tokens), POSITIONS):
            some = list(wanted[start : start + POSITIONS])
            self._decode(tokens[start : start + POSITIONS], self._first + start, some)
            for at, is_wanted in enumerate(some):
                if is_wanted:
                    yield start + at, self._row(at)

    def _decode(self, tokens: Sequence[int], first: int, wanted: Sequence[bool]) -> None:
        batch, count = llama_cpp.llama_batch(), len(tokens)
        batch.n_tokens = count
        arrays = (
            ("token", (llama_cpp.llama_token * count)(*tokens)),
            ("pos", (llama_cpp.llama_pos * count)(*range(first, first + count))),
            ("logits", (ctypes.c_int8 * count)(*wanted)),
        )
        for name, array in arrays:  # a pointer made by cast keeps what it points to
            setattr(batch, name, ctypes.cast(array, ctypes.POINTER(array._type_)))
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise EngineError(f"llama.cpp could not evaluate {count} tokens (status {status})")

    def _row(self, index: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise EngineError("llama.cpp gave no logits")
        row: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self.model.n_vocab,))
        return row
