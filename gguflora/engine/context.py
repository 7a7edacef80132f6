"""One llama.cpp context: an adapter set, and slots of tokens computed under it that later requests may continue.

The KV cells are one pool for all slots (``kv_unified``): a prefix that two of them share is stored once.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.adapter_sets import Identity
from gguflora.engine.model import Model
from gguflora.engine.registry import NO_ADAPTERS, AdapterPhase, Embeddings
from gguflora.errors import DivergedError, EngineError, GenerationError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.bindings import captured_log, position_factors, put_prefix
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters
from gguflora.runtime.llama_internals import kv_bytes_of

Key: TypeAlias = Hashable
"""What is decoded at one position: a token; or (token, identity) where other adapters compute than from the first token
on; or -1 - row of the embeddings put before the tokens. Equal keys after equal keys have equal KV cells."""

KV_TYPES: Final = {
    "F16": llama_cpp.GGML_TYPE_F16,
    "F32": llama_cpp.GGML_TYPE_F32,
    "Q8_0": llama_cpp.GGML_TYPE_Q8_0,
}

_FLASH_ATTN: Final = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
_INFO: Final = 2  # of enum ggml_log_level


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """What all contexts of an engine have in common."""

    n_ctx: int
    n_parallel: int
    n_batch: int
    threads: int
    kv_type: str


@dataclass(slots=True, eq=False)
class Slot:
    """Tokens in the KV cells under one sequence id of llama.cpp.

    Attributes:
        held: what was decoded, by position.
        busy: whether a request works on it.
        used: when a request last did, in seconds of the monotonic clock.
    """

    id: int
    held: list[Key] = field(default_factory=list)
    busy: bool = False
    used: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens to decode at the end of one slot.

    Attributes:
        keys: what the slot holds of them afterwards.
        inputs: the tokens, or embeddings (n, n_embd) in their place, or keys and values for an empty slot.
        phase: what computes them.
        wants_logits: whether those of the last one are computed.
    """

    slot: Slot
    keys: Sequence[Key]
    inputs: Sequence[int] | Embeddings | Prefix
    phase: AdapterPhase
    wants_logits: bool

    @property
    def group(self) -> tuple[bool, bool, Identity]:
        """Chunks with the same can be decoded in one batch."""
        return isinstance(self.inputs, Prefix), isinstance(self.inputs, np.ndarray), self.phase.identity


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """What a slot held, outside of any context.

    Attributes:
        identity: of the context's adapters.
        data: its KV cells in llama.cpp's form.
    """

    identity: Identity | None
    held: list[Key]
    data: Any


class Context:
    """A ``llama_context`` and what it holds. For one thread.

    Attributes:
        identity: of the adapters that compute from the first token on; None before the first.
        n_cells: tokens that all slots together can hold.
        kv_bytes: of the KV cache (and recurrent states); None where llama.cpp does not tell.
        used: when a request last worked in it.

    Raises:
        EngineError: if llama.cpp cannot make it.
    """

    def __init__(self, model: Model, options: ContextOptions, fused: ConcatenatedAdapters) -> None:
        self._model = model
        self._fused = fused
        with captured_log(min_level=_INFO) as log:
            pointer = llama_cpp.llama_init_from_model(model.pointer, _parameters(options))
        if not pointer:
            raise EngineError(f"llama.cpp could not make a context of {options.n_ctx} tokens: {' '.join(log).strip()}")
        self.pointer: Any = pointer
        self._memory = llama_cpp.llama_get_memory(pointer)
        self.kv_bytes = kv_bytes_of("".join(log)) if self._memory else 0
        self.n_cells = int(llama_cpp.llama_n_ctx(pointer))
        self.n_batch = int(llama_cpp.llama_n_batch(pointer))
        self.slots = [Slot(number) for number in range(options.n_parallel)]
        self.identity: Identity | None = None
        self.used = 0.0
        self._applied = NO_ADAPTERS
        self._batch = _Batch(self.n_batch, position_factors(model.pointer))
        self._outputs: dict[int, Slot] = {}
        self._unproven: set[int] = set()  # ids of slots whose last logits nobody has seen to be finite
        self._poisoned = False

    def free(self) -> None:
        """Free it. Idempotent."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self._fused.forget(pointer)
            llama_cpp.llama_free(pointer)

    @property
    def is_idle(self) -> bool:
        """Whether no request works in it."""
        return not any(slot.busy for slot in self.slots)

    @property
    def n_held(self) -> int:
        """Tokens held by all slots; shared prefixes count for each."""
        return sum(len(slot.held) for slot in self.slots)

    def reset_to(self, identity: Identity | None) -> None:
        """Forget everything computed under the adapters before; ``identity`` is that of those to come."""
        self.forget()
        self._apply(NO_ADAPTERS)
        self.identity = identity

    def forget(self) -> None:
        """Forget all slots.

        Only the bookkeeping is cleared, unless numbers that are not finite may lie in the cells: a masked cell counts 0
        times its value, and 0 * NaN would reach the next ones.
        """
        wipe = self._poisoned or bool(self._unproven) or not self._model.rewinds
        llama_cpp.llama_memory_clear(self._memory, wipe)
        self._poisoned = False
        self._unproven.clear()
        for slot in self.slots:
            slot.held.clear()

    def take(self, keys: Sequence[Key]) -> Slot | None:
        """A slot for a request on ``keys``, its beginning held already as far as possible; None if all are busy.

        The last key is never held: its logits are wanted.
        """
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        wanted = keys[:-1]
        source = max(self.slots, key=lambda slot: _common(slot.held, wanted))
        common = _common(source.held, wanted)
        if source in free and common * 2 >= len(source.held):  # it goes on from there
            target = source
        else:
            target = min(free, key=lambda slot: (slot is source, len(slot.held) > 0, slot.used))
        if target is not source:
            self._copy(source, target, common)
        self.keep(target, common)
        target.busy, target.used = True, time.monotonic()
        return target

    def release(self, slot: Slot) -> None:
        """The request that worked in ``slot`` has ended; what it holds stays for others."""
        slot.busy, slot.used = False, time.monotonic()
        if self._poisoned and self.is_idle:
            self.forget()

    def keep(self, slot: Slot, count: int) -> None:
        """Forget all but the first ``count`` tokens of a slot, or all where the model's state cannot go back."""
        if count == len(slot.held):
            return
        cut = count and self._model.rewinds and llama_cpp.llama_memory_seq_rm(self._memory, slot.id, count, -1)
        if not cut:
            count = 0
            llama_cpp.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        del slot.held[count:]

    def save(self, slot: Slot) -> SavedSlot:
        """A copy of what ``slot`` holds."""
        size = llama_cpp.llama_state_seq_get_size(self.pointer, slot.id)
        data = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self.pointer, data, size, slot.id)
        return SavedSlot(self.identity, list(slot.held[:]) if written == size else [], data)

    def state_bytes(self, slot: Slot) -> int:
        """Bytes of a copy of what ``slot`` holds."""
        return int(llama_cpp.llama_state_seq_get_size(self.pointer, slot.id))

    def restore(self, saved: SavedSlot) -> Slot | None:
        """A free slot that holds again what was saved; None if there is none, or it cannot be."""
        free = [slot for slot in self.slots if not slot.busy]
        if not free or saved.identity != self.identity or not saved.held:
            return None
        slot = min(free, key=lambda slot: (len(slot.held) > 0, slot.used))
        self.keep(slot, 0)
        if not self.make_room(len(saved.held)):
            return None
        if not llama_cpp.llama_state_seq_set_data(self.pointer, saved.data, len(saved.data), slot.id):
            llama_cpp.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
            return None
        slot.held.extend(saved.held)
        slot.busy, slot.used = True, time.monotonic()
        return slot

    def knows(self, generation: int) -> bool:
        """Whether the adapter of this load is in force, or will be for the next tokens."""
        identities = self._applied.identity | (self.identity or frozenset())
        return any(generation == other for _, other, _ in identities)

    def make_room(self, count: int) -> bool:
        """Forget idle slots, longest unused first, until ``count`` cells are free; whether they are."""
        idle = sorted((s for s in self.slots if not s.busy and s.held), key=lambda s: s.used, reverse=True)
        while self.n_held + count > self.n_cells:
            if not idle:
                return False
            self.keep(idle.pop(), 0)
        return True

    def decode(self, chunks: Sequence[Chunk]) -> list[int]:
        """Decode chunks of one group in one batch; for each that wants logits, in order, its index in the batch.

        Raises:
            GenerationError: if llama.cpp fails; the context must then `forget`.
        """
        self._apply(chunks[0].phase)
        self._unproven.update(chunk.slot.id for chunk in chunks)
        if isinstance(chunks[0].inputs, Prefix):
            return self._write(chunks)
        self._outputs = self._batch.fill(chunks)
        status = llama_cpp.llama_decode(self.pointer, self._batch.struct)
        if status:
            self._poisoned = True
            raise GenerationError(
                f"llama.cpp could not decode a batch of {self._batch.struct.n_tokens} tokens ({status})"
            )
        self.used = time.monotonic()
        for chunk in chunks:
            chunk.slot.held.extend(chunk.keys)
        return list(self._outputs)

    def _write(self, chunks: Sequence[Chunk]) -> list[int]:
        """Write the keys and values of soft prompts to empty slots."""
        for chunk in chunks:
            assert isinstance(chunk.inputs, Prefix)
            put_prefix(self.pointer, chunk.inputs, chunk.slot.id)
            chunk.slot.held.extend(chunk.keys)
        self.used = time.monotonic()
        return []

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
            if not self._applied.parts:
                raise GenerationError("the logits of the model are not finite")
            raise DivergedError("the logits are not finite: the scale of an adapter is too large, or it has diverged")
        self._unproven.discard(self._outputs[index].id)
        return logits

    def _apply(self, phase: AdapterPhase) -> None:
        if phase.identity != self._applied.identity:
            self._fused.apply(self.pointer, phase.parts)
            self._applied = phase

    def _copy(self, source: Slot, target: Slot, count: int) -> None:
        self.keep(target, 0)
        if count and self._model.rewinds:
            llama_cpp.llama_memory_seq_cp(self._memory, source.id, target.id, 0, count)
            target.held.extend(source.held[:count])


class _Batch:
    """The arrays of a ``llama_batch`` with one sequence per token."""

    def __init__(self, size: int, axes: tuple[int, ...]) -> None:
        self._axes = np.array(axes, np.int32)[:, None]
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size * len(axes), np.int32)
        self._counts = np.ones(size, np.int32)
        self._ids = np.zeros(size, np.int32)
        self._id_pointers = self._ids.ctypes.data + np.arange(size, dtype=np.uintp) * self._ids.itemsize
        self._wanted = np.zeros(size, np.int8)
        self._embeddings: Embeddings | None = None
        self.struct = llama_cpp.llama_batch()
        self._point("pos", self._positions)
        self._point("n_seq_id", self._counts)
        self._point("seq_id", self._id_pointers)
        self._point("logits", self._wanted)

    def fill(self, chunks: Sequence[Chunk]) -> dict[int, Slot]:
        """Write the chunks into the arrays; the slots whose logits are wanted, by index in the batch."""
        at, outputs = 0, {}
        self._wanted[:] = 0
        for chunk in chunks:
            end, first = at + len(chunk.keys), len(chunk.slot.held)
            if not isinstance(chunk.inputs, np.ndarray | Prefix):
                self._tokens[at:end] = chunk.inputs
            self._positions[at:end] = np.arange(first, first + end - at)
            self._ids[at:end] = chunk.slot.id
            if chunk.wants_logits:
                self._wanted[end - 1] = 1
                outputs[end - 1] = chunk.slot
            at = end
        self.struct.n_tokens = at
        rows = [chunk.inputs for chunk in chunks if isinstance(chunk.inputs, np.ndarray)]
        self._embeddings = np.ascontiguousarray(np.concatenate(rows), np.float32) if rows else None
        if rows:
            self._positions[: at * len(self._axes)] = (self._axes * self._positions[:at]).reshape(-1)
        self._point("embd", self._embeddings)
        self._point("token", None if rows else self._tokens)
        return outputs

    def _point(self, name: str, array: NDArray[Any] | None) -> None:
        kind = dict(llama_cpp.llama_batch._fields_)[name]
        setattr(self.struct, name, None if array is None else ctypes.cast(array.ctypes.data, kind))


def _parameters(options: ContextOptions) -> Any:  # noqa: ANN401  (llama_cpp has no types)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = options.n_ctx
    parameters.n_batch = parameters.n_ubatch = options.n_batch
    parameters.n_seq_max = options.n_parallel
    parameters.n_outputs_max = options.n_parallel
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
    # Flash attention skips the cells of other requests; without it all are computed and then masked: with 2000 of them
    # a token takes half as long again. But it sums in an order that changes with the batch, in 16 bits if the cells are
    # of 16: whoever asks for 32 bits gets the same logits whatever is beside them.
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if options.kv_type == "F32" else _FLASH_ATTN
    parameters.kv_unified = True
    parameters.swa_full = True  # else a sequence could not go back to a common prefix
    parameters.no_perf = True
    return parameters


def _common(held: Sequence[Key], wanted: Sequence[Key]) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(held), len(wanted))
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
