"""What `gguflora.compare` reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the tokens of a text, and its standard error; 1.96 of them to each side are a 95 % interval."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """The distance of a model's predictions from those of the hot adapters.

    Attributes:
        kl: mean Kullback-Leibler divergence in nats per token.
        error: standard error of the mean.
        top_agreement: share of the positions where both models have the same most likely token.
    """

    kl: float
    error: float
    top_agreement: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second while reading a prompt and while generating an answer."""

    prompt: float
    generation: float


@dataclass(frozen=True, slots=True)
class TextComparison:
    """What the models make of one text.

    Attributes:
        text: the file that was evaluated, or "built-in text".
        positions: number of predicted tokens.
        divergences: divergence from the hot adapters, by model.
        perplexities: perplexity on the text, by model.
        kept: share of the hot adapters' gain in loss over the base that a model keeps, by model. Empty where the hot
            adapters do not lower the loss by more than two standard errors.
        perplexity_ratios: perplexity over that of the hot adapters, by model.
    """

    text: str
    positions: int
    divergences: dict[str, Divergence]
    perplexities: dict[str, float]
    kept: dict[str, Estimate]
    perplexity_ratios: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class CompareReport:
    """What `compare` found.

    Models are called "base", "hot" (the base with hot adapters) and "merged"; where several merged files were given,
    they have their files' names. "naive" or "nearest", "adaptive" and "calibrated" are merges that `compare` made.

    Attributes:
        base: path of the base file.
        merged: path of the first merged file; None if there is none.
        files: path of each merged file, by model.
        adapters: path and scale of each adapter.
        text: the first text.
        positions: number of its predicted tokens.
        n_ctx: number of tokens in each window of a text.
        divergences: divergence from the hot adapters on the first text, by model.
        perplexities: perplexity on the first text, by model.
        texts: the same and more for every text; the built-in text is the last.
        speeds: speed of the hot adapters and of the merged files.
        warnings: messages for the user.
    """

    base: Path
    merged: Path | None
    files: dict[str, Path]
    adapters: tuple[tuple[str, float], ...]
    text: str
    positions: int
    n_ctx: int
    divergences: dict[str, Divergence]
    perplexities: dict[str, float]
    texts: tuple[TextComparison, ...]
    speeds: dict[str, Speed]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {
            **asdict(self),
            "base": str(self.base),
            "merged": None if self.merged is None else str(self.merged),
            "files": {name: str(path) for name, path in self.files.items()},
        }
