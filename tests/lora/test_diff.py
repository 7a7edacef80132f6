"""`gguflora.diff` against the dense changes of PEFT."""

import json

import numpy as np
import pytest

import gguflora
from gguflora.errors import MismatchError
from support import builders
from support.adapters import deltas_by_peft
from support.builders import Adapter
from support.cli import run

A = Adapter(targets=("q_proj", "down_proj", "embed_tokens"), rank=4, alpha=8, seed=1)
B = Adapter(targets=("q_proj", "embed_tokens", "up_proj"), rank=6, alpha=3, seed=2)


def spaces(delta, rank):
    u, _, vt = np.linalg.svd(delta)
    return u[:, :rank], vt[:rank].T


def overlap(one, other):
    """Mean squared cosine of the principal angles."""
    return float((np.linalg.svd(one.T @ other, compute_uv=False) ** 2).mean())


def test_equals_the_dense_changes():
    one, other = builders.adapter("llama", A), builders.adapter("llama", B)
    report, a, b = gguflora.diff(one, other), deltas_by_peft(one), deltas_by_peft(other)
    assert {change.name for change in report.changes} == {f"{name}.weight" for name in a.keys() & b.keys()}
    for change in report.changes:
        x, y = a[change.name.removesuffix(".weight")], b[change.name.removesuffix(".weight")]
        x, y = x.astype(np.float64), y.astype(np.float64)
        norms = np.linalg.norm(x), np.linalg.norm(y)
        assert change.norms == pytest.approx(norms, rel=1e-5)
        assert change.cosine == pytest.approx((x * y).sum() / (norms[0] * norms[1]), abs=1e-6)
        assert change.difference == pytest.approx(np.linalg.norm(y - x) / norms[0], rel=1e-5)
        (out_x, in_x), (out_y, in_y) = spaces(x, 4), spaces(y, 6)
        assert change.overlap_out == pytest.approx(overlap(out_x, out_y), abs=1e-5)
        assert change.overlap_in == pytest.approx(overlap(in_x, in_y), abs=1e-5)
    flat = [np.concatenate([d.get(n, 0 * o).ravel() for n, o in {**a, **b}.items()]) for d in (a, b)]
    assert report.cosine == pytest.approx(
        flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]), abs=1e-5
    )
    assert report.norm_ratio == pytest.approx(np.linalg.norm(flat[1]) / np.linalg.norm(flat[0]), rel=1e-5)
    assert report.only_a.keys() == {f"{name}.weight" for name in a.keys() - b.keys()}
    for name, norm in report.only_b.items():
        assert norm == pytest.approx(np.linalg.norm(b[name.removesuffix(".weight")]), rel=1e-5)


def test_an_adapter_and_its_conversion_are_the_same(tmp_path):
    spec = Adapter(options=(("use_rslora", True),))
    adapter, base = builders.adapter("llama", spec), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    report = gguflora.diff(adapter, tmp_path / "lora.gguf", base=base)
    assert report.cosine == pytest.approx(1, abs=1e-9)
    assert all(change.overlap_in == pytest.approx(1) and change.difference < 1e-6 for change in report.changes)
    assert (len(report.changes), report.only_a, report.only_b) == (14, {}, {})
    gguflora.combine([(tmp_path / "lora.gguf", -3.0)], tmp_path / "minus.gguf")
    report = gguflora.diff(tmp_path / "lora.gguf", tmp_path / "minus.gguf")
    assert (report.cosine, report.norm_ratio) == (pytest.approx(-1), pytest.approx(3))


def test_zero_change():
    fresh = builders.adapter("llama", Adapter(rank=4))
    report = gguflora.diff(fresh, fresh)
    assert report.cosine == pytest.approx(1)


def test_different_bases_and_forms(tmp_path):
    adapter = builders.adapter("llama", Adapter())
    gguflora.convert(adapter, builders.gguf_model("llama"), tmp_path / "lora.gguf")
    with pytest.raises(MismatchError, match="give their base model with --base"):
        gguflora.diff(adapter, tmp_path / "lora.gguf")
    with pytest.raises(MismatchError, match="different bases"):
        gguflora.diff(adapter, builders.adapter("qwen2", Adapter()))


def test_command_line():
    result = run("diff", builders.adapter("llama", A), builders.adapter("llama", B), "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["changes"]) == 3
    text = run("diff", builders.adapter("llama", A), builders.adapter("llama", B)).stdout
    assert "2 only in A, 2 only in B" in text
    assert "only in B: model.layers.1.mlp.up_proj.weight" in text
