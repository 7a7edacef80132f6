"""The heat maps of a merge report: which numbers they show where, and the picture files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gguflora
from gguflora.errors import MissingExtraError, OutputError
from gguflora.merging import plots

pytest.importorskip("matplotlib")
DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("plots") / "merged.gguf"
    return gguflora.merge(DEMO / "base.gguf", [(DEMO / "shout", 0.25)], out)


def drawn(report, monkeypatch, out):
    """The arrays of the three panels, by title, as matplotlib was given them."""
    shown = {}
    draw = plots._draw
    monkeypatch.setattr(
        plots, "_draw", lambda figure, axis, heat, key: (shown.update({key: heat}), draw(figure, axis, heat, key))
    )
    plots.plot_report(report, out)
    return shown


def test_every_tensor_is_in_its_cell(report, monkeypatch, tmp_path):
    shown = drawn(report, monkeypatch, tmp_path / "out.png")
    modules = ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"]
    assert len(report.tensors) == 28
    for tensor in report.tensors:
        _, layer, module, _ = tensor.name.split(".")
        at = int(layer), modules.index(module)
        assert shown["retention"][at] == tensor.retention
        assert shown["relative_change"][at] == pytest.approx(100 * tensor.relative_change)
        assert shown["snr_db"][at] == tensor.snr_db
    assert all(heat.shape == (4, 7) and np.isfinite(heat).all() for heat in shown.values())


def test_tensors_outside_of_layers_and_gaps(report, monkeypatch, tmp_path):
    content = report.to_dict()
    content["tensors"] = [
        *content["tensors"][:8],
        {**content["tensors"][0], "name": "output.weight", "snr_db": float("inf")},
    ]
    shown = drawn(content, monkeypatch, tmp_path / "out.svg")
    rows = {plots._layer_and_module(tensor["name"])[0] for tensor in content["tensors"]}
    assert shown["retention"].shape[0] == len(rows)
    assert np.isfinite(shown["retention"]).sum() == 9
    assert np.isfinite(shown["snr_db"]).sum() == 8
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()[:600]


def test_nothing_to_draw_and_no_place_for_it(report, tmp_path):
    dry = gguflora.merge(DEMO / "base.gguf", DEMO / "shout", tmp_path / "none.gguf", dry_run=True)
    with pytest.raises(OutputError, match="nothing to draw"):
        plots.plot_report(dry, tmp_path / "out.png")
    with pytest.raises(OutputError, match="cannot be written"):
        plots.plot_report(report, tmp_path / "missing" / "out.png")
    with pytest.raises(OutputError, match="cannot be written"):
        plots.plot_report(report, tmp_path / "out.unknown")


def test_without_matplotlib(report, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gguflora\[plot\]'"):
        plots.plot_report(report, tmp_path / "out.png")


def test_command_line_draws_what_it_reports(tmp_path):
    command = [sys.executable, "-P", "-m", "gguflora", "merge", DEMO / "base.gguf", "--lora", DEMO / "verse"]
    command += ["-o", tmp_path / "out.gguf", "--report", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    plots.plot_report(json.loads((tmp_path / "out.json").read_text()), again)
    assert again.stat().st_size > 10_000


def test_spectra_have_a_panel_for_each_kind(monkeypatch, tmp_path):
    """With the singular values of each of its changes, and numbers below the lowest panel of each column."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, out, **options: (figures.append(figure), save(figure, out, **options))
    )
    report = gguflora.inspect(DEMO / "shout", plot=tmp_path / "spectra.svg")
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert set(panels) == {spectrum.kind for spectrum in report.spectra}
    for kind, axis in panels.items():
        drawn = sorted(tuple(line.get_ydata()) for line in axis.lines)
        assert drawn == sorted(spectrum.values for spectrum in report.spectra if spectrum.kind == kind)
    numbered = [bool(axis.xaxis.get_tick_params()["labelbottom"]) for axis in figures[0].axes]
    assert numbered == [False] * 4 + [True] * 3
