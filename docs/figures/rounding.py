"""Draw docs/figures/rounding.svg: what nearest and stochastic rounding do to a small change of Q4_K weights.

Every point comes from the kernels that a merge uses. ``python docs/figures/rounding.py`` needs the extra ``plot``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gguflora.quants import kernels
from gguflora.quants.types import type_named

SVG: Final = Path(__file__).with_suffix(".svg")
Q4_K: Final = type_named("Q4_K")
SEEDS: Final = 1000
SIZES: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
"""Sizes of the change, root mean square, in steps of the grid."""
SUB_BLOCK: Final = 32
SHOWN: Final = 8
"""Weights of one sub-block that the left half shows."""

Floats = NDArray[np.float32]
Rows = NDArray[np.uint8]


@dataclass(frozen=True)
class Numbers:
    """What the figure shows.

    Attributes:
        base: some weights of one sub-block, in steps of its grid.
        wanted: the same with the change added.
        nearest: what nearest rounding writes.
        mean: the mean of what stochastic rounding writes, over `SEEDS` seeds.
        shares: by weight, how often it writes each level.
        kept_nearest: share of the change that the written weights have, for each of `SIZES`.
        kept_stochastic: the same of stochastic rounding.
        share_of_weights: the change's norm divided by the weights', for each of `SIZES`.
    """

    base: list[float]
    wanted: list[float]
    nearest: list[float]
    mean: list[float]
    shares: list[dict[str, float]]
    kept_nearest: list[float]
    kept_stochastic: list[float]
    share_of_weights: list[float]


def measure() -> Numbers:
    """Run the kernels."""
    return Numbers(**_some_weights(), **_kept())


def _some_weights() -> dict[str, Any]:
    """Some weights of a row, with a change of a quarter of a step."""
    rows, base, change, step = _model(1, 256)
    delta = (change * 0.25 * step).astype(np.float32)
    lowest, own_step = base[0, :SUB_BLOCK].min(), _step_of(base[0, :SUB_BLOCK])

    def in_steps(weights: Floats) -> list[float]:
        return [round(float(value), 3) for value in (weights[0, :SHOWN] - lowest) / own_step]

    drawn = np.stack([_values(_stochastic(rows, delta, seed)[0], base.shape) for seed in range(SEEDS)])
    levels = np.rint((drawn[:, 0, :SHOWN] - lowest) / own_step).astype(int)
    return {
        "base": in_steps(base),
        "wanted": in_steps(base + delta),
        "nearest": in_steps(_values(_nearest(rows, delta)[0], base.shape)),
        "mean": in_steps(drawn.mean(axis=0)),
        "shares": [
            {str(level): round(float((column == level).mean()), 3) for level in np.unique(column)}
            for column in levels.T
        ],
    }


def _kept() -> dict[str, list[float]]:
    rows, base, change, step = _model(512, 4096)
    kept: dict[str, list[float]] = {"kept_nearest": [], "kept_stochastic": [], "share_of_weights": []}
    for size in SIZES:
        delta = (change * size * step).astype(np.float32)
        kept["kept_nearest"].append(_share(_nearest(rows, delta)[1]))
        kept["kept_stochastic"].append(_share(_stochastic(rows, delta, seed=0)[1]))
        kept["share_of_weights"].append(round(float(np.linalg.norm(delta) / np.linalg.norm(base)), 4))
    return kept


def _model(n_rows: int, n_in: int) -> tuple[Rows, Floats, Floats, float]:
    """Q4_K rows of normal weights, what they stand for, a change of rank 8 and size 1, and the median step."""
    rng = np.random.default_rng(20)
    weights = (0.02 * rng.standard_normal((n_rows, n_in))).astype(np.float32)
    rows = np.empty((n_rows, Q4_K.row_bytes(n_in)), np.uint8)
    kernels.quantize_rows(weights, Q4_K, rows)
    base = _values(rows, weights.shape)
    b, a = rng.standard_normal((n_rows, 8)), rng.standard_normal((8, n_in))
    change = sum(np.outer(b[:, term], a[term]) for term in range(8))
    steps = [_step_of(block) for block in base.reshape(-1, SUB_BLOCK)[:1024]]
    return rows, base, (change / np.sqrt((change**2).mean())).astype(np.float32), float(np.median(steps))


def _step_of(sub_block: Floats) -> float:
    """Distance of neighbouring levels: the smallest that occurs."""
    distances = np.diff(np.unique(sub_block))
    return float(distances[distances > 0.5 * np.median(distances)].min())


def _values(rows: Rows, shape: tuple[int, ...]) -> Floats:
    values = np.empty(shape, np.float32)
    kernels.dequantize_rows(rows, Q4_K, values)
    return values


def _nearest(rows: Rows, delta: Floats) -> tuple[Rows, NDArray[np.float64]]:
    new = np.empty_like(rows)
    return new, kernels.merge_rows(rows, Q4_K, new, Q4_K, delta)


def _stochastic(rows: Rows, delta: Floats, seed: int) -> tuple[Rows, NDArray[np.float64]]:
    """Both passes, as gguflora/merging/rounding.py makes them."""
    new = np.empty_like(rows)
    sums, _ = kernels.choose_scales(rows, Q4_K, new, delta)
    reached, wanted = sums.sum(axis=0)
    gain = 1 / float(np.clip(reached / wanted, 0.5, 1))
    return new, kernels.round_stochastic(rows, Q4_K, new, delta, gain=gain, key=seed, first_row=0)


def _share(sums: NDArray[np.float64]) -> float:
    total = dict(zip(kernels.SUMS, sums.sum(axis=0), strict=True))
    return round(float(total["moved"] / total["delta2"]), 4)


def draw(numbers: Numbers, path: Path) -> None:
    """Draw the figure; the numbers go into the file, too."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "rounding", "font.size": 10, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        _draw_weights(left, numbers)
        _draw_kept(right, numbers)
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(asdict(numbers))}
        figure.savefig(path, format="svg", metadata=metadata)


_GREY, _NEAREST, _STOCHASTIC = "#555555", "#c0392b", "#1f6fb2"


def _draw_weights(axes: Axes, numbers: Numbers) -> None:
    x = np.arange(SHOWN)
    low, high = int(min(numbers.base)) - 2, int(max(numbers.base)) + 2
    axes.hlines(range(low, high + 1), -0.6, SHOWN, color="#dddddd", linewidth=0.8, zorder=0)
    axes.hlines(
        numbers.wanted, x - 0.24, x + 0.24, color="black", linewidth=1.8, label="wanted: base + change", zorder=3
    )
    axes.plot(x - 0.16, numbers.nearest, "s", mfc="none", mec=_NEAREST, mew=1.5, ms=8, label="rounded to nearest")
    axes.plot(x, numbers.mean, "x", color="white", mew=1.6, ms=6, zorder=4)
    axes.plot(
        x, numbers.mean, "x", color=_STOCHASTIC, mew=1.6, ms=7, zorder=4, label=f"mean of {SEEDS} stochastic roundings"
    )
    for number, shares in enumerate(numbers.shares):
        for level, share in ((level, share) for level, share in shares.items() if share >= 0.01):
            axes.scatter(number, int(level), s=330 * share, color=_STOCHASTIC, alpha=0.3, linewidths=0)
            axes.annotate(f"{share:.0%}", (number + 0.26, int(level)), va="center", fontsize=8.5, color=_STOCHASTIC)
    axes.scatter([], [], s=150, color=_STOCHASTIC, alpha=0.3, linewidths=0, label="how often each level is written")
    axes.set_title("8 weights of a Q4_K block and a small change", fontsize=10.5)
    axes.set_xlabel("weight")
    axes.set_ylabel("value, in steps of the block's grid")
    axes.set_xticks([])
    axes.set_yticks(range(low, high + 1, 2))
    axes.set_ylim(low + 0.4, high - 0.4)
    axes.set_xlim(-0.6, SHOWN)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)


def _draw_kept(axes: Axes, numbers: Numbers) -> None:
    axes.axhline(100, color="#bbbbbb", linewidth=0.8)
    percent = 100 * np.array([numbers.kept_nearest, numbers.kept_stochastic])
    axes.plot(SIZES, percent[1], "o-", color=_STOCHASTIC, label="rounded stochastically")
    axes.plot(SIZES, percent[0], "s-", color=_NEAREST, label="rounded to nearest")
    for size, share in list(zip(SIZES, numbers.share_of_weights, strict=True))[::2]:
        axes.annotate(f"{share:.1%}", (size, -13), ha="center", fontsize=8.5, color=_GREY)
    axes.set_xscale("log")
    axes.set_ylim(-18, 112)
    axes.set_yticks([0, 20, 40, 60, 80, 100])
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.set_title("how much of a change the written file has", fontsize=10.5)
    axes.set_xlabel("size of the change, in steps\n(grey: as a share of the weights' norm)")
    axes.set_ylabel("change kept, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.12), frameon=False)


if __name__ == "__main__":
    draw(measure(), SVG)
    print(f"wrote {SVG}")
