"""`gguflora.resize` and ``inspect --ranks`` against numpy's SVD of PEFT's deltas."""

import json
import shutil

import numpy as np
import peft
import pytest

import gguflora
from gguflora.errors import AdapterError, UnsupportedAdapterError
from support import builders, zoo
from support.adapters import VARIANTS
from support.asserts import merged_changes
from support.builders import Adapter, Trained
from support.cli import run
from support.oracles.gguf_files import lora_changes, read_metadata, read_tensors
from support.oracles.peft import merged_gguf, peft_model

SPEC = VARIANTS["patterns_rslora"]


def deltas(arch, folder):
    """What PEFT's layers with an adapter add to each module's weight."""
    model = peft_model(builders.hf_model(arch), folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    return {name: layer.get_delta_weight("default").detach().double().numpy() for name, layer in layers.items()}


def best(delta, rank):
    u, s, v = np.linalg.svd(delta)
    return u[:, :rank] * s[:rank] @ v[:rank], float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_peft_directory_becomes_the_best_of_its_rank(rank, tmp_path):
    adapter = builders.adapter("llama", SPEC)
    report = gguflora.resize(adapter, tmp_path / "out", rank=rank)
    old, new = deltas("llama", adapter), deltas("llama", tmp_path / "out")
    assert new.keys() == old.keys()
    for name, delta in old.items():
        expected, error = best(delta, rank)
        np.testing.assert_allclose(new[name], expected, atol=1e-6 * np.abs(delta).max(), err_msg=name)
        weight = name.removeprefix("base_model.model.") + ".weight"
        assert report.errors.get(weight, 0.0) == pytest.approx(error, abs=1e-6)
    assert report.ranks[1] == rank


def test_gguf_lora_needs_no_base(tmp_path):
    gguflora.convert(builders.adapter("qwen2", SPEC), builders.gguf_model("qwen2"), tmp_path / "lora.gguf")
    report = gguflora.resize(tmp_path / "lora.gguf", tmp_path / "out.gguf", rank=2, outtype="f32")
    found = lora_changes(tmp_path / "out.gguf")
    for name, delta in merged_changes("qwen2", SPEC).items():
        expected, error = best(delta, 2)
        assert np.linalg.norm(found[name] - expected) <= 1e-4 * np.linalg.norm(delta)
        assert report.errors.get(name, 0.0) == pytest.approx(error, abs=1e-4)
    assert report.ranks == (2, 2)
    assert read_metadata(tmp_path / "out.gguf")["adapter.lora.alpha"] == 2


def test_energy_chooses_the_rank_of_each_change(tmp_path):
    adapter = builders.adapter("llama", Adapter(rank=8))
    gguflora.resize(adapter, tmp_path / "out", energy=0.9)
    ranks = json.loads((tmp_path / "out/adapter_config.json").read_text())
    for name, delta in deltas("llama", adapter).items():
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        wanted = int(np.searchsorted(np.cumsum(squares), 0.9 * squares.sum())) + 1
        module = name.removeprefix("base_model.model.")
        assert ranks["rank_pattern"].get(module, ranks["r"]) == wanted
        assert ranks["alpha_pattern"].get(module, ranks["lora_alpha"]) == wanted


def test_lower_rank_is_kept_bit_for_bit(tmp_path):
    adapter = builders.adapter("llama", Adapter(rank=4))
    assert gguflora.resize(adapter, tmp_path / "out", rank=16).errors == {}
    for name, delta in deltas("llama", tmp_path / "out").items():
        np.testing.assert_array_equal(delta, deltas("llama", adapter)[name])


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_from_one_form_to_the_other(suffix, tmp_path):
    adapter, base = builders.adapter("llama", Adapter(rank=6)), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    source = adapter if suffix else tmp_path / "lora.gguf"
    gguflora.resize(source, tmp_path / f"out{suffix}", rank=3, base=base)
    out = tmp_path / f"out{suffix}"
    gguflora.convert(out, base, tmp_path / "again.gguf", outtype="f32")
    found = lora_changes(tmp_path / "again.gguf")
    for name, delta in merged_changes("llama", Adapter(rank=6)).items():
        assert np.linalg.norm(found[name] - best(delta, 3)[0]) <= 1e-4 * np.linalg.norm(delta), name


def test_dora_is_approximated_on_its_base(tmp_path):
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"use_dora": True}))
    with pytest.raises(UnsupportedAdapterError, match="give it with --base"):
        gguflora.resize(adapter, tmp_path / "out.gguf", rank=8)
    report = gguflora.resize(adapter, tmp_path / "out.gguf", rank=8, base=builders.gguf_model("llama"))
    assert any("approximated" in warning for warning in report.warnings)
    expected = read_tensors(merged_gguf(builders.hf_model("llama"), adapter))["blk.0.attn_q.weight"]
    change = expected - read_tensors(builders.gguf_model("llama"))["blk.0.attn_q.weight"]
    found = lora_changes(tmp_path / "out.gguf")["blk.0.attn_q.weight"]
    assert np.linalg.norm(found - best(change, 8)[0]) <= 1e-3 * np.linalg.norm(change)


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.9}])
def test_the_error_of_any_method_is_that_of_the_whole_change(options, tmp_path):
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj", "up_proj"), {"use_dora": True}))
    base = builders.gguf_model("llama")
    merged, before = read_tensors(merged_gguf(builders.hf_model("llama"), adapter)), read_tensors(base)
    report = gguflora.resize(adapter, tmp_path / "out.gguf", base=base, outtype="f32", **options)
    squared = lost = 0.0
    for name, found in lora_changes(tmp_path / "out.gguf").items():
        change = merged[name].astype(np.float64) - before[name]
        error = np.linalg.norm(change - found) / np.linalg.norm(change)
        assert report.errors[name] == pytest.approx(error, abs=1e-4)
        assert "rank" in options or error**2 <= 0.1 + 1e-6
        squared, lost = squared + np.linalg.norm(change) ** 2, lost + np.linalg.norm(change - found) ** 2
    assert report.energy == pytest.approx(1 - lost / squared, abs=1e-4)


def test_the_error_counts_the_type_of_the_factors(tmp_path):
    adapter, base = builders.adapter("llama", Adapter(rank=8)), builders.gguf_model("llama")
    report = gguflora.resize(adapter, tmp_path / "out.gguf", rank=8, base=base, outtype="q8_0")
    found = lora_changes(tmp_path / "out.gguf")
    for name, change in merged_changes("llama", Adapter(rank=8)).items():
        error = np.linalg.norm(change - found[name]) / np.linalg.norm(change)
        assert report.errors[name] == pytest.approx(error, abs=2e-4)
        assert error > 1e-3


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gptoss", "llama4"])
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_experts_have_the_rank_that_was_asked_for(name, form, tmp_path):
    """Gate and up projection are one parameter in PEFT and two tensors in GGUF; each form is cut as it is written."""
    stacks = [key for key, values in zoo.model(name).named_parameters() if "experts" in key and values.ndim == 3]
    owners = sorted({key.rpartition(".")[0] for key in stacks})
    targets = [f"{owner}.{parameter}" for owner in owners for parameter in ("gate_up_proj", "down_proj")]
    adapted = zoo.peft_model(name, target_modules=["q_proj", "o_proj"], target_parameters=targets)
    adapted.save_pretrained(tmp_path / "old")
    source, base = tmp_path / "old", zoo.gguf_model(name)
    if form == "gguf":
        source = gguflora.convert(source, base, tmp_path / "old.gguf").output
    report = gguflora.resize(source, tmp_path / "new", rank=2, base=base)
    assert report.ranks == (2, 2)
    old, new = (expert_deltas(name, tmp_path / folder) for folder in ("old", "new"))
    assert old.keys() == new.keys()
    lost = squared = 0.0
    for key, delta in old.items():
        for before, after in zip(delta, new[key], strict=True):
            wanted = best(before, 2)[0]
            assert np.linalg.norm(after - wanted) <= 1e-4 * np.linalg.norm(before), key
            squared, lost = squared + np.linalg.norm(before) ** 2, lost + np.linalg.norm(before - wanted) ** 2
    assert report.relative_error == pytest.approx((lost / squared) ** 0.5, abs=1e-4)


def expert_deltas(name, folder):
    """What PEFT adds to each weight, as a stack of matrices."""
    model = peft.PeftModel.from_pretrained(zoo.model(name), folder)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    deltas = {key: layer.get_delta_weight("default").detach().double().numpy() for key, layer in layers.items()}
    return {key: delta.reshape(-1, *delta.shape[-2:]) for key, delta in deltas.items()}


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}])
def test_bad_options(options, tmp_path):
    with pytest.raises(AdapterError):
        gguflora.resize(builders.adapter("llama", Adapter()), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    result = run("resize", builders.adapter("llama", Adapter()), "--rank", 2, "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ranks"] == [2, 2]
    text = run("resize", builders.adapter("llama", Adapter()), "--energy", 0.5, "-o", tmp_path / "out", "--force")
    assert "model.layers.1.mlp.down_proj.weight: relative error 0." in text.stdout


def test_ranks_and_what_they_keep(tmp_path):
    adapter = builders.adapter("llama", SPEC)
    report = gguflora.inspect(adapter, ranks=True)
    expected = deltas("llama", adapter)
    for spectrum in report.spectra:
        values = np.linalg.svd(expected["base_model.model." + spectrum.name.removesuffix(".weight")], compute_uv=False)
        np.testing.assert_allclose(spectrum.values, values[: spectrum.rank], rtol=1e-4)
        assert spectrum.kind == spectrum.name.split(".")[-2]
    squares = [np.array(spectrum.values) ** 2 for spectrum in report.spectra]
    for choice in (choice for choice in report.ranks if choice.kind == "all"):
        kept = sum(values[: choice.rank].sum() for values in squares) / sum(values.sum() for values in squares)
        assert choice.energy == pytest.approx(kept)
        resized = gguflora.resize(adapter, tmp_path / "out", rank=choice.rank, force=True)
        assert resized.size == choice.size
    assert [choice.rank for choice in report.ranks if choice.kind == "down_proj"] == [1, 2, 4, 8]
    assert (report.ranks[-1].energy, report.ranks[-1].saving) == (1.0, 0.0)
    assert gguflora.inspect(adapter).spectra == ()


def test_ranks_of_a_gguf_lora_and_the_picture(tmp_path):
    gguflora.convert(builders.adapter("llama", SPEC), builders.gguf_model("llama"), tmp_path / "lora.gguf")
    result = run("inspect", tmp_path / "lora.gguf", "--ranks", "--plot", tmp_path / "spectra.png", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {choice["kind"] for choice in report["ranks"]} >= {"all", "attn_q", "ffn_down"}
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert "attn_q " in run("inspect", tmp_path / "lora.gguf", "--ranks").stdout
    missing = run("inspect", tmp_path / "lora.gguf", "--plot", tmp_path / "nowhere/spectra.png")
    assert (missing.returncode, "cannot be written" in missing.stderr) == (1, True)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '{"a": [Infinity]}'])
def test_no_configuration_is_written_that_is_not_json(value, tmp_path):
    """Python reads such numbers and would write them again; other readers of JSON refuse them."""
    shutil.copytree(builders.adapter("llama", Adapter()), tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": json.loads(value)}
    config.write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match=r"base_model_name_or_path is .*expected finite numbers"):
        gguflora.resize(tmp_path / "adapter", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
