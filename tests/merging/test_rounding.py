"""What rounding keeps of an adapter, measured on the files themselves; types, imatrix and base_f16 against ggml."""

import dataclasses
import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

import gguflora
from gguflora.merging.report import TensorReport, warnings_of
from support import builders
from support.builders import Adapter
from support.imatrix import write_imatrix
from support.oracles import libggml
from support.oracles.gguf_files import dequantized, lora_changes, read_metadata
from support.oracles.llama_cpp import convert_lora, llama_logits
from support.quantizing_steps import steps_by_gguf
from support.workspace import workspace

SMALL, EXACT = Adapter(seed=4), Adapter(exact=True, seed=3)
SCALE = 0.02
DITHERED = ["Q4_0", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"]


def base_of(outtype):
    return builders.gguf_model("llama", "wide", outtype)


def adapter_of(spec=SMALL):
    return builders.adapter("llama", spec, "wide")


def merged(base, out, scale=SCALE, **options):
    report = gguflora.merge(base, [(adapter_of(), scale)], out, **options)
    return report, {tensor.name: dequantized(tensor) for tensor in gguf.GGUFReader(out).tensors}


def changes_at(scale, spec=SMALL):
    found = lora_changes(convert_lora(adapter_of(spec), builders.hf_model("llama", "wide"), path_of(spec)))
    return {name: change * scale for name, change in found.items()}


def path_of(spec):
    return workspace() / f"oracle-{spec.seed}-{spec.exact}.gguf"


def survival(before, after, changes):
    """Of all tensors together, from dequantized files and PEFT's change."""
    moved = sum(((after[name] - before[name].astype(np.float64)) * change).sum() for name, change in changes.items())
    return moved / sum((change**2).sum() for change in changes.values())


def values_of(path):
    return {tensor.name: dequantized(tensor) for tensor in gguf.GGUFReader(path).tensors}


# -- fidelity --


@pytest.mark.parametrize("outtype", DITHERED)
def test_small_changes_survive(outtype, tmp_path):
    """A change of a few hundredths of a step: nearest rounding takes it back, dither keeps it on average."""
    base, changes = base_of(outtype), changes_at(SCALE)
    before = values_of(base)
    _, adaptive = merged(base, tmp_path / "adaptive.gguf")
    _, nearest = merged(base, tmp_path / "nearest.gguf", rounding="nearest")
    assert survival(before, adaptive, changes) == pytest.approx(1, abs=0.1)
    if outtype != "Q8_0":
        assert survival(before, nearest, changes) < 0.5


@pytest.mark.parametrize("rounding", ["adaptive", "nearest"])
def test_report_is_what_the_file_holds(rounding, tmp_path):
    base, changes = base_of("Q4_K_M"), changes_at(SCALE)
    report, after = merged(base, tmp_path / "out.gguf", rounding=rounding)
    before = values_of(base)
    assert {tensor.name for tensor in report.tensors} == set(changes)
    for tensor in report.tensors:
        change, old, new = (values[tensor.name].astype(np.float64) for values in (changes, before, after))
        assert tensor.sv == pytest.approx(((new - old) * change).sum() / (change**2).sum(), rel=1e-3)
        assert tensor.relative_change == pytest.approx(np.linalg.norm(change) / np.linalg.norm(old), rel=1e-3)
        noise = ((new - old - change) ** 2).sum()
        assert tensor.snr_db == pytest.approx(10 * np.log10((change**2).sum() / noise), abs=0.01)
        assert tensor.weights == change.size
    assert report.total.sv == pytest.approx(survival(before, after, changes), rel=1e-3)


def test_warns_where_the_adapter_is_lost(tmp_path):
    lost, _ = merged(base_of("Q4_K_M"), tmp_path / "nearest.gguf", rounding="nearest")
    kept, _ = merged(base_of("Q4_K_M"), tmp_path / "adaptive.gguf")
    assert any("--rounding adaptive" in warning for warning in lost.warnings)
    assert kept.warnings == ()


@pytest.mark.parametrize("kind", ["iq3_s", "iq2_s"])
def test_types_on_grids_keep_the_adapter(tmp_path, kind):
    gguflora.merge(base_of("Q4_K_M"), adapter_of(), tmp_path / "base.gguf", outtype=kind)
    kept, lost = (
        gguflora.merge(tmp_path / "base.gguf", [(adapter_of(), SCALE)], tmp_path / "out.gguf", rounding=how, force=True)
        for how in ("adaptive", "nearest")
    )
    assert abs(lost.total.sv - 1) > 0.3
    assert "--rounding adaptive" in lost.warnings[-1]
    assert abs(kept.total.sv - 1) < 0.03 + 3 * kept.total.sv_error


def test_warns_where_the_noise_is_a_hundredfold(tmp_path):
    kept, _ = merged(base_of("Q4_K_M"), tmp_path / "out.gguf")
    drowned = gguflora.merge(base_of("Q4_K_M"), [(adapter_of(), SCALE / 100)], tmp_path / "out.gguf", force=True)
    assert drowned.total.snr_db < -20 < kept.total.snr_db
    assert "too small for the types" in drowned.warnings[-1]


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_no_infinite_weights_where_single_scales_overflow(name, tmp_path):
    """At some scale only a few blocks overflow, and the delta as a whole is reached."""
    failed = False
    for exponent in range(6, 13):
        try:
            gguflora.merge(base_of(name), [(adapter_of(), 10.0**exponent)], tmp_path / "out.gguf", force=True)
        except gguflora.GgufloraError as error:
            assert f"too large for {name}" in str(error)
            failed = True
        else:
            for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
                assert np.isfinite(gguflora.quants.dequantize(np.array(tensor.data), tensor.tensor_type)).all()
    assert failed


def test_change_that_no_grid_holds(tmp_path):
    with pytest.raises(gguflora.GgufloraError, match="too large for"):
        merged(base_of("Q4_K_M"), tmp_path / "out.gguf", 1e30)
    assert list(tmp_path.iterdir()) == []


def test_kept_logits(tmp_path):
    """The merged file answers as the hot adapter does, several times nearer than with nearest rounding."""
    base = base_of("Q4_0")
    gguflora.convert(adapter_of(), base, tmp_path / "lora.gguf", scale=SCALE * 3)
    for rounding in ("adaptive", "nearest"):
        merged(base, tmp_path / f"{rounding}.gguf", SCALE * 3, rounding=rounding)
    cold, hot = llama_logits(base), llama_logits(base, tmp_path / "lora.gguf")
    along = {
        rounding: ((llama_logits(tmp_path / f"{rounding}.gguf") - cold) * (hot - cold)).sum()
        / ((hot - cold) ** 2).sum()
        for rounding in ("adaptive", "nearest")
    }
    assert along["nearest"] < 0.5
    assert along["adaptive"] == pytest.approx(1, abs=0.4)


# -- the same bytes --


def test_seed_decides(tmp_path):
    base, bytes_of = base_of("Q4_K_M"), {}
    for name, seed in {"one": 0, "again": 0, "other": 7}.items():
        merged(base, tmp_path / f"{name}.gguf", seed=seed)
        bytes_of[name] = (tmp_path / f"{name}.gguf").read_bytes()
    assert bytes_of["one"] == bytes_of["again"]
    assert bytes_of["one"] != bytes_of["other"]
    added = {key: value for key, value in read_metadata(tmp_path / "other.gguf").items() if "merged" in key}
    assert [7] in added.values()
    assert ["adaptive"] in added.values()


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_isa_and_number_of_threads(isa, tmp_path):
    merged(base_of("Q5_K_M"), tmp_path / "here.gguf", threads=2)
    program = f"import gguflora; gguflora.merge({str(base_of('Q5_K_M'))!r}, [({str(adapter_of())!r}, {SCALE})], "
    program += f"{str(tmp_path / 'there.gguf')!r}, threads=3)"
    command, environment = [sys.executable, "-P", "-c", program], {**os.environ, "GGUFLORA_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "not available" in result.stderr:
        pytest.skip(f"no {isa} here")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here.gguf").read_bytes() == (tmp_path / "there.gguf").read_bytes()


def test_second_merge_draws_other_numbers(tmp_path):
    """With the numbers of the first one, the same weights would be moved again."""
    base, changes = base_of("Q4_0"), changes_at(SCALE)
    merged(base, tmp_path / "one.gguf")
    _, twice = merged(tmp_path / "one.gguf", tmp_path / "two.gguf")
    assert survival(values_of(base), twice, changes) == pytest.approx(2, abs=0.2)


# -- types, imatrix, base_f16 --


@pytest.mark.parametrize("outtype", ["f16", "bf16", "f32", "q8_0", "q5_0", "q6_k"])
def test_outtype_of_changed_tensors(outtype, tmp_path):
    base, changes = base_of("Q4_K_M"), changes_at(1.0, EXACT)
    gguflora.merge(base, adapter_of(EXACT), tmp_path / "out.gguf", outtype=outtype)
    for old, new in zip(gguf.GGUFReader(base).tensors, gguf.GGUFReader(tmp_path / "out.gguf").tensors, strict=True):
        if old.name not in changes:
            assert new.tensor_type == old.tensor_type
            np.testing.assert_array_equal(new.data, old.data)
            continue
        assert new.tensor_type.name == outtype.upper()
        if new.tensor_type == old.tensor_type:
            continue  # rounded with dither
        wanted = dequantized(old) + changes[old.name].astype(np.float32)
        expected = wanted if outtype == "f32" else libggml.quantize(wanted, int(new.tensor_type))
        np.testing.assert_array_equal(
            new.data.view(np.uint8), expected.view(np.uint8).reshape(new.data.view(np.uint8).shape)
        )
    assert np.isfinite(llama_logits(tmp_path / "out.gguf")).all()


def test_types_by_pattern(tmp_path):
    base = base_of("Q4_K_M")
    types = {"blk.0.*_q.weight": "q8_0", r"ffn_(up|down)": "F16", "nothing*": "f32"}
    report = gguflora.merge(base, adapter_of(), tmp_path / "out.gguf", outtype="q5_k", type=types)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == Type.Q8_0
    assert kinds["blk.1.attn_q.weight"] == Type.Q5_K
    assert kinds["blk.1.ffn_down.weight"] == Type.F16
    assert any("nothing*" in warning for warning in report.warnings)
    assert report.types == {"F16": 4, "Q5_K": 9, "Q8_0": 1}


def test_type_whose_blocks_do_not_fit(tmp_path):
    """The type falls back as llama-quantize's does, and the report says so."""
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", SMALL)
    fallen = gguflora.merge(base, adapter, tmp_path / "o.gguf", outtype="q4_k")
    assert set(fallen.types) == {"Q5_0"}
    assert any("Q4_K" in warning and "Q5_0" in warning for warning in fallen.warnings)
    (tmp_path / "o.gguf").unlink()
    with pytest.raises(gguflora.GgufloraError, match="unknown quant type"):
        gguflora.merge(
            builders.gguf_model("llama"), builders.adapter("llama", SMALL), tmp_path / "o.gguf", outtype="q4"
        )
    assert list(tmp_path.iterdir()) == []


def test_imatrix_weighs_the_search(tmp_path):
    base, changes = base_of("Q4_K_M"), changes_at(1.0, EXACT)
    random = np.random.default_rng(5)
    sums = {name: random.chisquare(1, (1, change.shape[1])).astype(np.float32) for name, change in changes.items()}
    write_imatrix(tmp_path / "imatrix.gguf", {name: (values, [1]) for name, values in sums.items()})
    options = {"imatrix": tmp_path / "imatrix.gguf", "rounding": "nearest"}
    gguflora.merge(base, adapter_of(EXACT), tmp_path / "out.gguf", **options)
    for old, new in zip(gguf.GGUFReader(base).tensors, gguf.GGUFReader(tmp_path / "out.gguf").tensors, strict=True):
        if old.name in changes:
            wanted = dequantized(old) + changes[old.name].astype(np.float32)
            expected = libggml.quantize(wanted, int(old.tensor_type), sums[old.name][0])
            np.testing.assert_array_equal(new.data, expected.reshape(new.data.shape), err_msg=old.name)


@pytest.mark.parametrize("source", ["gguf", "directory"])
def test_base_f16_is_the_gold_standard(source, tmp_path):
    base, changes = base_of("Q4_K_M"), changes_at(1.0, EXACT)
    precise = base_of("F32") if source == "gguf" else builders.hf_model("llama", "wide")
    gguflora.merge(base, adapter_of(EXACT), tmp_path / "out.gguf", base_f16=precise)
    weights = values_of(base_of("F32"))
    for old, new in zip(gguf.GGUFReader(base).tensors, gguf.GGUFReader(tmp_path / "out.gguf").tensors, strict=True):
        if old.name in changes:
            wanted = weights[old.name] + changes[old.name].astype(np.float32)
            np.testing.assert_array_equal(new.data, libggml.quantize(wanted, int(old.tensor_type)), err_msg=old.name)
        else:
            np.testing.assert_array_equal(new.data, old.data)


# -- command line --


def test_command_line(tmp_path):
    arguments = ["merge", base_of("Q4_K_M"), "--lora-scaled", f"{adapter_of()}:{SCALE}", "-o", tmp_path / "out.gguf"]
    options = ["--type", "*attn_v.weight=q8_0", "--seed", "3", "--report", tmp_path / "report.json", "--json"]
    command = [sys.executable, "-P", "-m", "gguflora", *map(str, (*arguments, *options))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert printed["seed"] == 3
    assert {tensor["name"]: tensor["type"] for tensor in printed["tensors"]}["blk.0.attn_v.weight"] == "Q8_0"
    assert printed["total"]["sv"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("options", [{"rounding": "up"}, {"seed": -1}, {"imatrix": "none.dat"}, {"base_f16": "none"}])
def test_wrong_options(options, tmp_path):
    with pytest.raises(gguflora.GgufloraError):
        gguflora.merge(base_of("Q8_0"), adapter_of(), tmp_path / "out.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_plan_is_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = gguflora.plan_merge(base_of("Q4_K_M"), adapter_of(), outtype="q8_0")
    report = gguflora.merge(base_of("Q4_K_M"), adapter_of(), "out.gguf", outtype="q8_0")
    assert plan.dry_run
    assert [(t.name, t.type, t.weights) for t in plan.tensors] == [(t.name, t.type, t.weights) for t in report.tensors]
    assert plan.size == report.size == (tmp_path / "out.gguf").stat().st_size


def test_type_that_needs_an_imatrix_takes_weak_changes_without_one(tmp_path):
    sums = {name: np.ones((1, change.shape[1]), np.float32) for name, change in changes_at(SCALE).items()}
    write_imatrix(tmp_path / "imatrix.gguf", {name: (values, [1]) for name, values in sums.items()})
    options = {"outtype": "iq2_xxs", "imatrix": tmp_path / "imatrix.gguf"}
    gguflora.merge(base_of("Q4_K_M"), adapter_of(), tmp_path / "base.gguf", **options)
    source, merge = [(adapter_of(), SCALE)], gguflora.merge
    report = merge(tmp_path / "base.gguf", source, tmp_path / "out.gguf")
    assert abs(report.total.sv - 1) < 0.03 + 3 * report.total.sv_error
    for refused in ({"rounding": "nearest"}, {"base_f16": base_of("Q4_K_M")}):
        with pytest.raises(gguflora.GgufloraError, match="importance matrix"):
            merge(tmp_path / "base.gguf", source, tmp_path / "other.gguf", **refused)


@pytest.mark.parametrize(
    ("noise", "mode", "words"),
    [
        (
            0.0268,
            "adaptive",
            "2.7% of the weights' norm: in SmolLM2-135M such noise moved the answers by about 0.07 nats",
        ),
        (0.0268, "adaptive", "perplexity by about 5 %, at most 2.6 times that; use --calibrate"),
        (0.09, "adaptive", "9.0% of the weights' norm, more than in any merge of a real model that was measured; use"),
        (0.0268, "nearest", "has 8 times the norm of the change; use --calibrate"),
    ],
)
def test_the_warning_says_what_noise_does(noise, mode, words):
    measures = {"retention": 1.0, "relative_change": 0.0035, "snr_db": -17.6, "retention_error": 0.01}
    tensor = TensorReport("blk.0.ffn_up.weight", "Q4_1", 884736, **measures, delta_per_step=0.009, relative_noise=noise)
    (warning,) = warnings_of([tensor], tensor, mode)
    assert words in warning
    assert "1 of 1 tensors change by less than 2% of a step on average" in warning
    assert not warnings_of([tensor], dataclasses.replace(tensor, retention_h=0.99), mode)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_the_report_tells_the_change_in_steps(kind, tmp_path):
    """The steps are the least distances of weights in a group, as gguf-py reads them."""
    preset = {"Q4_K": "Q4_K_S"}.get(kind, kind)
    base, adapter = (
        builders.gguf_model("llama", "wide", preset),
        builders.adapter("llama", builders.Adapter(seed=1), "wide"),
    )
    report = gguflora.merge(base, [(adapter, 0.05)], tmp_path / "out.gguf")
    tensor = next(tensor for tensor in report.tensors if tensor.name == "blk.0.ffn_up.weight")
    assert tensor.type == kind
    step = steps_by_gguf(base, tensor.name)
    values = load_file(adapter / "adapter_model.safetensors")
    a, b = (next(v for k, v in values.items() if f"layers.0.mlp.up_proj.lora_{part}" in k) for part in "AB")
    expected = np.abs(0.05 * 2 * (b @ a)).mean() / step
    assert tensor.delta_per_step == pytest.approx(expected, rel=0.1)
    share = min(tensor.delta_per_step, 0.5)
    assert tensor.predicted_noise == pytest.approx((12 * share * (1 - share)) ** 0.5)
    dry = gguflora.merge(base, [(adapter, 0.05)], tmp_path / "dry.gguf", dry_run=True)
    assert dry.total.delta_per_step == pytest.approx(report.total.delta_per_step)
    for each in (tensor, report.total):
        measured = each.relative_change * 10 ** (-each.snr_db / 20)
        if each.delta_per_step < 0.25:  # weights that change by more are rounded to nearest, with less noise
            assert each.relative_noise == pytest.approx(measured, rel=0.1)
        else:
            assert measured < 1.1 * each.relative_noise
    assert dry.total.relative_noise == pytest.approx(report.total.relative_noise)
