"""Calibrated merges: moments against torch, the search against its objective in numpy, and ways in and out."""

import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers

import gguflora
from gguflora.calibration.collect import TOKENS, _nystroem, _omega
from gguflora.errors import (
    FormatError,
    GgufloraError,
    HotSwapError,
    MismatchError,
    OutputError,
    QuantizationError,
    UsageError,
)
from gguflora.merging.calibrated import can_calibrate, round_calibrated
from gguflora.merging.moments import RANK, Moments, read_moments, write_moments
from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.types import TYPES, type_named
from support import builders, zoo
from support.cli import run

pytestmark = pytest.mark.llama
ADAPTER = builders.Adapter(seed=1, alpha=0.25)
SEARCHED = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
    "Q1_0",
    "Q2_0",
    "TQ1_0",
    "TQ2_0",
)
NOT_SEARCHED = {"Q6_K", "Q8_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
TEXT = "the cat and the other animals are in the garden under another tree, thinner than ever. " * 12


def problem(kind, n_rows=48, n_in=512, strength=0.05, seed=0):
    """A quantized matrix, a weak delta, and moments with a few strong directions."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((n_rows, n_in), np.float32) * 0.1
    rows = np.empty((n_rows, kind.row_bytes(n_in)), np.uint8)
    kernels.quantize_rows(weights, kind, rows)
    a = random.standard_normal((8, n_in)).astype(np.float32)
    b = (random.standard_normal((n_rows, 8)) * [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.01]).astype(np.float32)
    b *= np.float32(strength * 0.1 / np.sqrt(((b @ a) ** 2).mean()))
    v = (random.standard_normal((RANK, n_in)) * np.geomspace(3, 0.1, RANK)[:, None]).astype(np.float32)
    return rows, kernels.Product(a, b), v, random.uniform(0.1, 1, n_in).astype(np.float32)


def values(rows, kind):
    out = np.empty((len(rows), rows.shape[1] // kind.block_bytes * kind.block_weights), np.float32)
    kernels.dequantize_rows(rows, kind, out)
    return out.astype(np.float64)


def stochastic(rows, kind, delta):
    new = np.empty_like(rows)
    kernels.choose_scales(rows, kind, new, delta)
    kernels.round_stochastic(rows, kind, new, delta, gain=1.0, key=1, first_row=0)
    return new


def test_which_types_are_searched():
    stochastic = {kind.name for kind in TYPES.values() if kind.supports_stochastic}
    assert {kind.name for kind in TYPES.values() if can_calibrate(kind)} == set(SEARCHED) == stochastic - NOT_SEARCHED


@pytest.mark.parametrize("name", SEARCHED)
def test_less_output_error_than_stochastic_rounding_and_the_change_is_kept(name):
    kind = type_named(name)
    rows, delta, v, d = problem(kind)
    done = round_calibrated(rows, kind, delta, v, d, key=3)
    base, wanted = values(rows, kind), delta.b.astype(np.float64) @ delta.a

    def energy(error):  # tr(E H E^T)
        return ((error @ v.T) ** 2).sum() + (error**2 * d).sum()

    noise = energy(values(stochastic(rows, kind, delta), kind) - base - wanted)
    error = values(done.blocks, kind) - base - wanted
    assert energy(error) < (0.45 if name == "Q1_0" else 0.3) * noise
    effect = np.linalg.svd((wanted * np.sqrt((v**2).sum(0) + d)), full_matrices=False)[0][:, :1]
    moved = effect.T @ (values(done.blocks, kind) - base)
    target = effect.T @ wanted
    kept = ((moved @ v.T) @ (target @ v.T).T).item() / ((target @ v.T) ** 2).sum()
    assert kept == pytest.approx(1, abs=0.08)
    assert done.moved / done.wanted == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", SEARCHED)
def test_same_bytes_on_every_instruction_set(name):
    kind = type_named(name)
    rows, delta, v, d = problem(kind, n_in=3 * kind.block_weights)
    wide = np.zeros((kernels.DIRECTIONS, v.shape[1]), np.float32)
    wide[:RANK] = v
    target = np.float32(values(rows, kind) + delta.b @ delta.a)
    u = np.random.default_rng(2).standard_normal((len(rows), kernels.KEPT)).astype(np.float32)
    order = np.arange(len(rows), dtype=np.int32)[::-1].copy()
    found = {}
    for isa in isa_names():
        out = rows.copy()
        moves = kernels.search_codes(rows, kind, out, target, wide, d, u, order, [0, 4, 2, 1, 0.5, 0], isa=isa)
        found[isa] = out.tobytes()
        assert moves > 0
    assert len(set(found.values())) == 1


def test_every_move_lowers_the_objective():
    """With limits of half a step and more no pass can raise tr(E H E^T) + |U^T E|_H^2; numpy computes it in double."""
    kind = type_named("Q4_0")
    rows, delta, v, d = problem(kind, strength=0.5)
    wide = np.zeros((kernels.DIRECTIONS, v.shape[1]), np.float32)
    wide[:RANK] = v
    target = np.float32(values(rows, kind) + delta.b @ delta.a)
    u = np.random.default_rng(2).standard_normal((len(rows), kernels.KEPT)).astype(np.float32)
    order, out, objectives = np.arange(len(rows), dtype=np.int32), rows.copy(), []
    for limit in (4, 0, 2, 1, 0, 0.5):
        error = values(out, kind) - target
        both = np.vstack([error, u.T.astype(np.float64) @ error])
        objectives.append(((both @ v.T) ** 2).sum() + (both**2 * d).sum())
        kernels.search_codes(None, kind, out, target, wide, d, u, order, [limit])
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] < 0.5 * objectives[0]


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "IQ4_NL", "Q3_K", "Q4_K", "Q5_K"])
def test_scales_are_fitted_as_by_least_squares(name):
    """One pass comes as near to each row's target as numpy's least squares over the halves of its blocks allow."""
    kind = type_named(name)
    rows, delta, v, d = problem(kind, n_rows=6, n_in=1024)
    wide = np.zeros((kernels.DIRECTIONS, v.shape[1]), np.float32)
    wide[:RANK] = v
    base, change = values(rows, kind), delta.b.astype(np.float64) @ delta.a
    out, order = rows.copy(), np.arange(len(rows), dtype=np.int32)
    u = np.zeros((len(rows), kernels.KEPT), np.float32)
    kernels.search_codes(None, kind, out, np.float32(base + change), wide, d, u, order, [0])
    root = np.vstack([v.astype(np.float64), np.diag(np.sqrt(d.astype(np.float64)))])
    halves = [0, 2] if name in {"Q4_1", "Q4_K", "Q5_K"} else [108 if name == "Q3_K" else 0]
    for row in range(len(rows)):
        found = np.linalg.norm(root @ (values(out, kind) - base - change)[row])
        directions = []
        for at in halves:  # what one half contributes: without it, and with it
            without = rows[row : row + 1].copy().reshape(-1, kind.block_bytes)
            without[:, at : at + 2] = 0
            part = base[row] - values(without.reshape(1, -1), kind)[0]
            directions += list(np.eye(len(without)).repeat(kind.block_weights, axis=1) * part)
        free = root @ np.transpose(directions)
        best = free @ np.linalg.lstsq(free, root @ change[row], rcond=None)[0] - root @ change[row]
        assert np.linalg.norm(best) < 0.999 * np.linalg.norm(root @ change[row])
        assert found == pytest.approx(np.linalg.norm(best), rel=0.02)


def test_a_delta_of_zero_changes_nothing():
    kind = type_named("Q4_K")
    rows, delta, v, d = problem(kind)
    zero = kernels.Product(delta.a, np.zeros_like(delta.b))
    np.testing.assert_array_equal(round_calibrated(rows, kind, zero, v, d, key=1).blocks, rows)


@pytest.mark.parametrize("name", SEARCHED)
def test_weights_are_finite_or_too_large(name):
    """float16 ends at 65504 and the scales of NVFP4 at 448; only those of MXFP4 reach 2**127."""
    kind = type_named(name)
    rows, delta, v, d = problem(kind)
    for exponent in range(2, 34, 2):
        strong = kernels.Product(delta.a, delta.b * np.float32(10.0**exponent))
        try:
            done = round_calibrated(rows, kind, strong, v, d, key=1)
        except QuantizationError as error:
            assert f"too large for {name}" in str(error)
            assert exponent > 4
        else:
            assert exponent < 16 or name == "MXFP4"
            assert np.isfinite(values(done.blocks, kind)).all()


def test_arrays_of_other_types_are_refused():
    kind = type_named("Q4_0")
    rows, _, v, d = problem(kind)
    wide, u = np.zeros((kernels.DIRECTIONS, v.shape[1]), np.float32), np.zeros((len(rows), kernels.KEPT), np.float32)
    order = np.arange(len(rows), dtype=np.int32)
    target = values(rows, kind).astype(np.float32)
    for bad in ({"order": order.astype(np.float32)}, {"d": d.astype(np.float64)}, {"u": u[:, ::-1]}):
        arguments = {"v": wide, "d": d, "u": u, "order": order} | bad
        with pytest.raises(QuantizationError, match=f"{next(iter(bad))}: expected a C-contiguous"):
            kernels.search_codes(rows, kind, rows.copy(), target, **arguments, limits=[1])


def test_nystroem_is_exact_for_few_directions():
    random = np.random.default_rng(0)
    true = random.standard_normal((20, 200))
    omega = _omega(200).astype(np.float64)
    v = _nystroem(true.T @ (true @ omega), omega)
    np.testing.assert_allclose(v.T @ v, true.T @ true, atol=1e-3 * (true**2).sum() / 200)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Q4_0 model, an adapter, a text, and the moments of a calibrated merge with its output."""
    folder = tmp_path_factory.mktemp("calibrated")
    base, adapter = builders.gguf_model("llama", "wide", "Q4_0"), builders.adapter("llama", ADAPTER, "wide")
    text, moments, merged = folder / "text.txt", folder / "moments.gguf", folder / "merged.gguf"
    text.write_text(TEXT * 3)
    options = {"calibrate": True, "calibration_text": [text], "save_moments": moments, "threads": 1}
    report = gguflora.merge(base, adapter, merged, **options)
    return base, adapter, text, moments, merged, report


def test_moments_are_those_of_torch(files):
    """Of the first layer, whose inputs no adapter changes: the diagonal, and the trace of the directions."""
    base, _, text, moments, *_ = files
    found = read_moments(moments)["blk.0.attn_q.weight"]
    assert read_moments(moments)["blk.0.attn_k.weight"].v.tobytes() == found.v.tobytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model("llama", "wide")).float().eval()
    rows = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}["token_embd.weight"]
    embedding = gguflora.quants.dequantize(np.array(rows.data), rows.tensor_type)
    from gguflora.calibration.observe import windows_of
    from gguflora.runtime.logits import LogitsModel

    with LogitsModel(base, 1) as loaded:
        own, general = windows_of(loaded, text, 128), windows_of(loaded, None, 128)
    own = [own[n * len(own) // 16] for n in range(16)] if len(own) > 16 else own
    count = 32 - len(own)
    windows = [*own, *(general[n * len(general) // count] for n in range(count))]
    x = torch.from_numpy(embedding[np.concatenate(windows)])
    x = model.model.layers[0].input_layernorm(x).double().detach().numpy()
    assert found.counts == [len(x)]
    second = x.T @ x / len(x)
    np.testing.assert_allclose((found.v**2).sum((0, 1)) + found.d[0], np.diag(second), rtol=1e-3, atol=1e-5)
    top = np.linalg.eigvalsh(second)[::-1]
    assert np.linalg.svd(found.v[0])[1][0] ** 2 == pytest.approx(top[0], rel=0.05)


def test_the_report_says_what_was_kept(files):
    *_, report = files
    assert (report.rounding, report.uncalibrated) == ("calibrated", ())
    assert all(0.96 < tensor.retention_h < 1.04 for tensor in report.tensors)
    assert report.total.retention_h == pytest.approx(1, abs=0.015)
    assert not [warning for warning in report.warnings if "noise" in warning]
    assert gguf.GGUFReader(files[4]).fields["gguflora.merged.rounding"].contents() == ["calibrated"]


def test_saved_moments_make_the_same_bytes_everywhere(files, tmp_path):
    base, adapter, _, moments, merged, _ = files
    wanted = merged.read_bytes()
    for threads in (1, 3):
        gguflora.merge(base, adapter, tmp_path / f"{threads}.gguf", moments=moments, threads=threads)
        assert (tmp_path / f"{threads}.gguf").read_bytes() == wanted
    for number in (1, 2):
        gguflora.merge_part(base, adapter, tmp_path / f"{number}.part", number=number, count=2, moments=moments)
    parts = [tmp_path / "1.part", tmp_path / "2.part"]
    report = gguflora.assemble(base, adapter, tmp_path / "parts.gguf", parts, moments=moments)
    assert (tmp_path / "parts.gguf").read_bytes() == wanted
    assert report.total.retention_h == pytest.approx(files[5].total.retention_h)
    gguflora.merge(base, adapter, patch=tmp_path / "patch", moments=moments)
    gguflora.apply_patch(base, tmp_path / "patch", tmp_path / "patched.gguf")
    assert (tmp_path / "patched.gguf").read_bytes() == wanted
    copy = tmp_path / "base.gguf"
    copy.write_bytes(base.read_bytes())
    gguflora.merge(copy, adapter, in_place=True, moments=moments)
    ours, theirs = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (copy, merged))
    assert ours == theirs
    done = run("merge", base, "--lora", adapter, "--moments", moments, "-o", tmp_path / "cli.gguf")
    assert "calibrated: " in done.stdout
    assert (tmp_path / "cli.gguf").read_bytes() == wanted


def test_adapters_that_cannot_be_hot_are_calibrated_on_the_base(tmp_path):
    base = builders.gguf_model("llama", "wide", "Q4_0")
    dora = builders.adapter("llama", builders.Adapter(seed=1, alpha=0.25, options=(("use_dora", True),)), "wide")
    report = gguflora.merge(base, dora, tmp_path / "out.gguf", calibrate=True, threads=1)
    assert any("calibrated on the base alone" in warning for warning in report.warnings)
    assert report.total.retention_h == pytest.approx(1, abs=0.02)


def test_types_that_are_not_searched_are_named(tmp_path):
    base = builders.gguf_model("llama", "wide", "Q4_K_M")
    report = gguflora.merge(base, builders.adapter("llama", ADAPTER, "wide"), tmp_path / "out.gguf", calibrate=True)
    kinds = {tensor.name: tensor.type for tensor in report.tensors}
    assert set(report.uncalibrated) == {name for name, kind in kinds.items() if kind == "Q6_K"}
    assert report.uncalibrated_reasons == dict.fromkeys(report.uncalibrated, "Q6_K is not searched")


def test_every_tensor_that_is_not_calibrated_has_a_reason(files, tmp_path):
    """Moments with gaps, and a tensor whose type changes."""
    base, adapter, _, moments, *_ = files
    found = read_moments(moments)
    lacking = {name: each for name, each in found.items() if name != "blk.0.ffn_up.weight"}
    none = np.zeros_like(found["blk.1.ffn_up.weight"].counts)
    lacking["blk.1.ffn_up.weight"] = replace(found["blk.1.ffn_up.weight"], counts=none)
    write_moments(tmp_path / "gaps.gguf", lacking, force=False)
    types = {"blk.1.attn_q.weight": "q8_0"}
    options = {"moments": tmp_path / "gaps.gguf", "threads": 1}
    report = gguflora.merge(base, adapter, tmp_path / "out.gguf", type=types, **options)
    expected = {
        "blk.0.ffn_up.weight": "the text did not use it",
        "blk.1.ffn_up.weight": "the text did not use it",
        "blk.1.attn_q.weight": "its type changes from Q4_0 to Q8_0",
    }
    assert report.uncalibrated_reasons == report.to_dict()["uncalibrated_reasons"] == expected
    assert {tensor.name for tensor in report.tensors if tensor.retention_h is None} == set(expected)
    done = run("merge", base, "--lora", adapter, "--moments", tmp_path / "gaps.gguf", "-o", tmp_path / "cli.gguf")
    assert "not calibrated, the text did not use it: 2 tensors, blk.0.ffn_up.weight, blk.1.ffn_up" in done.stdout


@pytest.fixture
def no_collection(monkeypatch):
    def collect(*_, **__):
        pytest.fail("the base ran before everything else was checked")

    monkeypatch.setattr("gguflora.calibration.collect.collect_moments", collect)


@pytest.mark.usefixtures("no_collection")
def test_outputs_are_checked_before_the_base_runs(files, tmp_path):
    base, adapter, *_ = files
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"kept")
    for way in ({"out": taken}, {"patch": taken}):
        with pytest.raises(OutputError, match="exists"):
            gguflora.merge(base, adapter, calibrate=True, **way)
    with pytest.raises(OutputError, match="exists"):
        gguflora.merge_part(base, adapter, taken, number=1, count=2, calibrate=True)
    assert taken.read_bytes() == b"kept"
    with pytest.raises(OutputError, match="both the second moments and the merge"):
        gguflora.merge(base, adapter, tmp_path / "o.gguf", calibrate=True, save_moments=tmp_path / "o.gguf")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(OutputError, match=r"text\.txt"):
        gguflora.merge(base, adapter, tmp_path / "o.gguf", calibrate=True, calibration_text=text, save_moments=text)
    assert text.read_text() == TEXT


def test_an_interrupted_collection_leaves_nothing(files, tmp_path, monkeypatch):
    base, adapter, *_ = files

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gguflora.calibration.collect._moments", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gguflora.merge(base, adapter, tmp_path / "o.gguf", calibrate=True, save_moments=tmp_path / "m.gguf")
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gguflora.imatrix(base, tmp_path / "i.gguf", chunks=1, threads=1)
    with pytest.raises(KeyboardInterrupt):
        write_moments(tmp_path / "m.gguf", read_moments(files[3]), force=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["merge(base, adapter, out, calibrate=True)", "imatrix(base, out)"])
def test_without_llama_cpp(call, files, tmp_path):
    code = (
        "import sys; sys.modules['llama_cpp'] = None; import gguflora; base, adapter, out = sys.argv[1:]\n"
        f"try: gguflora.{call}\nexcept gguflora.errors.MissingExtraError as error: print(error)"
    )
    command = [sys.executable, "-P", "-c", code, *files[:2], tmp_path / "out.gguf"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "needs llama-cpp-python" in printed
    assert "gguflora[runtime]" in printed
    assert not list(tmp_path.iterdir())


def test_a_base_that_llama_cpp_cannot_run(files, tmp_path):
    """gguflora can merge into it, but llama.cpp misses a tensor."""
    base, adapter, *_ = files
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base.read_bytes().replace(b"output_norm.weight", b"output_form.weight"))
    with pytest.raises(HotSwapError, match=r"broken\.gguf.*llama\.cpp could not load this model"):
        gguflora.merge(broken, adapter, tmp_path / "o.gguf", calibrate=True, threads=1)
    assert list(tmp_path.iterdir()) == [broken]


def test_inputs_too_large_for_float32(files, tmp_path, monkeypatch):
    base, adapter, *_ = files
    broken = tmp_path / "broken.gguf"
    content = bytearray(base.read_bytes())
    norm = next(t for t in gguf.GGUFReader(base).tensors if t.name == "blk.0.ffn_norm.weight")
    content[norm.data_offset : norm.data_offset + 4] = np.float32(1e22).tobytes()
    broken.write_bytes(content)
    with pytest.raises(HotSwapError, match=r"blk\.0\.ffn_\w+\.weight.*(too large|NaN or infinite)"):
        gguflora.merge(broken, adapter, tmp_path / "o.gguf", calibrate=True, threads=1)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A Q4_0 model with experts, an adapter of the experts alone, and the moments and output of a calibrated merge."""
    folder = tmp_path_factory.mktemp("moe")
    base, adapter = folder / "base.gguf", (folder / "adapter", 0.1)
    gguflora.quantize(zoo.gguf_model("qwen3moe"), base, "Q4_0")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    zoo.peft_model("qwen3moe", target_modules=[], target_parameters=parameters).save_pretrained(folder / "adapter")
    options = {"calibrate": True, "save_moments": folder / "moments.gguf", "threads": 1}
    report = gguflora.merge(base, [adapter], folder / "out.gguf", **options)
    return base, adapter, folder / "moments.gguf", folder / "out.gguf", report


def test_stacks_of_experts_are_calibrated(moe):
    *_, moments, _, report = moe
    found = read_moments(moments)
    assert (
        {tensor.name for tensor in report.tensors}
        == set(found)
        == {f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in ("gate", "up", "down")}
    )
    for part in ("gate", "up", "down"):  # two of four experts see each token
        counts = found[f"blk.0.ffn_{part}_exps.weight"].counts
        assert (len(counts), counts.sum(), counts.min() > 0) == (4, 2 * TOKENS, True)
    assert report.uncalibrated == ()
    assert all(0.9 < tensor.retention_h < 1.1 for tensor in report.tensors)


@pytest.mark.parametrize("change", ["other moments", "no tokens"])
def test_each_expert_is_rounded_by_its_own_moments(change, moe, tmp_path):
    base, adapter, moments, merged, _ = moe
    name, expert, found = "blk.1.ffn_down_exps.weight", 2, read_moments(moments)
    v, d, counts = (values.copy() for values in (found[name].v, found[name].d, found[name].counts))
    if change == "no tokens":
        counts[expert] = 0
    else:
        v[expert], d[expert] = v[expert, :, ::-1], d[expert, ::-1]
    write_moments(tmp_path / "moments.gguf", {**found, name: Moments(v, d, counts)}, force=False)
    report = gguflora.merge(base, [adapter], tmp_path / "out.gguf", moments=tmp_path / "moments.gguf", threads=2)
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (merged, tmp_path / "out.gguf"))
    assert [each for each in before if before[each].data.tobytes() != after[each].data.tobytes()] == [name]
    differ = [old.tobytes() != new.tobytes() for old, new in zip(before[name].data, after[name].data, strict=True)]
    assert differ == [number == expert for number in range(4)]
    reason = {name: "1 of its 4 matrices saw no token of the text"} if change == "no tokens" else {}
    assert report.uncalibrated_reasons == reason


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibration_text": "x"}, UsageError, "need calibrate"),
        ({"save_moments": "x"}, UsageError, "need calibrate"),
        ({"moments": "x", "save_moments": "y"}, UsageError, "collected already"),
        ({"calibrate": True, "rounding": "nearest"}, UsageError, "leave out rounding nearest"),
        ({"calibrate": True, "base_f16": "x"}, UsageError, "leave out base_f16"),
        ({"calibrate": True, "calibration_text": "missing.txt"}, FormatError, "cannot be read"),
        ({"calibrate": True, "outtype": "q8_0"}, QuantizationError, "no changed tensor can be calibrated"),
        ({"moments": "missing.gguf"}, GgufloraError, "missing.gguf"),
    ],
)
def test_bad_input(options, error, message, files, tmp_path):
    base, adapter, *_ = files
    with pytest.raises(error, match=message):
        gguflora.merge(base, adapter, tmp_path / "out.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short(files, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(FormatError, match="tokens, expected at least 128"):
        gguflora.merge(*files[:2], tmp_path / "o.gguf", calibrate=True, calibration_text=tmp_path / "short.txt")
    assert not (tmp_path / "o.gguf").exists()


def test_moments_of_another_model(files, tmp_path):
    other = builders.gguf_model("llama", "small", "Q4_0")
    with pytest.raises(MismatchError, match="collected on another model"):
        gguflora.merge(other, builders.adapter("llama", ADAPTER), tmp_path / "o.gguf", moments=files[3])
    with pytest.raises(GgufloraError, match="holds no second moments"):
        gguflora.merge(*files[:2], tmp_path / "o.gguf", moments=files[0])
