"""`gguflora.combine` against PEFT's ``add_weighted_adapter``: the same weights and masks give the same changes."""

import json
import re
import shutil
from unittest import mock

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import gguflora
from gguflora.errors import AdapterError, GgufloraError, MismatchError, OutputError, UnsupportedAdapterError
from support import builders, zoo
from support.adapters import deltas_by_peft, lora_layers
from support.asserts import assert_same, assert_same_changes
from support.builders import Adapter, Trained
from support.cli import run
from support.oracles.gguf_files import lora_changes, read_metadata, read_tensors
from support.oracles.llama_cpp import llama_logits
from support.oracles.peft import merged_gguf, peft_logits, peft_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "embed_tokens")
SPECS = (
    Adapter(targets=(*ATTENTION, "gate_proj"), rank=4, alpha=8, seed=1),
    Adapter(targets=(*ATTENTION, "up_proj"), rank=4, alpha=3, seed=2),
    Adapter(targets=("q_proj", "o_proj"), rank=4, alpha=4, seed=3),
)
OTHER_RANKS = (SPECS[0], Adapter(targets=("v_proj", "up_proj"), rank=7, alpha=3, seed=4))
WEIGHTS = (1.3, 0.4, 0.7)
NEGATIVE = (1.3, -0.4, 0.7)
BY_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BY_SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def paths(specs, arch="llama"):
    return [builders.adapter(arch, spec) for spec in specs]


def peft_deltas(adapters, weights, method, arch="llama", masks=None, **options):
    """What `add_weighted_adapter` adds to each module's weight."""
    model = peft_model(builders.hf_model(arch), adapters[0])
    names = ["default"]
    for number, adapter in enumerate(adapters[1:], 1):
        names.append(model.load_adapter(adapter, f"a{number}") and f"a{number}")
    wanted = iter(_draws(model, names, method, masks)) if masks else None
    with mock.patch.object(torch, "bernoulli", lambda _: torch.from_numpy(next(wanted).astype(np.float32))):
        model.base_model.add_weighted_adapter(names, list(weights), "combined", combination_type=method, **options)
    assert wanted is None or next(wanted, None) is None
    with torch.no_grad():
        return {
            key: module.get_delta_weight("combined").numpy() for key, module in lora_layers(model, "combined").items()
        }


def _draws(model, names, method, masks):
    """The masks in the order in which PEFT draws them."""
    every = [key for key, _ in model.named_modules()]
    found = {n: lora_layers(model, n) for n in names}
    for key in (key.removeprefix("base_model.model.") for key in every):
        having = [number for number, n in enumerate(names) if key in found[n]]
        for part in ("delta",) if method.endswith("svd") else ("a", "b"):
            for number in having:
                module = found[names[number]][key]
                yield masks(number, f"{key}.weight", part, _shape(module, names[number], part))


def _shape(module, name, part):
    if part == "delta":
        return tuple(module.get_delta_weight(name).shape)
    if name in module.lora_embedding_A:
        return tuple((module.lora_embedding_A if part == "a" else module.lora_embedding_B)[name].shape)
    return tuple((module.lora_A if part == "a" else module.lora_B)[name].weight.shape)


def mask(adapter, name, part, shape):
    rng = np.random.default_rng([adapter, *f"{name}{part}".encode()])
    return rng.random(shape) < 0.6


def options_of(method, sign):
    prunes = method not in {"linear", "cat", "svd"}
    ours = {"density": 0.6} | ({"sign": sign} if "ties" in method else {}) if prunes else {}
    theirs = {"density": 0.6, "majority_sign_method": sign} if prunes else {}
    return ours, theirs, {"masks": mask} if method.startswith("dare") else {}


@pytest.mark.parametrize("weights", [WEIGHTS, NEGATIVE], ids=["positive", "negative"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", [*BY_FACTORS, "cat"])
def test_methods_on_factors_equal_pefts(method, sign, weights, tmp_path):
    adapters, (ours, theirs, masks) = paths(SPECS), options_of(method, sign)
    gguflora.combine(list(zip(adapters, weights, strict=True)), tmp_path / "out", method=method, **ours, **masks)
    assert_same(deltas_by_peft(tmp_path / "out"), peft_deltas(adapters, weights, method, **theirs, **masks))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", BY_SVD)
def test_methods_with_svd_equal_pefts(method, rank, tmp_path):
    """Adapters of different rank and alpha, with a negative weight."""
    adapters, (ours, theirs, masks) = paths(OTHER_RANKS), options_of(method, "total")
    weighted = list(zip(adapters, NEGATIVE, strict=False))
    report = gguflora.combine(weighted, tmp_path / "out", method=method, rank=rank, **ours, **masks)
    expected = peft_deltas(adapters, NEGATIVE[:2], method, svd_rank=rank, **theirs, **masks)
    assert_same(deltas_by_peft(tmp_path / "out"), expected, 2e-5)
    assert report.ranks[1] == (rank or 7)
    assert set(report.errors) == {f"{name}.weight" for name in expected}


def by_mergekit(deltas, weights, method, density, keep):
    """mergekit 0.1.5's ties, dare_ties and dare_linear of one weight; ``keep`` has DARE's masks."""
    pruned = []
    for delta, drawn in zip(deltas, keep, strict=True):
        largest = np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-int(density * delta.size)]
        kept = delta * (largest if method == "ties" else drawn)
        pruned.append(kept if method == "ties" else kept * np.abs(delta).sum() / np.abs(kept).sum())
    weighted = [weight * delta for weight, delta in zip(weights, pruned, strict=True)]
    if method == "dare_linear":
        return sum(weighted)
    elected = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(delta) == elected for delta in weighted]
    total = sum(delta * mask for delta, mask in zip(weighted, agree, strict=True))
    if method == "dare_ties":
        return total
    divisor = sum(weight * mask for weight, mask in zip(weights, agree, strict=True))
    return total / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.parametrize("weights", [WEIGHTS[:2], NEGATIVE[:2]], ids=["positive", "negative"])
def test_the_convention_of_mergekit(method, weights, tmp_path):
    adapters = paths(OTHER_RANKS)
    masks = {"masks": mask} if method.startswith("dare") else {}
    options = {"ties": "mergekit", "density": 0.6, "rank": 288} | masks
    report = gguflora.combine(list(zip(adapters, weights, strict=True)), tmp_path / "out", method=method, **options)
    assert report.method == f"{method}_svd"
    parts = [deltas_by_peft(adapter) for adapter in adapters]
    for name, found in deltas_by_peft(tmp_path / "out").items():
        having = [number for number in (0, 1) if name in parts[number]]
        deltas = [parts[number][name] for number in having]
        keep = [mask(number, f"{name}.weight", "delta", deltas[0].shape) for number in having]
        wanted = by_mergekit(deltas, [weights[number] for number in having], method, 0.6, keep)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


SAVED = {
    "output and norm": (
        "llama",
        {"modules_to_save": ["lm_head", "norm"]},
        ("lm_head", "model.norm", "model.layers.0.input_layernorm"),
    ),
    "embedding": ("llama", {"modules_to_save": ["embed_tokens"]}, ("model.embed_tokens",)),
    "biases": ("qwen2", {"bias": "all"}, ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")),
}


def saved_by_peft(arch, folder, modules):
    """Weight and bias of modules as PEFT runs them with an adapter."""
    model = peft.PeftModel.from_pretrained(peft_base(arch), folder).merge_and_unload()
    layers = dict(model.named_modules())
    return {
        f"{name}.{kind}": values.detach().double().numpy()
        for name in modules
        for kind, values in layers[name].named_parameters()
    }


def peft_base(arch):
    return transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model(arch))


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("base", [None, "gguf", "directory"])
def test_whole_weights_are_combined_as_their_weighted_sum(kind, base, tmp_path):
    arch, options, modules = SAVED[kind]
    weights = (0.75, 0.25) if base is None else (1.5, -0.4)
    adapters = [
        builders.trained_adapter(arch, Trained(peft.LoraConfig, ("q_proj", "v_proj"), options, seed=seed))
        for seed in (1, 2)
    ]
    given = {None: None, "gguf": builders.gguf_model(arch), "directory": builders.hf_model(arch)}[base]
    report = gguflora.combine(list(zip(adapters, weights, strict=True)), tmp_path / "out", base=given)
    assert any("combined as their weighted sum" in warning for warning in report.warnings)
    before = {
        f"{n}.{k}": v.detach().double().numpy()
        for n, m in peft_base(arch).named_modules()
        if n in modules
        for k, v in m.named_parameters()
    }
    one, two, found = (saved_by_peft(arch, folder, modules) for folder in (*adapters, tmp_path / "out"))
    for name, values in found.items():
        wanted = before[name] + weights[0] * (one[name] - before[name]) + weights[1] * (two[name] - before[name])
        np.testing.assert_allclose(values, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=name)
        if "norm" in name or "bias" in name or "lm_head" in name or "embed" in name:
            assert not np.allclose(one[name], before[name])


def test_whole_weights_need_the_base_unless_the_weights_add_up_to_1(tmp_path):
    arch, options, _ = SAVED["output and norm"]
    saved = builders.trained_adapter(arch, Trained(peft.LoraConfig, ("q_proj", "v_proj"), options, seed=1))
    with pytest.raises(AdapterError, match="give it with --base"):
        gguflora.combine([saved, saved], tmp_path / "out")
    grown = builders.trained_adapter(arch, Trained(peft.LoraConfig, ("q_proj",), {"modules_to_save": ["lm_head"]}))
    grown = shutil.copytree(grown, tmp_path / "grown")
    tensors = load_file(grown / "adapter_model.safetensors")
    tensors |= {name: np.vstack([rows, rows[:2]]) for name, rows in tensors.items() if "lm_head" in name}
    save_file(tensors, grown / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="if it has grown by new tokens"):
        gguflora.combine([(grown, 0.5)], tmp_path / "out", base=builders.gguf_model(arch))
    shutil.rmtree(grown)
    assert not list(tmp_path.iterdir())
    gguflora.combine([saved, paths(SPECS)[0]], tmp_path / "out")


def test_cat_of_different_ranks_is_the_exact_sum(tmp_path):
    adapters = paths(OTHER_RANKS)
    gguflora.combine(list(zip(adapters, NEGATIVE, strict=False)), tmp_path / "out", method="cat")
    found, parts = deltas_by_peft(tmp_path / "out"), [deltas_by_peft(adapter) for adapter in adapters]
    for name, delta in found.items():
        expected = sum(weight * part[name] for weight, part in zip(NEGATIVE, parts, strict=False) if name in part)
        np.testing.assert_allclose(delta, expected, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "ties", "cat", "svd", "ties_svd"])
def test_rslora_is_taken_as_it_acts(method, tmp_path):
    """PEFT copies ``use_rslora`` from the first adapter to the result, whose change then is sqrt(rank) too large."""
    rslora = Adapter(targets=ATTENTION, rank=4, alpha=8, options=(("use_rslora", True),), seed=5)
    plain = Adapter(targets=ATTENTION, rank=4, alpha=3, seed=6)
    ours, theirs, _ = options_of(method, "total")
    rank = 8 if method in {"cat", "svd"} else 4
    size = {"rank": rank} if method.endswith("svd") else {}
    wanted = {}
    for first, adapters in (("rslora", paths((rslora, plain))), ("plain", paths((plain, rslora)))):
        weights = WEIGHTS[:2] if first == "rslora" else WEIGHTS[1::-1]
        weighted = list(zip(adapters, weights, strict=True))
        gguflora.combine(weighted, tmp_path / first, method=method, **ours, **size)
        svd_rank = {"svd_rank": rank} if size else {}
        wanted[first] = peft_deltas(adapters, weights, method, **theirs, **svd_rank)
    assert_same(deltas_by_peft(tmp_path / "plain"), wanted["plain"], 2e-5)
    assert_same(deltas_by_peft(tmp_path / "rslora"), wanted["plain"], 2e-5)
    assert_same(deltas_by_peft(tmp_path / "rslora"), {n: d / rank**0.5 for n, d in wanted["rslora"].items()}, 2e-5)
    if method in {"cat", "svd"}:
        one, two = (deltas_by_peft(path) for path in paths((rslora, plain)))
        total = {name: WEIGHTS[0] * delta + WEIGHTS[1] * two[name] for name, delta in one.items()}
        assert_same(deltas_by_peft(tmp_path / "rslora"), total, 2e-5)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_one_adapter_is_scaled(method, tmp_path):
    adapters = paths(SPECS[:1])
    gguflora.combine([(adapters[0], -0.5)], tmp_path / "out", method=method)
    assert_same(deltas_by_peft(tmp_path / "out"), peft_deltas(adapters, [-0.5], method), 1e-5)


def test_options_hold_for_one_adapter(tmp_path):
    """PEFT ignores the method where there is only one adapter."""
    (adapter,) = paths(SPECS[:1])
    assert gguflora.combine([adapter], tmp_path / "svd", method="svd", rank=2).ranks == (2, 2)
    gguflora.combine([adapter], tmp_path / "pruned", method="magnitude_prune_svd", density=0.1, rank=288)
    whole, pruned = deltas_by_peft(adapter), deltas_by_peft(tmp_path / "pruned")
    for name, delta in whole.items():
        kept = np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-int(0.1 * delta.size)]
        np.testing.assert_allclose(pruned[name], delta * kept, atol=1e-5 * np.abs(delta).max(), err_msg=name)


def test_the_default_is_the_weighted_sum(tmp_path):
    adapters = paths(SPECS[:2])
    report = gguflora.combine(list(zip(adapters, WEIGHTS, strict=False)), tmp_path / "out")
    assert (report.method, report.ranks, report.relative_error) == ("cat", (4, 8), None)
    one, two = (deltas_by_peft(adapter) for adapter in adapters)
    for name, delta in deltas_by_peft(tmp_path / "out").items():
        total = WEIGHTS[0] * one.get(name, 0) + WEIGHTS[1] * two.get(name, 0)
        np.testing.assert_allclose(delta, total, atol=1e-6)


def _changes(adapter):
    """The whole change of an adapter by PEFT's merge, by GGUF tensor."""
    merged, before = (
        read_tensors(path) for path in (merged_gguf(builders.hf_model("llama"), adapter), builders.gguf_model("llama"))
    )
    changes = {name: merged[name].astype(np.float64) - before[name] for name in before}
    return {name: change for name, change in changes.items() if np.abs(change).max() > 1e-6}


METHODS_OF_ANY_RANK = {
    "dora": Trained(peft.LoraConfig, ("q_proj", "up_proj"), {"use_dora": True}),
    "ia3": Trained(peft.IA3Config, ("k_proj", "down_proj"), {"feedforward_modules": ["down_proj"]}),
    "boft": Trained(peft.BOFTConfig, ("q_proj", "v_proj"), {"boft_block_size": 4}),
}


@pytest.mark.parametrize("kind", METHODS_OF_ANY_RANK)
@pytest.mark.parametrize("rank", [2, 8])
def test_the_svd_of_any_sum_is_the_optimum_and_so_is_its_error(kind, rank, tmp_path):
    """Nothing is cut before the sum: the result is the truncated SVD of the whole change."""
    one, two = builders.trained_adapter("llama", METHODS_OF_ANY_RANK[kind]), paths(SPECS)[2]
    options = {"method": "svd", "rank": rank, "base": builders.gguf_model("llama"), "outtype": "f32"}
    report = gguflora.combine([(one, 0.7), (two, -1.0)], tmp_path / "out.gguf", **options)
    one, two, found = _changes(one), _changes(two), lora_changes(tmp_path / "out.gguf")
    lost = squared = 0.0
    for name in one.keys() | two.keys():
        total = 0.7 * one.get(name, 0.0) - two.get(name, 0.0)
        values = np.linalg.svd(total, compute_uv=False)
        best, error = np.linalg.norm(values[rank:]), np.linalg.norm(total - found[name])
        assert error <= best + 1e-4 * np.linalg.norm(total), name
        assert report.errors[name] == pytest.approx(error / np.linalg.norm(total), abs=1e-4)
        lost, squared = lost + error**2, squared + np.linalg.norm(total) ** 2
    assert report.relative_error == pytest.approx((lost / squared) ** 0.5, abs=1e-4)
    assert report.energy == pytest.approx(1 - lost / squared, abs=1e-4)


def test_adapters_that_nearly_cancel(tmp_path):
    one = paths(SPECS)[0]
    two = shutil.copytree(one, tmp_path / "two")
    tensors, rng = load_file(two / "adapter_model.safetensors"), np.random.default_rng(0)
    for name, values in tensors.items():
        tensors[name] = values * (1 + 1e-4 * rng.standard_normal(values.shape)).astype(np.float32)
    save_file(tensors, two / "adapter_model.safetensors")
    gguflora.combine([one, (two, -1.0)], tmp_path / "out", method="svd", rank=3)
    first, second, found = (deltas_in_float64(path) for path in (one, two, tmp_path / "out"))
    for name, delta in found.items():
        total = first[name] - second[name]
        best = np.linalg.norm(np.linalg.svd(total, compute_uv=False)[3:])
        assert np.linalg.norm(total - delta) <= best * (1 + 1e-5), name


def deltas_in_float64(folder):
    """The deltas of an adapter without patterns, or of one that gives each module its rank as alpha."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        name, _, part = key.partition(".lora_")
        if part in {"A.weight", "embedding_A"}:
            b = tensors[f"{name}.lora_{part.replace('A', 'B')}"].astype(np.float64)
            module = name.removeprefix("base_model.model.")
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            found[name] = alpha / rank * b @ a.astype(np.float64)
    return found


def test_adapters_of_different_models(tmp_path):
    other = tmp_path / "gpt2"
    zoo.peft_model("gpt2").save_pretrained(other)
    with pytest.raises(MismatchError, match="models of different architectures"):
        gguflora.combine([paths(SPECS)[0], other], tmp_path / "out")
    with pytest.raises(GgufloraError):
        gguflora.combine(paths(SPECS)[:2], tmp_path / "out", base=zoo.gguf_model("gpt2"))
    for name in ("one", "two"):
        copy = shutil.copytree(paths(SPECS)[0], tmp_path / name)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": f"org/{name}"}))
    (warning,) = gguflora.combine([tmp_path / "one", tmp_path / "two"], tmp_path / "out").warnings
    assert "org/one" in warning
    assert "org/two" in warning


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_weights_that_overflow(method, out, tmp_path):
    weighted = [(paths((Adapter(alpha=64),))[0], 3e38)]
    with pytest.raises(GgufloraError, match="too large"):
        gguflora.combine(weighted, tmp_path / out, method=method, base=builders.gguf_model("llama"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
@pytest.mark.parametrize("forms", ["gguf", "mixed", "peft"])
def test_gguf_in_and_out(method, forms, tmp_path):
    """The same change, whichever form the adapters come in, and through llama.cpp's eyes."""
    specs = [Adapter(targets=builders.ATTENTION, alpha=8, seed=seed) for seed in (1, 2)]
    adapters, model = paths(specs), builders.gguf_model("llama")
    files = [gguflora.convert(adapter, model, tmp_path / f"{n}.gguf").output for n, adapter in enumerate(adapters)]
    given = {"gguf": files, "mixed": [adapters[0], files[1]], "peft": adapters}[forms]
    options = {"density": 0.6} if method == "ties" else {}
    weighted = list(zip(given, NEGATIVE, strict=False))
    needs_base = {} if forms == "gguf" else {"base": model}
    gguflora.combine(weighted, tmp_path / "out.gguf", method=method, outtype="f32", **options, **needs_base)
    gguflora.combine(list(zip(adapters, NEGATIVE, strict=False)), tmp_path / "wanted", method=method, **options)
    gguflora.convert(tmp_path / "wanted", model, tmp_path / "wanted.gguf", outtype="f32")
    wanted = lora_changes(tmp_path / "wanted.gguf")
    assert_same_changes(lora_changes(tmp_path / "out.gguf"), wanted, 1e-5)
    assert read_metadata(tmp_path / "out.gguf")["adapter.lora.alpha"] == 4
    logits = llama_logits(model, tmp_path / "out.gguf")
    expected = peft_logits(builders.hf_model("llama"), tmp_path / "wanted")
    np.testing.assert_allclose(logits, expected, atol=2e-3)


def test_other_methods_of_peft(tmp_path):
    """LoHa and LoKr as their exact factors; DoRA approximated on its base."""
    loha = builders.trained_adapter("llama", Trained(peft.LoHaConfig, ("q_proj",), {"r": 2, "alpha": 4}))
    lokr = builders.trained_adapter("llama", Trained(peft.LoKrConfig, ("q_proj",), {"r": 2, "alpha": 4}))
    dora = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"use_dora": True}))
    model, wanted = builders.gguf_model("llama"), {}
    for number, adapter in enumerate((loha, lokr)):
        merged = read_tensors(merged_gguf(builders.hf_model("llama"), adapter))
        weights = read_tensors(model)
        for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
            change = merged[name].astype(np.float64) - weights[name]
            wanted[name] = wanted.get(name, 0) + (1.0, -2.0)[number] * change
    gguflora.combine([loha, (lokr, -2.0)], tmp_path / "out.gguf", method="cat", base=model, outtype="f32")
    assert_same_changes(lora_changes(tmp_path / "out.gguf"), wanted)
    with pytest.raises(UnsupportedAdapterError, match="give it with --base"):
        gguflora.combine([loha, dora], tmp_path / "dora", method="svd")
    report = gguflora.combine([loha, dora], tmp_path / "dora.gguf", method="svd", rank=16, base=model)
    assert sum("approximated" in warning for warning in report.warnings) == 2


def test_dares_own_masks_have_the_density_and_the_seed(tmp_path):
    adapters, options = paths(SPECS[:2]), {"method": "dare_linear", "density": 0.25}
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        gguflora.combine(adapters, tmp_path / name, seed=seed, **options)
    one, same, two = (deltas_by_peft(tmp_path / name) for name in ("one", "same", "two"))
    for name, delta in one.items():
        np.testing.assert_array_equal(delta, same[name])
        assert not np.array_equal(delta, two[name])
    only = one["model.layers.0.mlp.up_proj"]  # of one adapter: a value is there if its factors were kept
    assert 0 < np.count_nonzero(only) < only.size


@pytest.mark.parametrize(
    ("specs", "options", "error", "message"),
    [
        (OTHER_RANKS, {"method": "linear"}, MismatchError, "use cat or svd"),
        (SPECS, {"method": "ties"}, AdapterError, "density is None"),
        (SPECS, {"method": "ties", "density": 1.5}, AdapterError, "density is 1.5"),
        (SPECS, {"method": "cat", "density": 0.5}, AdapterError, "does not prune"),
        (SPECS, {"method": "cat", "rank": 4}, AdapterError, "method with svd"),
        (SPECS, {"method": "slerp"}, AdapterError, "expected one of cat"),
        (SPECS, {"method": "linear", "sign": "frequency"}, AdapterError, "elects no signs"),
        (SPECS, {"method": "ties", "density": 0.5, "seed": 3}, AdapterError, "draws nothing at random"),
        (SPECS, {"method": "ties", "density": 0.5, "sign": "odd"}, AdapterError, "sign is 'odd'"),
        (SPECS, {"method": "svd", "sign": "total"}, AdapterError, "elects no signs"),
        (SPECS, {"method": "cat", "seed": 0}, AdapterError, "draws nothing at random"),
        (SPECS, {"method": "svd", "ties": "mergekit"}, AdapterError, "the same in every convention"),
        (SPECS, {"method": "ties", "density": 0.5, "ties": "paper"}, AdapterError, "ties is 'paper'"),
        ((), {}, AdapterError, "no adapter"),
    ],
)
def test_bad_options(specs, options, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        gguflora.combine(paths(specs), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_bad_adapters(tmp_path):
    adapter, model = builders.adapter("llama", Adapter()), builders.gguf_model("llama")
    gguflora.convert(adapter, model, tmp_path / "lora.gguf")
    with pytest.raises(MismatchError, match="give the base model with --base"):
        gguflora.combine([adapter, tmp_path / "lora.gguf"], tmp_path / "out.gguf")
    with pytest.raises(AdapterError, match="give the base model with --base"):
        gguflora.combine([adapter], tmp_path / "out.gguf")
    with pytest.raises(AdapterError, match="its weight is nan"):
        gguflora.combine([(adapter, float("nan"))], tmp_path / "out")
    with pytest.raises(MismatchError, match="different shapes"):
        gguflora.combine([adapter, builders.adapter("qwen2", Adapter())], tmp_path / "out")


def test_command_line(tmp_path):
    one, two = paths(SPECS[:2])
    arguments = ("combine", one, f"{two}:-0.4", "-o", tmp_path / "out", "--method", "ties", "--density", 0.6)
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [weight for _, _, weight in report["adapters"]] == [1.0, -0.4]
    assert_same(deltas_by_peft(tmp_path / "out"), peft_deltas([one, two], [1.0, -0.4], "ties", density=0.6))
    assert "ties of" in run(*arguments, "--force").stdout


def _folder_with_work(folder):
    """An adapter directory that also holds a checkpoint and an optimizer's state."""
    shutil.copytree(paths(SPECS)[0], folder)
    shutil.copytree(paths(SPECS)[1], folder / "checkpoint-7")
    (folder / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")
    (folder / "adapter_model.bin").write_bytes(b"stale")
    return folder


@pytest.mark.parametrize("command", ["combine", "resize", "export"])
def test_force_replaces_only_the_adapters_own_files(command, tmp_path):
    out, adapters = _folder_with_work(tmp_path / "out"), paths(SPECS)
    before = {path for path in out.rglob("*") if path.is_file()}
    if command == "combine":
        gguflora.combine(adapters[:2], out, method="cat", force=True)
    elif command == "resize":
        gguflora.resize(adapters[0], out, rank=2, force=True)
    else:
        gguflora.export(adapters[0], builders.gguf_model("llama"), out, force=True)
    assert {path for path in out.rglob("*") if path.is_file()} == before - {out / "adapter_model.bin"}
    assert (out / "checkpoint-7" / "optimizer.pt").read_bytes() == b"state"
    assert deltas_by_peft(out)


@pytest.mark.parametrize("link", [False, True], ids=["plain", "through a link"])
def test_an_output_that_contains_an_input_is_refused(link, tmp_path):
    out = _folder_with_work(tmp_path / "out")
    inner = out / "checkpoint-7"
    if link:
        inner = tmp_path / "link"
        inner.symlink_to(out / "checkpoint-7")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"contains the input|is also an input"):
        gguflora.combine([inner, paths(SPECS)[2]], out, method="cat", force=True)
    with pytest.raises(OutputError, match=r"contains the input|is also an input"):
        gguflora.resize(inner, out, rank=2, force=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
