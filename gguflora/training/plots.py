"""Loss curves: a picture, and a line of characters for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from gguflora.errors import MissingExtraError
from gguflora.files.output_rule import check_text_target, save_figure
from gguflora.training.report import CurveRow

_BARS = "▁▂▃▄▅▆▇█"


def check_plot(out: Path) -> None:
    """Raise ``MissingExtraError`` if a picture could not be drawn, ``OutputError`` if it could not be written."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415  (heavy, and only for pictures)
    except ImportError as error:
        raise MissingExtraError("drawing", "matplotlib", "plot") from error
    check_text_target(out.absolute(), force=True)


def plot_curve(curve: Sequence[CurveRow], base_valid_loss: float | None, title: str, out: Path) -> None:
    """Draw the training loss, the held-out loss and the learning rate over the steps.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if the picture cannot be written.
    """
    check_plot(out)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    steps = [row["step"] for row in curve]
    axis.plot(steps, [row["loss"] for row in curve], color="tab:blue", alpha=0.5, linewidth=1, label="training")
    held = [(row["step"], row["valid_loss"]) for row in curve if row["valid_loss"] is not None]
    held = [(0, base_valid_loss), *held] if base_valid_loss is not None else held
    if held:
        axis.plot(*zip(*held, strict=True), color="tab:red", marker="o", markersize=3, label="held out, as served")
    axis.set_xlabel("step")
    axis.set_ylabel("nats a learned token")
    axis.grid(alpha=0.3)
    rates = axis.twinx()
    rates.plot(steps, [row["lr"] for row in curve], color="tab:gray", linewidth=1, linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    axis.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    save_figure(figure, out)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A row of bars, each the mean of a stretch of the values."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [round(number * len(values) / width) for number in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[min(7, int(8 * (value - low) / span))] for value in means)
