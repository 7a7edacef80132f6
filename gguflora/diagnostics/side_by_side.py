"""Evaluate texts with several models side by side, a few positions at a time, and time them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.diagnostics.comparison import Divergence, Estimate, Speed, TextComparison
from gguflora.diagnostics.divergence import kl_divergences, log_softmax

if TYPE_CHECKING:
    from gguflora.runtime.logits import LogitsContext

POSITIONS_AT_ONCE: Final = 16
"""Positions that are compared at once; each has a float64 row as long as the vocabulary."""
SPEED_PROMPT, SPEED_ANSWER, SPEED_TURNS = 128, 16, 3
_CLEAR: Final = 2
"""Standard errors by which the hot adapters must lower the loss before the share of it that is kept means anything."""


@dataclass(slots=True)
class Tally:
    """A model's measures at every position of a text: divergence from the hot adapters, agreement, loss."""

    divergences: list[NDArray[np.float64]] = field(default_factory=list)
    agreements: list[NDArray[np.bool_]] = field(default_factory=list)
    losses: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, log_p: NDArray[np.float64], log_q: NDArray[np.float64], targets: Sequence[int]) -> None:
        """Add positions: log-probabilities of the hot adapters and of this model, and the tokens that follow."""
        self.divergences.append(kl_divergences(log_p, log_q))
        self.agreements.append(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
        self.losses.append(-log_q[np.arange(len(targets)), targets])

    def divergence(self) -> Divergence:
        """Return the mean divergence."""
        kl = _mean(np.concatenate(self.divergences))
        return Divergence(kl.value, kl.error, float(np.concatenate(self.agreements).mean()))

    def loss(self) -> NDArray[np.float64]:
        """Return the losses at all positions."""
        return np.concatenate(self.losses)


def summed_up(text: str, tallies: Mapping[str, Tally]) -> TextComparison:
    """Return what tallies of one text come to; "base" and "hot" are among them."""
    order = ["base", "hot", *(name for name in tallies if name not in {"base", "hot"})]
    losses = {name: tallies[name].loss() for name in order}
    hot, base = losses["hot"], losses["base"]
    gain = _mean(base - hot)
    others = [name for name in order if name != "hot"]
    clear = gain.value > _CLEAR * gain.error
    return TextComparison(
        text=text,
        positions=len(hot),
        divergences={name: tallies[name].divergence() for name in others},
        perplexities={name: math.exp(loss.mean()) for name, loss in losses.items()},
        kept={name: _share(base - losses[name], base - hot) for name in others if clear and name != "base"},
        perplexity_ratios={name: _ratio(losses[name] - hot) for name in others},
    )


def _mean(values: NDArray[np.float64]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Estimate:
    """Return the ratio of two means over the same tokens; its error to first order."""
    share = float(part.mean() / whole.mean())
    return Estimate(share, _mean(part - share * whole).error / abs(float(whole.mean())))


def _ratio(differences: NDArray[np.float64]) -> Estimate:
    mean = _mean(differences)
    return Estimate(math.exp(mean.value), math.exp(mean.value) * mean.error)


def windows_of_text(tokens: Sequence[int], first: list[int], n_ctx: int) -> Iterator[list[int]]:
    """Split a text into windows of up to ``n_ctx`` tokens, each starting with the tokens that start a text."""
    step = n_ctx - len(first)
    for start in range(0, len(tokens), step):
        window = [*first, *tokens[start : start + step]]
        if len(window) > 1:
            yield window


def measure(windows: Sequence[list[int]], contexts: Mapping[str, LogitsContext]) -> dict[str, Tally]:
    """Evaluate a text with all models side by side; "hot" is one of them."""
    from gguflora.runtime.logits import POSITIONS  # noqa: PLC0415  (needs llama_cpp)

    tallies = {name: Tally() for name in contexts}
    for window in windows:
        for context in contexts.values():
            context.clear()
        for start in range(0, len(window) - 1, POSITIONS):
            targets = window[start + 1 : start + 1 + POSITIONS]
            inputs = window[start : start + len(targets)]
            logits = {name: context.decode(inputs) for name, context in contexts.items()}
            _add(tallies, logits, targets)
    return tallies


def _add(tallies: Mapping[str, Tally], logits: Mapping[str, NDArray[np.float32]], targets: Sequence[int]) -> None:
    for start in range(0, len(targets), POSITIONS_AT_ONCE):
        block = slice(start, start + POSITIONS_AT_ONCE)
        log_p = log_softmax(logits["hot"][block])
        for name, tally in tallies.items():
            log_q = log_p if name == "hot" else log_softmax(logits[name][block])
            tally.add(log_p, log_q, targets[block])


def speeds_of(contexts: Mapping[str, LogitsContext], tokens: Sequence[int], n_ctx: int) -> dict[str, Speed]:
    """Measure median speeds: read a prompt, then decode token by token. All models decode the same text."""
    answer = min(SPEED_ANSWER, n_ctx // 2)
    prompt = min(SPEED_PROMPT, n_ctx - answer)
    needed = prompt + answer
    run = (list(tokens) * (needed // len(tokens) + 1))[:needed]
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in contexts}
    for _ in range(SPEED_TURNS):
        for name, context in contexts.items():
            timings[name].append(_time(context, run, prompt))
    medians = {name: np.median(turns, axis=0).tolist() for name, turns in timings.items()}
    return {name: Speed(prompt / seconds[0], answer / seconds[1]) for name, seconds in medians.items()}


def _time(context: LogitsContext, tokens: Sequence[int], prompt: int) -> tuple[float, float]:
    """Return the seconds for the prompt and for the tokens after it."""
    context.clear()
    moments = [time.perf_counter()]
    context.decode(tokens[:prompt], only_last=True)
    moments.append(time.perf_counter())
    for token in tokens[prompt:]:
        context.decode([token])
    moments.append(time.perf_counter())
    first, second = (after - before for before, after in pairwise(moments))
    return first, second
