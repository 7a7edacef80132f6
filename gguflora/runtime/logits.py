"""Compute the logits of many tokens with llama.cpp: one model, several contexts, a few positions at a time.

``llama_cpp.Llama`` has one context and memory for the logits of all its positions. A comparison needs several contexts
of one model, and logits only until they are compared. This module imports llama_cpp, so ``import gguflora`` must not
import it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.errors import HotSwapError
from gguflora.runtime.bindings import (
    Pointer,
    captured_log,
    free_lora,
    load_lora,
    set_loras,
)
from gguflora.runtime.graph_hook import GraphHook
from gguflora.runtime.tokenizing import pre_tokenizer, tokenize

POSITIONS: Final = 128
"""Tokens of one call of ``llama_decode``: larger batches are not faster and need more memory for logits."""


class LogitsModel:
    """A GGUF model loaded by llama.cpp; a context manager that frees it with its contexts and LoRAs.

    Args:
        path: the GGUF file; for a split model, its first file.
        threads: number of threads.
        repack: let llama.cpp hold a second copy of the weights in the order that its fastest kernels read.

    Raises:
        HotSwapError: if llama.cpp cannot load it.
    """

    def __init__(self, path: Path, threads: int, *, repack: bool = True) -> None:
        self.path = path
        self._threads = threads
        self._repack = repack
        self._hooks: list[GraphHook | None] = []
        with ExitStack() as resources:
            resources.enter_context(_without_log())
            self._load_model(resources)
            self._resources = resources.pop_all()

    def _load_model(self, resources: ExitStack) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = self._repack
        with captured_log() as log:
            self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not self.pointer:
            raise HotSwapError(f"{self.path}: llama.cpp could not load this model: {_log_text(log)}")
        resources.callback(llama_cpp.llama_model_free, self.pointer)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self.pointer)

    def tokenize(self, text: bytes) -> list[int]:
        """Return the tokens of a text, without a token for its beginning.

        Raises:
            RequestError: if llama.cpp cannot split the text.
        """
        return tokenize(self._vocabulary, text, add_bos=False, special=False, pre=pre_tokenizer(self.pointer))

    @property
    def first_tokens(self) -> list[int]:
        """The tokens that every text starts with: the beginning-of-text token, or none."""
        adds = llama_cpp.llama_vocab_get_add_bos(self._vocabulary)
        return [llama_cpp.llama_vocab_bos(self._vocabulary)] if adds else []

    def context(
        self, n_ctx: int, loras: Sequence[tuple[Path, float]] = (), *, hook: GraphHook | None = None
    ) -> LogitsContext:
        """Create a context with adapters (GGUF file, scale) applied.

        Args:
            n_ctx: number of tokens that it can hold.
            loras: the adapters.
            hook: a hook into its graph; the model keeps it, because llama.cpp may call it as long as the context lives.

        Raises:
            HotSwapError: if llama.cpp cannot create it, for example because memory is short.
        """
        applied = self.load_all(loras)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = min(n_ctx, POSITIONS)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        if hook is not None:
            hook.attach(parameters)
            # what the hook sees should not depend on how a cache rounds: this is float32 throughout
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        with captured_log() as log:
            pointer = llama_cpp.llama_init_from_model(self.pointer, parameters)
        if not pointer:
            raise HotSwapError(f"{self.path}: llama.cpp could not create a context of {n_ctx} tokens: {_log_text(log)}")
        self._hooks.append(hook)
        self._resources.callback(llama_cpp.llama_free, pointer)
        set_loras(pointer, applied)
        return LogitsContext(self, pointer)

    def load_all(self, loras: Sequence[tuple[Path, float]]) -> list[tuple[Pointer, float]]:
        """Load adapters (GGUF file, scale) for contexts of this model; it frees them when it is closed."""
        loaded = []
        for path, scale in loras:
            lora = load_lora(self.pointer, path)
            self._resources.callback(free_lora, lora)
            loaded.append((lora, scale))
        return loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()


class LogitsContext:
    """A context of a `LogitsModel`, which evaluates one text after another."""

    def __init__(self, model: LogitsModel, pointer: Any) -> None:  # noqa: ANN401  (llama_cpp has no types)
        self._model = model
        self._pointer = pointer
        self._count = 0

    def put_loras(self, loras: Sequence[tuple[Path, float]]) -> None:
        """Apply adapters (GGUF file, scale) in place of those before; call `clear` before the next text.

        Raises:
            HotSwapError: if llama.cpp cannot load one.
        """
        set_loras(self._pointer, self._model.load_all(loras))

    def clear(self) -> None:
        """Start a new text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._pointer), True)
        self._count = 0

    def decode(self, tokens: Sequence[int], *, only_last: bool = False) -> NDArray[np.float32]:
        """Evaluate up to `POSITIONS` more tokens of the text.

        Returns:
            Logits (n_tokens, n_vocab), or (1, n_vocab) for the last token alone; valid until the next call.

        Raises:
            HotSwapError: if llama.cpp fails, or the model gives no logits.
        """
        batch = _create_batch(tokens, self._count, only_last=only_last)
        status = llama_cpp.llama_decode(self._pointer, batch)
        logits = llama_cpp.llama_get_logits(self._pointer) if status == 0 else None
        if not logits:
            raise HotSwapError(
                f"{self._model.path}: llama.cpp gave no logits (status {status}); is it a text generator?"
            )
        self._count += len(tokens)
        rows = 1 if only_last else len(tokens)
        return np.ctypeslib.as_array(logits, (rows, self._model.n_vocab))


def _create_batch(tokens: Sequence[int], start: int, *, only_last: bool) -> Any:  # noqa: ANN401
    """Create a ``llama_batch`` of tokens at the positions from ``start`` on; it keeps its arrays alive."""
    count = len(tokens)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = count
    arrays = (
        ("token", (llama_cpp.llama_token * count)(*tokens)),
        ("pos", (llama_cpp.llama_pos * count)(*range(start, start + count))),
        ("logits", (ctypes.c_int8 * count)(*[not only_last] * (count - 1), True)),
    )
    for name, array in arrays:  # a pointer made by cast keeps its target alive
        setattr(batch, name, ctypes.cast(array, ctypes.POINTER(array._type_)))
    return batch


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep llama-cpp-python from printing what llama.cpp logs."""
    logger = logging.getLogger("llama-cpp-python")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _log_text(log: Sequence[str]) -> str:
    return " ".join("".join(log).split()) or "it gave no reason"
