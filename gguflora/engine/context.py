"""The llama.cpp context of an engine: it keeps computed tokens in slots for later requests.

A slot belongs to an adapter set. All slots share one pool of KV cells (``kv_unified``), so a prefix that two slots of
one set have in common is stored once.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.adapter_sets import Identity
from gguflora.engine.batch import Batch
from gguflora.engine.model import Model
from gguflora.engine.registry import NO_ADAPTERS, AdapterPhase
from gguflora.engine.slots import Chunk, Key, SavedSlot, Slot, count_common
from gguflora.errors import DivergedError, EngineError, GenerationError, HotSwapError, MixingError
from gguflora.placement.prefix import Prefix
from gguflora.quants.arrays import Float32Array
from gguflora.runtime.bindings import captured_log, position_factors, put_prefix
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters
from gguflora.runtime.graph_hook import GraphFaultError
from gguflora.runtime.llama_internals import kv_bytes_of
from gguflora.runtime.mixed_adapters import MixedAdapters

KV_TYPES: Final = {
    "F16": llama_cpp.GGML_TYPE_F16,
    "F32": llama_cpp.GGML_TYPE_F32,
    "Q8_0": llama_cpp.GGML_TYPE_Q8_0,
}

MAX_SCORED: Final = 32
"""Largest number of prompt tokens in one batch whose log probabilities are asked for: each needs a row of logits."""

_FLASH_ATTN: Final = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
_INFO: Final = 2  # of enum ggml_log_level


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """Options of a context.

    Attributes:
        n_ctx: number of KV cells, for all slots together.
        n_parallel: number of slots.
        n_batch: largest number of tokens in one batch.
        threads: number of threads that compute.
        kv_type: type of the numbers in the KV cache, a key of `KV_TYPES`.
    """

    n_ctx: int
    n_parallel: int
    n_batch: int
    threads: int
    kv_type: str


class Context:
    """A ``llama_context`` and its slots. Not thread-safe.

    Attributes:
        pointer: the ``llama_context *``; None once freed.
        n_cells: number of tokens that all slots together can hold.
        n_batch: largest number of tokens in one batch.
        kv_bytes: size of the KV cache and recurrent states in bytes; None if llama.cpp does not report it.
        slots: its slots, by id.
        swaps: number of times that other adapters were applied to all tokens of a batch.
        has_nan: whether KV cells may hold numbers that are not finite.

    Raises:
        EngineError: if llama.cpp cannot make the context.
    """

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        concatenated: ConcatenatedAdapters,
        mixed: MixedAdapters | None = None,
    ) -> None:
        self._model = model
        self._concatenated = concatenated
        self._mixed = mixed
        self._hook = None if mixed is None else mixed.hook
        parameters = _parameters(options)
        if self._hook is not None:
            self._hook.attach(parameters)
        with captured_log(min_level=_INFO) as log:
            pointer = llama_cpp.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise EngineError(f"llama.cpp could not make a context of {options.n_ctx} tokens: {' '.join(log).strip()}")
        self.pointer: Any = pointer
        self._memory = llama_cpp.llama_get_memory(pointer)
        self.kv_bytes = kv_bytes_of("".join(log)) if self._memory else 0
        self.n_cells = int(llama_cpp.llama_n_ctx(pointer))
        self.n_batch = int(llama_cpp.llama_n_batch(pointer))
        self.slots = [Slot(number) for number in range(options.n_parallel)]
        self.swaps = 0
        self._applied: AdapterPhase | None = NO_ADAPTERS  # None while a stack is in force
        self._batch = Batch(self.n_batch, position_factors(model.pointer))
        self._outputs: dict[int, Slot] = {}
        self._adapted: set[int] = set()  # ids of slots whose part of the last batch was computed by adapters
        self._unchecked: set[int] = set()  # ids of slots whose last logits have not been checked for NaN
        self._is_cleaned = False  # whether the hook kept such numbers out of the cells of the last batch
        self._diverged: set[int] = set()  # ids of slots in which a number was not finite
        self.has_nan = False
        if mixed is not None:
            mixed.before_release = self.clear_adapters

    def free(self) -> None:
        """Free the context. Idempotent."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self._concatenated.forget(pointer)
            llama_cpp.llama_free(pointer)

    @property
    def is_encoder(self) -> bool:
        """Whether the model keeps nothing of earlier tokens, so that it can embed texts but not continue them."""
        return not self._memory

    @property
    def is_idle(self) -> bool:
        """Whether no request is using the context."""
        return not any(slot.busy for slot in self.slots)

    @property
    def n_held(self) -> int:
        """Number of tokens in all slots; a shared prefix counts for each slot."""
        return sum(len(slot.held) for slot in self.slots)

    def clear_adapters(self) -> None:
        """Apply no adapters."""
        if self.pointer is not None:
            self._concatenated.apply(self.pointer, ())
            self._applied = NO_ADAPTERS

    def forget(self) -> None:
        """Clear all slots.

        Normally only the bookkeeping is cleared. If cells may hold numbers that are not finite, the numbers are cleared
        too: attention multiplies masked cells by 0, and 0 * NaN would spoil the next tokens.
        """
        wipe = self.has_nan or bool(self._unchecked) or not self._model.rewinds
        llama_cpp.llama_memory_clear(self._memory, wipe)
        self.has_nan = False
        self._unchecked.clear()
        self._diverged.clear()
        for slot in self.slots:
            slot.held.clear()

    def take(self, keys: Sequence[Key], identity: Identity) -> Slot | None:
        """Return a free slot that already holds as long a prefix of ``keys`` as possible; None if all slots are busy.

        Only what adapters of the same ``identity`` have computed is used. The last key is always left to decode,
        because its logits are needed.
        """
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        reusable = keys[:-1]
        usable = {slot: count_common(slot.held, reusable) if slot.identity == identity else 0 for slot in self.slots}
        source = max(self.slots, key=lambda slot: usable[slot])
        common = usable[source]
        if source in free and common and common * 2 >= len(source.held):  # most of it is reused: continue in place
            target = source
        else:
            target = min(free, key=lambda slot: (common and slot is source, len(slot.held) > 0, slot.used))
        if target is not source:
            self._copy(source, target, common)
        self.keep(target, common)
        target.identity = identity
        target.busy, target.used = True, time.monotonic()
        return target

    def release(self, slot: Slot) -> None:
        """Mark ``slot`` as free after its request has ended; its tokens stay for later requests."""
        slot.busy, slot.used = False, time.monotonic()
        if slot.id in self._diverged:
            self.keep(slot, 0)
            self._diverged.discard(slot.id)
        if self.has_nan and self.is_idle:
            self.forget()

    def keep(self, slot: Slot, count: int) -> None:
        """Drop all but the first ``count`` tokens of a slot, or all tokens if the model's state cannot be rewound."""
        if count == len(slot.held):
            return
        cut = count and self._model.rewinds and llama_cpp.llama_memory_seq_rm(self._memory, slot.id, count, -1)
        if not cut:
            count = 0
            llama_cpp.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
        del slot.held[count:]

    def save(self, slot: Slot) -> SavedSlot:
        """Copy the content of ``slot``."""
        size = llama_cpp.llama_state_seq_get_size(self.pointer, slot.id)
        data = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self.pointer, data, size, slot.id)
        return SavedSlot(slot.identity, list(slot.held[:]) if written == size else [], data)

    def state_bytes(self, slot: Slot) -> int:
        """Return the size in bytes of a copy of ``slot``."""
        return int(llama_cpp.llama_state_seq_get_size(self.pointer, slot.id))

    def restore(self, saved: SavedSlot) -> Slot | None:
        """Restore saved content into a free slot and return the slot; None if that is impossible."""
        free = [slot for slot in self.slots if not slot.busy]
        if not free or not saved.held:
            return None
        slot = min(free, key=lambda slot: (len(slot.held) > 0, slot.used))
        self.keep(slot, 0)
        if not self.make_room(len(saved.held)):
            return None
        if not llama_cpp.llama_state_seq_set_data(self.pointer, saved.data, len(saved.data), slot.id):
            llama_cpp.llama_memory_seq_rm(self._memory, slot.id, -1, -1)
            return None
        slot.held.extend(saved.held)
        slot.identity = saved.identity
        slot.busy, slot.used = True, time.monotonic()
        return slot

    def drop(self, load_id: int) -> None:
        """Forget what was computed by the adapter with this load id, which no request uses; apply it no longer."""
        for slot in self.slots:
            if not slot.busy and slot.identity and any(load_id == other for _, other, _ in slot.identity):
                self.keep(slot, 0)
                slot.identity = None
        if self._applied is not None and any(load_id == other for _, other, _ in self._applied.identity):
            self.clear_adapters()

    def make_room(self, count: int) -> bool:
        """Clear idle slots, the least recently used first, until ``count`` cells are free; return whether they are."""
        idle = sorted((s for s in self.slots if not s.busy and s.held), key=lambda s: s.used, reverse=True)
        while self.n_held + count > self.n_cells:
            if not idle:
                return False
            self.keep(idle.pop(), 0)
        return True

    def decode(self, chunks: Sequence[Chunk], *, mixed: bool = False) -> list[list[int]]:
        """Decode chunks of one kind in one batch.

        Args:
            chunks: what to decode; unless ``mixed``, all with the same LoRAs.
            mixed: apply to each chunk only its own LoRAs.

        Returns:
            For each chunk, the indices in the batch of those of its positions that got logits.

        Raises:
            GenerationError: if llama.cpp fails.
            MixingError: if sets cannot be mixed after all; the batch may be decoded again, and then not ``mixed``.
        """
        weights = None
        if mixed:
            weights = self._apply_stack(chunks)
        else:
            self._apply(chunks[0].phase)
        if isinstance(chunks[0].inputs, Prefix):
            self._unchecked.update(chunk.slot.id for chunk in chunks)
            return self._write_prefixes(chunks)
        self._outputs = self._batch.fill(chunks)
        self._adapted = {chunk.slot.id for chunk in chunks if chunk.phase.parts}
        # where every token's logits are looked at, as in decode steps of one set, numbers that are not finite show
        is_cleaned = self._hook is not None and (mixed or len(self._outputs) < self._batch.struct.n_tokens)
        if is_cleaned:
            assert self._hook is not None
            self._hook.begin(self._batch.tokens, self._batch.outputs, weights)
        else:
            self._unchecked.update(chunk.slot.id for chunk in chunks)
        self._is_cleaned = is_cleaned
        status = llama_cpp.llama_decode(self.pointer, self._batch.struct)
        if is_cleaned:
            self._note_diverged(chunks)
        if status:
            self.has_nan |= not is_cleaned
            for chunk in chunks:
                llama_cpp.llama_memory_seq_rm(self._memory, chunk.slot.id, len(chunk.slot.held), -1)
            raise GenerationError(
                f"llama.cpp could not decode a batch of {self._batch.struct.n_tokens} tokens (status {status})"
            )
        for chunk in chunks:
            chunk.slot.held.extend(chunk.keys)
        by_slot: dict[int, list[int]] = {chunk.slot.id: [] for chunk in chunks}
        for index, slot in self._outputs.items():
            by_slot[slot.id].append(index)
        return [by_slot[chunk.slot.id] for chunk in chunks]

    def _note_diverged(self, chunks: Sequence[Chunk]) -> None:
        """Take in what the hook has seen in the batch just decoded."""
        assert self._hook is not None
        assert self._mixed is not None
        try:
            report = self._hook.end()
        except GraphFaultError as error:
            for chunk in chunks:
                llama_cpp.llama_memory_seq_rm(self._memory, chunk.slot.id, len(chunk.slot.held), -1)
            self.clear_adapters()
            self._mixed.disable(str(error))
            raise MixingError(str(error)) from error
        start = 0
        for chunk in chunks:
            stop = start + len(chunk.keys)
            if report.diverged[start:stop].any():
                self._diverged.add(chunk.slot.id)
            start = stop

    def _apply_stack(self, chunks: Sequence[Chunk]) -> Float32Array:
        """Put the stack with the LoRAs of all chunks in force; return the weights of each token."""
        assert self._mixed is not None
        try:
            by_set = self._mixed.apply(self.pointer, [chunk.phase.parts for chunk in chunks])
        except (HotSwapError, MemoryError) as error:
            self.clear_adapters()
            self._mixed.disable(str(error))
            raise MixingError(str(error)) from error
        self._concatenated.forget(self.pointer)
        self._applied = None
        return np.repeat(by_set, [len(chunk.keys) for chunk in chunks], axis=0)

    def _write_prefixes(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Write the keys and values of soft prompts into empty slots."""
        for chunk in chunks:
            assert isinstance(chunk.inputs, Prefix)
            put_prefix(self.pointer, chunk.inputs, chunk.slot.id)
            chunk.slot.held.extend(chunk.keys)
        return [[] for _ in chunks]

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return the logits (n_vocab,) of the token at ``index`` of the last batch, a view valid until the next batch.

        Raises:
            GenerationError: if they are not finite.
        """
        pointer = llama_cpp.llama_get_logits_ith(self.pointer, index)
        if not pointer:
            raise GenerationError("llama.cpp gave no logits")
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (self._model.n_vocab,))
        slot = self._outputs[index]
        if slot.id in self._diverged or not np.isfinite(logits.max()):
            self.has_nan |= not self._is_cleaned
            if slot.id not in self._adapted:
                raise GenerationError("the logits of the model are not finite")
            raise DivergedError("the logits are not finite: the scale of an adapter is too large, or it has diverged")
        self._unchecked.discard(slot.id)
        return logits

    def _apply(self, phase: AdapterPhase) -> None:
        """Apply these LoRAs to all tokens."""
        if self._applied is None or phase.identity != self._applied.identity:
            self._concatenated.apply(self.pointer, phase.parts)
            self._applied = phase
            self.swaps += 1

    def _copy(self, source: Slot, target: Slot, count: int) -> None:
        self.keep(target, 0)
        if count and self._model.rewinds:
            llama_cpp.llama_memory_seq_cp(self._memory, source.id, target.id, 0, count)
            target.held.extend(source.held[:count])


def flash_attention(options: ContextOptions) -> int:
    """Return llama.cpp's number for whether a context computes flash attention.

    Flash attention skips the cells of other requests; without it all cells are computed and then masked, and 2000
    foreign cells slow a token down by half. But the order of its sums depends on the batch, in 16 bits for 16-bit
    cells. With F32 it is off, so that attention adds in one order in every batch. Logits can still differ with the
    other requests: on a quantized base, llama.cpp rounds its matrix products differently in batches of other sizes.
    """
    return int(llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if options.kv_type == "F32" else _FLASH_ATTN)


def _parameters(options: ContextOptions) -> Any:  # noqa: ANN401  (llama_cpp has no types)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = options.n_ctx
    parameters.n_batch = parameters.n_ubatch = options.n_batch
    parameters.n_seq_max = options.n_parallel
    parameters.n_outputs_max = min(options.n_batch, options.n_parallel + MAX_SCORED)
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
    parameters.flash_attn_type = flash_attention(options)
    parameters.kv_unified = True
    parameters.swa_full = True  # otherwise a sequence could not be cut back to a common prefix
    parameters.no_perf = True
    return parameters
