"""One llama.cpp context: an adapter set, and sequences of tokens computed under it that later requests may continue.

The KV cells are one pool for all sequences (``kv_unified``): a prefix that two of them share is stored once.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.adapter_sets import Identity
from gguflora.engine.model import Model
from gguflora.errors import EngineError, GenerationError
from gguflora.llama import Pointer, captured_log, set_loras

KV_TYPES: Final = {
    "F16": llama_cpp.GGML_TYPE_F16,
    "F32": llama_cpp.GGML_TYPE_F32,
    "Q8_0": llama_cpp.GGML_TYPE_Q8_0,
}

_INFO: Final = 2  # of enum ggml_log_level
_CACHE_SIZE: Final = re.compile(r"size = +([\d.]+) MiB \( *\d+ cells")
"""How llama.cpp tells the bytes of a KV cache or recurrent state when a context is made."""


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """What all contexts of an engine have in common."""

    n_ctx: int
    n_parallel: int
    n_batch: int
    threads: int
    kv_type: str


@dataclass(slots=True, eq=False)
class Sequence_:  # noqa: N801  (a sequence of llama.cpp, not of Python)
    """Tokens in the KV cells under one sequence id.

    Attributes:
        held: what was decoded, by position.
        busy: whether a request works on it.
        used: when a request last did, in seconds of the monotonic clock.
    """

    id: int
    held: list[int] = field(default_factory=list)
    busy: bool = False
    used: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens to decode at the end of one sequence; with ``wants_logits`` those of the last are computed."""

    sequence: Sequence_
    tokens: Sequence[int]
    wants_logits: bool


class Context:
    """A ``llama_context`` and what it holds. For one thread.

    Attributes:
        identity: of the adapter set in force; None if nothing may be reused.
        n_cells: tokens that all sequences together can hold.
        kv_bytes: of the KV cache (and recurrent states).
        used: when a request last worked in it.

    Raises:
        EngineError: if llama.cpp cannot make it.
    """

    def __init__(self, model: Model, options: ContextOptions) -> None:
        self._model = model
        with captured_log(least=_INFO) as log:
            pointer = llama_cpp.llama_init_from_model(model.pointer, _parameters(options))
        if not pointer:
            raise EngineError(f"llama.cpp could not make a context of {options.n_ctx} tokens: {' '.join(log).strip()}")
        self.pointer: Any = pointer
        self._memory = llama_cpp.llama_get_memory(pointer)
        self.kv_bytes = sum(round(float(size) * 2**20) for size in _CACHE_SIZE.findall("".join(log)))
        self.n_cells = int(llama_cpp.llama_n_ctx(pointer))
        self.n_batch = int(llama_cpp.llama_n_batch(pointer))
        self.sequences = [Sequence_(number) for number in range(options.n_parallel)]
        self.identity: Identity | None = None
        self.used = 0.0
        self._batch = _Batch(self.n_batch)
        self._outputs: dict[int, Sequence_] = {}
        self._unproven: set[int] = set()  # ids of sequences whose last logits nobody has seen to be finite
        self._poisoned = False

    def free(self) -> None:
        """Free it. Idempotent."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            llama_cpp.llama_free(pointer)

    @property
    def is_idle(self) -> bool:
        """Whether no request works in it."""
        return not any(sequence.busy for sequence in self.sequences)

    @property
    def n_held(self) -> int:
        """Tokens held by all sequences; shared prefixes count for each."""
        return sum(len(sequence.held) for sequence in self.sequences)

    def adopt(self, identity: Identity | None, loras: Sequence[tuple[Pointer, float]]) -> None:
        """Put another adapter set in force and forget everything computed under the one before."""
        self.forget()
        self.identity = None
        set_loras(self.pointer, loras)
        self.identity = identity

    def forget(self) -> None:
        """Forget all sequences.

        Only the bookkeeping is cleared, unless numbers that are not finite may lie in the cells: a masked cell counts 0
        times its value, and 0 * NaN would reach the next ones.
        """
        wipe = self._poisoned or bool(self._unproven) or not self._model.rewinds
        llama_cpp.llama_memory_clear(self._memory, wipe)
        self._poisoned = False
        self._unproven.clear()
        for sequence in self.sequences:
            sequence.held.clear()

    def take(self, keys: Sequence[int]) -> Sequence_ | None:
        """A sequence for a request on ``keys``, its beginning held already as far as possible; None if all are busy.

        The last key is never held: its logits are wanted.
        """
        free = [sequence for sequence in self.sequences if not sequence.busy]
        if not free:
            return None
        wanted = keys[:-1]
        source = max(self.sequences, key=lambda sequence: _common(sequence.held, wanted))
        common = _common(source.held, wanted)
        if source in free and common * 2 >= len(source.held):  # it goes on from there
            target = source
        else:
            target = min(free, key=lambda sequence: (sequence is source, len(sequence.held) > 0, sequence.used))
        if target is not source:
            self._copy(source, target, common)
        self.keep(target, common)
        target.busy, target.used = True, time.monotonic()
        return target

    def release(self, sequence: Sequence_) -> None:
        """The request that worked on ``sequence`` has ended; what it holds stays for others."""
        sequence.busy, sequence.used = False, time.monotonic()
        if self._poisoned and self.is_idle:
            self.forget()

    def keep(self, sequence: Sequence_, count: int) -> None:
        """Forget all but the first ``count`` tokens of a sequence, or all where the model's state cannot go back."""
        if count == len(sequence.held):
            return
        cut = count and self._model.rewinds and llama_cpp.llama_memory_seq_rm(self._memory, sequence.id, count, -1)
        if not cut:
            count = 0
            llama_cpp.llama_memory_seq_rm(self._memory, sequence.id, -1, -1)
        del sequence.held[count:]

    def make_room(self, count: int) -> bool:
        """Forget idle sequences, longest unused first, until ``count`` cells are free; whether they are."""
        idle = sorted((s for s in self.sequences if not s.busy and s.held), key=lambda s: s.used, reverse=True)
        while self.n_held + count > self.n_cells:
            if not idle:
                return False
            self.keep(idle.pop(), 0)
        return True

    def decode(self, chunks: Sequence[Chunk]) -> list[int]:
        """Decode all chunks in one batch; for each that wants logits, in order, its index in the batch.

        Raises:
            GenerationError: if llama.cpp fails; the context must then `forget`.
        """
        self._outputs = self._batch.fill(chunks)
        self._unproven.update(chunk.sequence.id for chunk in chunks)
        status = llama_cpp.llama_decode(self.pointer, self._batch.struct)
        if status:
            self._poisoned = True
            raise GenerationError(
                f"llama.cpp could not decode a batch of {self._batch.struct.n_tokens} tokens ({status})"
            )
        self.used = time.monotonic()
        for chunk in chunks:
            chunk.sequence.held.extend(chunk.tokens)
        return list(self._outputs)

    def logits(self, index: int) -> NDArray[np.float32]:
        """A view of the logits of one token of the last batch, valid until the next.

        Raises:
            GenerationError: if they are not finite.
        """
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        if not pointer:
            raise GenerationError("llama.cpp gave no logits")
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self._model.n_vocab,))
        if not np.isfinite(logits.max()):
            self._poisoned = True
            raise GenerationError("the logits are not finite: the scale of an adapter is too large, or it has diverged")
        self._unproven.discard(self._outputs[index].id)
        return logits

    def _copy(self, source: Sequence_, target: Sequence_, count: int) -> None:
        self.keep(target, 0)
        if count and self._model.rewinds:
            llama_cpp.llama_memory_seq_cp(self._memory, source.id, target.id, 0, count)
            target.held.extend(source.held[:count])


class _Batch:
    """The arrays of a ``llama_batch`` with one sequence per token."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._ids = np.zeros(size, np.int32)
        self._id_pointers = self._ids.ctypes.data + np.arange(size, dtype=np.uintp) * self._ids.itemsize
        self._wanted = np.zeros(size, np.int8)
        fields = dict(llama_cpp.llama_batch._fields_)
        self.struct = llama_cpp.llama_batch()
        self.struct.embd = None
        arrays: dict[str, NDArray[Any]] = {
            "token": self._tokens,
            "pos": self._positions,
            "n_seq_id": self._counts,
            "seq_id": self._id_pointers,
            "logits": self._wanted,
        }
        for name, array in arrays.items():
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, fields[name]))

    def fill(self, chunks: Sequence[Chunk]) -> dict[int, Sequence_]:
        """Write the chunks into the arrays; the sequences whose logits are wanted, by index in the batch."""
        at, outputs = 0, {}
        self._wanted[:] = 0
        for chunk in chunks:
            end, first = at + len(chunk.tokens), len(chunk.sequence.held)
            self._tokens[at:end] = chunk.tokens
            self._positions[at:end] = np.arange(first, first + end - at)
            self._ids[at:end] = chunk.sequence.id
            if chunk.wants_logits:
                self._wanted[end - 1] = 1
                outputs[end - 1] = chunk.sequence
            at = end
        self.struct.n_tokens = at
        return outputs


def _parameters(options: ContextOptions) -> Any:  # noqa: ANN401  (llama_cpp has no types)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = options.n_ctx
    parameters.n_batch = parameters.n_ubatch = options.n_batch
    parameters.n_seq_max = options.n_parallel
    parameters.n_outputs_max = options.n_parallel
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
    parameters.kv_unified = True
    parameters.swa_full = True  # else a sequence could not go back to a common prefix
    parameters.no_perf = True
    return parameters


def _common(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Length of the common beginning."""
    most = min(len(held), len(wanted))
    return next((at for at in range(most) if held[at] != wanted[at]), most)
