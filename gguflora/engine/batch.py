"""The arrays of a ``llama_batch``, filled from chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.registry import Embeddings
from gguflora.engine.slots import Chunk, Slot
from gguflora.placement.prefix import Prefix


class Batch:
    """The arrays of a ``llama_batch`` with one sequence per token."""

    def __init__(self, size: int, factors: tuple[int, ...]) -> None:
        """Allocate arrays for ``size`` tokens; ``factors`` are those of `position_factors`."""
        self._factors = np.array(factors, np.int32)[:, None]
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size * len(factors), np.int32)
        self._counts = np.ones(size, np.int32)
        self._ids = np.zeros(size, np.int32)
        self._id_pointers = self._ids.ctypes.data + np.arange(size, dtype=np.uintp) * self._ids.itemsize
        self._wants_logits = np.zeros(size, np.int8)
        self._embeddings: Embeddings | None = None
        self.struct = llama_cpp.llama_batch()
        self._set_pointer("pos", self._positions)
        self._set_pointer("n_seq_id", self._counts)
        self._set_pointer("seq_id", self._id_pointers)
        self._set_pointer("logits", self._wants_logits)

    def fill(self, chunks: Sequence[Chunk]) -> dict[int, Slot]:
        """Write chunks into the arrays; return the slots that get logits, by index of the token in the batch."""
        start, outputs = 0, {}
        self._wants_logits[:] = 0
        for chunk in chunks:
            stop, position = start + len(chunk.keys), len(chunk.slot.held)
            if not isinstance(chunk.inputs, np.ndarray | Prefix):
                self._tokens[start:stop] = chunk.inputs
            self._positions[start:stop] = np.arange(position, position + stop - start)
            self._ids[start:stop] = chunk.slot.id
            if chunk.wants_all_logits:
                self._wants_logits[start:stop] = 1
                outputs.update(dict.fromkeys(range(start, stop), chunk.slot))
            elif chunk.wants_logits:
                self._wants_logits[stop - 1] = 1
                outputs[stop - 1] = chunk.slot
            start = stop
        self.struct.n_tokens = start
        rows = [chunk.inputs for chunk in chunks if isinstance(chunk.inputs, np.ndarray)]
        self._embeddings = np.ascontiguousarray(np.concatenate(rows), np.float32) if rows else None
        if rows:
            self._positions[: start * len(self._factors)] = (self._factors * self._positions[:start]).reshape(-1)
        self._set_pointer("embd", self._embeddings)
        self._set_pointer("token", None if rows else self._tokens)
        return outputs

    @property
    def tokens(self) -> NDArray[np.int32] | None:
        """The batch's tokens; None if it is of embeddings."""
        return None if self._embeddings is not None else self._tokens[: self.struct.n_tokens]

    @property
    def outputs(self) -> NDArray[np.int8]:
        """Which positions get logits."""
        return self._wants_logits[: self.struct.n_tokens]

    def _set_pointer(self, name: str, array: NDArray[Any] | None) -> None:
        kind = dict(llama_cpp.llama_batch._fields_)[name]
        setattr(self.struct, name, None if array is None else ctypes.cast(array.ctypes.data, kind))
