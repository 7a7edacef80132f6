"""The slots of a context: tokens in its KV cache, and chunks of tokens to decode at their ends."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gguflora.engine.adapter_sets import AdapterSet, Identity
from gguflora.engine.registry import AdapterPhase, Embeddings
from gguflora.placement.prefix import Prefix

Key: TypeAlias = Hashable
"""What stands at one position of a slot. Equal keys after equal keys have equal KV cells.

A token; or (token, identity) if an activated LoRA has begun, so that not the adapters of the first token compute it; or
-1 - i for row i of the embeddings that precede the tokens. The first key of a request with a `Request.cache_owner` is
(key, owner)."""


@dataclass(slots=True, eq=False)
class Slot:
    """The KV cells of one sequence of llama.cpp.

    Attributes:
        id: llama.cpp's sequence id.
        identity: identity of the adapter set that computed them, without activated LoRAs; None if nothing is held.
        names: the names and scales of that set, for statistics.
        held: keys of the decoded positions, in order.
        busy: whether a request is using the slot.
        used: time of the last use, in seconds of the monotonic clock.
    """

    id: int
    identity: Identity | None = None
    names: AdapterSet | None = None
    held: list[Key] = field(default_factory=list)
    busy: bool = False
    used: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens to decode at the end of one slot.

    Attributes:
        slot: the slot that they are added to.
        keys: keys of the new positions.
        inputs: tokens, or embeddings (n, n_embd), or keys and values to write into an empty slot.
        phase: the adapters that compute them.
        wants_logits: whether to compute the logits of the last one.
        wants_all_logits: whether to compute the logits of all.
    """

    slot: Slot
    keys: Sequence[Key]
    inputs: Sequence[int] | Embeddings | Prefix
    phase: AdapterPhase
    wants_logits: bool
    wants_all_logits: bool = False

    @property
    def parts(self) -> frozenset[tuple[int, float]]:
        """The LoRAs and scales that compute it: those of equal ones can be applied together by llama.cpp itself."""
        return frozenset((id(part.pointer), part.scale) for part in self.phase.parts)

    @property
    def kind(self) -> type:
        """Chunks of different kinds cannot be decoded in one batch: list, np.ndarray or Prefix."""
        return list if not isinstance(self.inputs, np.ndarray | Prefix) else type(self.inputs)


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """A copy of a slot's content outside of its context.

    Attributes:
        identity: identity of the slot's adapter set.
        held: keys of the positions.
        data: the KV cells, in llama.cpp's format.
    """

    identity: Identity | None
    held: list[Key]
    data: Any


def count_common(a: Sequence[Key], b: Sequence[Key]) -> int:
    """Return the length of the common prefix of two sequences of keys."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
