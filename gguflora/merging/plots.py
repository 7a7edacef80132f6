"""Plots of how much of each delta a merge kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import MissingExtraError, OutputError
from gguflora.files.output_rule import save_figure
from gguflora.merging.report import MergeReport

Row = Mapping[str, Any]
"""A tensor of a report: ``name`` and measures."""

_LAYER: Final = re.compile(r"(.*?)blk\.(\d+)\.(.*)")
_NO_LAYER: Final = -1
_LEAST_SPREAD: Final = 0.1
"""Smallest distance from 1 at which retention gets the strongest colour."""


def plot_report(report: MergeReport | Mapping[str, Any], out: Path) -> None:
    """Plot retention, relative size and signal-to-noise ratio of each tensor's delta as heat maps, layers by modules.

    Args:
        report: report of a merge, or its ``to_dict()``, which ``gguflora merge --report`` writes.
        out: the plot to write: PNG, SVG or PDF.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if nothing was measured, or the plot cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (heavy, and only for pictures)
    except ImportError as error:
        raise MissingExtraError("drawing", "matplotlib", "plot") from error
    content = report.to_dict() if isinstance(report, MergeReport) else report
    rows = [row for row in content["tensors"] if row["retention"] is not None]
    if not rows:
        raise OutputError(f"{out}: nothing to draw: no change was measured (a dry run, or adapters without effect)")
    layers, modules = _axes(rows)
    figure = Figure(figsize=(4.5 + 1.1 * len(modules), 1.8 + 0.2 * max(len(layers), 6)), layout="constrained")
    figure.suptitle(
        f"{Path(content['output']).name}: {content['rounding']} rounding, retention {content['total']['retention']:.1%}"
    )
    for axis, (key, title) in zip(figure.subplots(1, 3, sharey=True), _TITLES.items(), strict=True):
        _draw(figure, axis, _heat_map(rows, key, layers, modules), key)
        axis.set_title(title)
        axis.set_xticks(range(len(modules)), modules, rotation=90)
        axis.set_yticks(range(len(layers)), ["-" if layer == _NO_LAYER else str(layer) for layer in layers])
    figure.supylabel("layer")
    save_figure(figure, out, dpi=120)


_TITLES: Final = {
    "retention": "retention (1 is right)",
    "relative_change": "change, % of the weights",
    "snr_db": "signal to noise, dB",
}


def _layer_and_module(name: str) -> tuple[int, str]:
    """Return the layer and the module of a tensor."""
    match = _LAYER.fullmatch(name)
    layer, module = (int(match[2]), match[1] + match[3]) if match else (_NO_LAYER, name)
    return layer, module.removesuffix(".weight")


def _axes(rows: Sequence[Row]) -> tuple[list[int], list[str]]:
    """Return all layers, sorted, and all modules in the order of the first layer."""
    places = [_layer_and_module(row["name"]) for row in rows]
    return sorted({layer for layer, _ in places}), list(dict.fromkeys(module for _, module in sorted(places)))


def _heat_map(rows: Sequence[Row], key: str, layers: list[int], modules: list[str]) -> NDArray[np.float64]:
    """Return a measure as (layers, modules), NaN where there is no tensor or the value is infinite."""
    heat = np.full((len(layers), len(modules)), np.nan)
    for row in rows:
        layer, module = _layer_and_module(row["name"])
        heat[layers.index(layer), modules.index(module)] = row[key] * (100 if key == "relative_change" else 1)
    heat[~np.isfinite(heat)] = np.nan
    return heat


def _draw(figure: Any, axis: Any, heat: NDArray[np.float64], key: str) -> None:  # noqa: ANN401  (matplotlib's)
    options: dict[str, Any] = {"cmap": "viridis"}
    if key == "retention":
        spread = max(_LEAST_SPREAD, float(np.abs(heat - 1)[np.isfinite(heat)].max(initial=0.0)))
        options = {"cmap": "RdBu", "vmin": 1 - spread, "vmax": 1 + spread}
    image = axis.imshow(np.ma.masked_invalid(heat), aspect="auto", interpolation="nearest", **options)
    axis.set_facecolor("lightgrey")
    figure.colorbar(image, ax=axis)
