"""What batches cost with and without a stack of adapters, learnt from those computed.

A batch takes the time of reading all weights once, and time for each token. With the stack each token takes longer, for
it is multiplied with the rank rows of all adapters; without it, a prompt needs a batch of its own, which reads all
weights once more, and other adapters have to be applied before and after it.
"""

from __future__ import annotations

from typing import Final

_LONG: Final = 16
"""Tokens of a batch from which on its time tells what each token costs."""

_LONG_PROMPT: Final = 48
"""Until both costs are known, so many tokens of one set are computed in a batch of their own."""

_FEW: Final = 4
"""Up to so many tokens a batch's time is that of reading the weights."""

_MEMORY: Final = 0.1
"""How much the newest batch counts."""


class BatchCosts:
    """Costs of the batches of one engine."""

    def __init__(self) -> None:
        self._step: float | None = None
        self._per_token: dict[bool, float] = {}

    def note(self, n_tokens: int, seconds: float, *, stacked: bool) -> None:
        """Learn from a batch: its tokens, its time, and whether the stack was in force."""
        if n_tokens <= _FEW:
            self._step = _mean(self._step, seconds)
        elif n_tokens >= _LONG and self._step is not None:
            rest = max(seconds - self._step, 0.0) / n_tokens
            self._per_token[stacked] = _mean(self._per_token.get(stacked), rest)

    def is_long(self, n_tokens: int) -> bool:
        """Whether a batch of one set has so many tokens that leaving the stack pays at once."""
        return n_tokens >= _LONG

    def is_cheaper_alone(self, n_tokens: int) -> bool:
        """Whether so many tokens of one set, beside tokens of others, are cheaper in a batch of their own."""
        if n_tokens < _LONG:
            return False
        if self._step is None or len(self._per_token) < 2:
            return n_tokens >= _LONG_PROMPT
        return n_tokens * (self._per_token[True] - self._per_token[False]) > 2 * self._step


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _MEMORY * (new - before)
