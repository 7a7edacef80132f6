"""Plots of an adapter's singular values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguflora.errors import MissingExtraError
from gguflora.files.output_rule import save_figure
from gguflora.lora.spectra import Spectrum


def plot_spectra(spectra: Sequence[Spectrum], title: str, out: Path) -> None:
    """Plot the singular values of each delta, with a panel for each kind of module.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if the plot cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (heavy, and only for pictures)
    except ImportError as error:
        raise MissingExtraError("drawing", "matplotlib", "plot") from error
    kinds = list(dict.fromkeys(spectrum.kind for spectrum in spectra))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(f"Singular values of {title}")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for kind, axis in zip(kinds, axes, strict=False):
        for spectrum in spectra:
            shown = [value for value in spectrum.values if value > 0]
            if spectrum.kind == kind and shown:
                axis.semilogy(range(1, len(shown) + 1), shown, color="tab:blue", alpha=0.4, linewidth=1)
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    for axis in axes[len(kinds) :]:
        axis.remove()
    for axis in axes[len(kinds) - columns : len(kinds)]:  # the lowest panel of each column
        axis.tick_params(labelbottom=True)
    figure.supxlabel("number")
    figure.supylabel("singular value")
    save_figure(figure, out)
