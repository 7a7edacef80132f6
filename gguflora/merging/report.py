"""Reports of a merge: how much of each tensor's delta the rounding kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from gguflora.merging.rounding import Mode, Sums
from gguflora.quants.kernels import SUMS
from gguflora.quants.types import type_named

TOLERANCE: Final = 0.03
WEAK: Final = 0.02
WEAK_SNR_DB: Final = -15.0
"""Real adapters change Q4_K by 0.3 to 2 % of a step; their noise shows in perplexity from about here on."""
NATS: Final = 100.0
PERPLEXITY: Final = 70.0
"""Over ``relative_noise`` squared: the divergence of an adaptive merge's answers from the hot adapter's, in nats a
token, and the rise of perplexity. Medians of 77 to 142 and of 14 to 182 on SmolLM2-135M in Q4_1 and Q5_0, with two
adapters and two texts each (docs/rounding.md).
"""
_MOST_NATS: Final = 0.3
"""Beyond this nothing was measured."""
_FINE: Final = ("Q6_K", "Q8_0")
CALIBRATED_TOLERANCE: Final = 0.2
MIN_SNR_DB: Final = -20.0
"""Below this ratio the rounding noise has a hundred times the energy of the delta. Measured on trained models: at
-19 dB the answers of Q2_K and IQ2_S merges are still much closer to the adapter's than the base's answers are; at
-22 dB those of IQ1_M are not.
"""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """Measures of one changed tensor. They are None in a dry run and if the delta is zero.

    W are the weights of the base, W' those of the output.

    Attributes:
        name: name of the tensor.
        type: quant type in the output.
        weights: number of weights.
        retention: ``<W' - W, delta> / <delta, delta>``, the share of the delta that the output has: 1 is right, 0
            means that the adapter is lost.
        relative_change: ``|delta| / |W|``.
        snr_db: signal-to-noise ratio ``|delta|^2 / |W' - (W + delta)|^2`` in decibels.
        clipped: share of the weights outside of the range of their block's scales.
        retention_h: the share of delta's effect on the outputs that a calibrated W' keeps, in the output directions
            where that effect is largest; None for tensors that are not calibrated.
        delta_per_step: mean of ``|delta|`` in steps of the type, from a sample of rows; None for types without steps,
            for tensors that change their type, and for deltas that are not low-rank.
        predicted_noise: norm of the noise that stochastic rounding adds, in units of the base's own quantization error,
            as ``delta_per_step`` predicts it.
        relative_noise: norm of the same noise over the norm of the weights, as ``relative_change`` is of the delta;
            docs/rounding.md tells what it did to the answers of real models.
        retention_error: standard error of ``retention`` if weights are rounded independently.
    """

    name: str
    type: str
    weights: int
    retention: float | None = None
    relative_change: float | None = None
    snr_db: float | None = None
    clipped: float | None = None
    retention_error: float | None = None
    retention_h: float | None = None
    delta_per_step: float | None = None
    predicted_noise: float | None = None
    relative_noise: float | None = None

    @classmethod
    def from_sums(cls, name: str, type: str, weights: int, sums: Sums) -> TensorReport:
        """Compute the measures from the sums of the kernels, see `gguflora.quants.kernels.SUMS`."""
        weight2, delta2, moved, error2, clipped = (float(sums[SUMS.index(key)]) for key in SUMS)
        if not delta2:
            return cls(name, type, weights, clipped=clipped / weights)
        return cls(
            name,
            type,
            weights,
            retention=moved / delta2,
            relative_change=math.sqrt(delta2 / weight2) if weight2 else math.inf,
            snr_db=10 * math.log10(delta2 / error2) if error2 else math.inf,
            clipped=clipped / weights,
            retention_error=math.sqrt(error2 / weights / delta2),
            retention_h=_retention_h(sums),
        )

    @property
    def is_off(self) -> bool:
        """Whether the retention differs from 1 by more than tolerance and chance explain."""
        if self.retention_h is not None:
            return abs(1 - self.retention_h) > CALIBRATED_TOLERANCE
        return self.retention is not None and abs(1 - self.retention) > TOLERANCE + 2 * (self.retention_error or 0.0)

    @property
    def sv(self) -> float | None:
        """Former name of `retention`, which will be removed in the next release."""
        return self.retention

    @property
    def sv_error(self) -> float | None:
        """Former name of `retention_error`, which will be removed in the next release."""
        return self.retention_error

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON; two of them also under their former names."""
        return {**asdict(self), "sv": self.sv, "sv_error": self.sv_error}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did, or would do with ``dry_run``.

    Attributes:
        output: path of the merged GGUF file or of the patch.
        adapters: name, SHA-256 and scale of each adapter.
        tensors: measures of each changed tensor.
        total: measures of all changed tensors together.
        rounding: ``adaptive`` (stochastic rounding), ``nearest`` or ``calibrated``.
        seed: seed of the stochastic rounding.
        size: size of the merged model in bytes.
        written: size of the written file in bytes: model, patch, or undo file; 0 in a dry run.
        seconds: wall time.
        threads: number of threads used.
        warnings: messages for the user.
        dry_run: True if nothing was written.
        tokenizer: what the adapters' tokenizers and chat templates change in the metadata, one text for each
            difference.
        preset: the preset that the whole file was quantized in, or None.
        uncalibrated: the changed quantized tensors that a calibrated merge rounded, at least in part, as any other
            merge would: their type is not searched or changes, or the text did not use them.
        uncalibrated_reasons: the reason for each of them.
    """

    output: Path
    adapters: tuple[tuple[str, str, float], ...]
    tensors: tuple[TensorReport, ...]
    total: TensorReport
    rounding: str
    seed: int
    size: int
    written: int
    seconds: float
    threads: int
    warnings: tuple[str, ...]
    dry_run: bool
    tokenizer: tuple[str, ...] = ()
    preset: str | None = None
    uncalibrated: tuple[str, ...] = ()
    uncalibrated_reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, int]:
        """Number of changed tensors by the type they were written in."""
        names = [tensor.type for tensor in self.tensors]
        return {name: names.count(name) for name in sorted(set(names))}

    @property
    def weights(self) -> int:
        """Number of weights in the changed tensors."""
        return self.total.weights

    @property
    def weights_per_second(self) -> float:
        """Number of changed weights per second of wall time."""
        return self.weights / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        adapters = [{"name": name, "sha256": sha256, "scale": scale} for name, sha256, scale in self.adapters]
        return {
            **asdict(self),
            "output": str(self.output),
            "adapters": adapters,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "total": self.total.to_dict(),
            "types": self.types,
            "weights": self.weights,
            "weights_per_second": self.weights_per_second,
        }


def _retention_h(sums: Sums) -> float | None:
    moved, wanted = (float(value) for value in sums[len(SUMS) :]) if len(sums) > len(SUMS) else (0.0, 0.0)
    return moved / wanted if wanted else None


def warnings_of(tensors: Sequence[TensorReport], total: TensorReport, rounding: Mode) -> list[str]:
    """Return warnings about the rounding."""
    warnings = (
        _retention_warning(tensors, total, rounding),
        _noise_warning(total) or _weak_warning(tensors, total, rounding),
    )
    return [warning for warning in warnings if warning is not None]


def _noise_warning(total: TensorReport) -> str | None:
    """Warn if the quant types are too coarse for the delta."""
    if total.snr_db is None or total.snr_db >= MIN_SNR_DB or total.retention_h is not None:
        return None
    return (
        "the change is too small for the types of the changed tensors: the rounding noise has "
        f"{10 ** (-total.snr_db / 20):.0f} times its norm, and the answers may be worse than the base's; "
        "try --calibrate, --base-f16, or a finer type with --outtype or --type"
    )


def _weak_warning(tensors: Sequence[TensorReport], total: TensorReport, rounding: Mode) -> str | None:
    """Warn if stochastic rounding adds noise that shows in the answers, and calibration would not."""
    weak = [t for t in tensors if t.retention_h is None and (t.delta_per_step or 1.0) < WEAK and t.type not in _FINE]
    if total.snr_db is None or total.snr_db > WEAK_SNR_DB or total.retention_h is not None or not weak:
        return None
    worst = min(weak, key=lambda tensor: tensor.delta_per_step or 0.0)
    return (
        f"the change is small for its types: {len(weak)} of {len(tensors)} tensors change by less than {WEAK:.0%} of a "
        f"step on average ({worst.name} by {worst.delta_per_step:.1%} of a {worst.type} step), and the rounding noise "
        f"has {10 ** (-total.snr_db / 20):.0f} times the norm of the change{_effect(total, rounding)}; "
        "use --calibrate, --base-f16, Q6_K or the hot adapter"
    )


def _effect(total: TensorReport, rounding: Mode) -> str:
    """Say what noise of stochastic rounding did to the answers of real models."""
    if total.relative_noise is None or rounding != "adaptive":
        return ""
    noise, energy = total.relative_noise, total.relative_noise**2
    if NATS * energy > _MOST_NATS:
        return f" and {noise:.1%} of the weights' norm, more than in any merge of a real model that was measured"
    return (
        f" and {noise:.1%} of the weights' norm: in SmolLM2-135M such noise moved the answers by about "
        f"{NATS * energy:.1g} nats a token and raised perplexity by about {100 * PERPLEXITY * energy:.1g} %, at most "
        "2.6 times that"
    )


def _retention_warning(tensors: Sequence[TensorReport], total: TensorReport, rounding: Mode) -> str | None:
    """Warn if tensors keep too little or too much of their delta."""
    off = [tensor for tensor in tensors if tensor.is_off]
    if not off or total.retention is None:
        return None
    worst = max(off, key=lambda tensor: abs(1 - (tensor.retention or 0.0)))
    return (
        f"{len(off)} of {len(tensors)} tensors do not keep their change: the worst, {worst.name} ({worst.type}), keeps "
        f"{worst.retention:.0%} of it, all tensors together {total.retention:.0%}; {_remedy(worst, rounding)}"
    )


def _remedy(tensor: TensorReport, rounding: Mode) -> str:
    if rounding == "nearest" and type_named(tensor.type).supports_stochastic:
        return "use --rounding adaptive"
    return "try --base-f16, or another type with --outtype or --type"
