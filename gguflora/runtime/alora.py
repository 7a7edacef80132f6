"""Activated LoRA (aLoRA, https://arxiv.org/abs/2504.12397): an adapter that begins at its invocation tokens.

What precedes them is computed without the adapter, so its keys and values are the base's. An adapter begins where its
invocation tokens occur last in the prompt, and not at all if they do not (``calculate_alora_offsets`` of PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

Starts = Mapping[str, int | None]
"""Where each activated LoRA of a set begins, by its name; None if it does not."""


def start_of(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the invocation tokens occur last."""
    sequence, wanted = np.asarray(tokens, np.int64), np.asarray(invocation, np.int64)
    if not 0 < len(wanted) <= len(sequence):
        return None
    places = np.lib.stride_tricks.sliding_window_view(sequence, len(wanted))
    found = np.flatnonzero((places == wanted).all(axis=1))
    return int(found[-1]) if len(found) else None


def starts_of(tokens: Sequence[int], invocations: Mapping[str, Sequence[int]]) -> dict[str, int | None]:
    """Where each adapter begins in a prompt, given its invocation tokens."""
    return {name: start_of(tokens, invocation) for name, invocation in invocations.items()}


def n_in_common(before: Starts, after: Starts, n_tokens: int) -> int:
    """How many of the first ``n_tokens`` tokens are computed by the same adapters under both."""
    for name in after:
        old, new = (n_tokens if start is None else start for start in (before.get(name), after[name]))
        if old != new:
            n_tokens = min(n_tokens, old, new)
    return n_tokens


def segments(first: int, last: int, starts: Starts) -> Iterator[tuple[int, int, frozenset[str]]]:
    """The tokens ``first`` to ``last`` - 1 cut where an adapter begins: (begin, end, adapters that have begun)."""
    known = {name: start for name, start in starts.items() if start is not None}
    borders = sorted({first, last, *(start for start in known.values() if first < start < last)})
    for set_started, end in pairwise(borders):
        yield set_started, end, frozenset(name for name, start in known.items() if start <= set_started)
