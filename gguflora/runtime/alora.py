"""Activated LoRA (aLoRA, https://arxiv.org/abs/2504.12397): an adapter that begins at its invocation tokens.

The tokens before them are computed without the adapter, so their keys and values are those of the base. An adapter
begins at the last occurrence of its invocation tokens in the prompt, and does not begin if they do not occur
(``calculate_alora_offsets`` in PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

Starts = Mapping[str, int | None]
"""Position of the token at which each activated LoRA begins, by name; None if it does not begin."""


def start_of(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return the position of the last occurrence of ``invocation`` in ``tokens``; None if there is none."""
    sequence, pattern = np.asarray(tokens, np.int64), np.asarray(invocation, np.int64)
    if not 0 < len(pattern) <= len(sequence):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(sequence, len(pattern))
    matches = np.flatnonzero((windows == pattern).all(axis=1))
    return int(matches[-1]) if len(matches) else None


def starts_of(tokens: Sequence[int], invocations: Mapping[str, Sequence[int]]) -> dict[str, int | None]:
    """Return the position at which each adapter begins in a prompt, given the invocation tokens by adapter name."""
    return {name: start_of(tokens, invocation) for name, invocation in invocations.items()}


def n_in_common(before: Starts, after: Starts, n_tokens: int) -> int:
    """Return how many of the first ``n_tokens`` tokens the same adapters compute before and after."""
    for name in after:
        old, new = (n_tokens if start is None else start for start in (before.get(name), after[name]))
        if old != new:
            n_tokens = min(n_tokens, old, new)
    return n_tokens


def segments(start: int, stop: int, starts: Starts) -> Iterator[tuple[int, int, frozenset[str]]]:
    """Cut a range of tokens where an adapter begins; yield (start, stop, adapters that have begun) of each segment."""
    known = {name: at for name, at in starts.items() if at is not None}
    borders = sorted({start, stop, *(at for at in known.values() if start < at < stop)})
    for segment_start, segment_stop in pairwise(borders):
        yield segment_start, segment_stop, frozenset(name for name, at in known.items() if at <= segment_start)
