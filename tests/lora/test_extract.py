"""`gguflora.extract`: a known adapter comes back from a merged model; else the result is as good as numpy's SVD."""

import json
import shutil
import warnings

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

import gguflora
from gguflora.errors import AdapterError, MismatchError
from gguflora.lora import extract as extraction
from gguflora.lora.model_difference import Difference
from support import builders, zoo
from support.adapters import deltas_by_peft
from support.asserts import assert_same, assert_same_changes, merged_changes
from support.builders import Adapter
from support.cli import run
from support.oracles.gguf_files import lora_changes, read_tensors
from support.oracles.peft import merged_gguf

SPEC = Adapter(rank=4, alpha=8)


def merged(arch, base, spec, path, size="small"):
    gguflora.merge(base, builders.adapter(arch, spec, size), path)
    return path


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
def test_known_adapter_comes_back_from_f32(arch, tmp_path):
    base = builders.gguf_model(arch)
    tuned = merged(arch, base, SPEC, tmp_path / "tuned.gguf")
    report = gguflora.extract(tuned, base, tmp_path / "lora.gguf", rank=4, outtype="f32")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), merged_changes(arch, SPEC), 1e-5)
    assert max(report.errors.values()) < 1e-6
    assert report.left_out == {}
    assert report.unchanged == len(read_tensors(base)) - report.tensors


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def best_of_rank(matrix, rank):
    """The closest matrix of a rank, by numpy's SVD."""
    u, sizes, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sizes[:rank]) @ v[:rank]


@pytest.mark.parametrize(("outtype", "rank", "scale"), [("F16", 4, 0.1), ("F16", 16, 0.1), ("BF16", 4, 1.0)])
def test_known_adapter_comes_back_through_rounding(outtype, rank, scale, tmp_path):
    """To 1e-3, and to less than half of the error of the best approximation of what lies between the two files."""
    spec, base = Adapter(rank=rank, alpha=8), builders.gguf_model("llama", "wide", outtype)
    adapter, tuned = builders.adapter("llama", spec, "wide"), tmp_path / "tuned.gguf"
    gguflora.merge(base, [(adapter, scale)], tuned)
    gguflora.extract(tuned, base, tmp_path / "lora.gguf", rank=rank, outtype="f32")
    gguflora.convert(adapter, base, tmp_path / "known.gguf", outtype="f32", scale=scale)
    known, found = (lora_changes(tmp_path / name) for name in ("known.gguf", "lora.gguf"))
    before, after = read_tensors(base), read_tensors(tuned)
    assert found.keys() == known.keys()
    for name, change in known.items():
        svd = best_of_rank(after[name].astype(np.float64) - before[name], rank)
        assert distance(found[name], change) < min(1e-3, 0.5 * distance(svd, change)), name


@pytest.mark.parametrize("share", [0.3, 1.5])
def test_other_noise_than_rounding_does_not_mislead(share, tmp_path):
    """With a change of full rank beside it, of a size like rounding's, the adapter is found no worse than by an SVD."""
    base = builders.gguf_model("llama", "wide", "F16")
    name, values = "blk.0.ffn_up.weight", read_tensors(base)["blk.0.ffn_up.weight"].astype(np.float64)
    rng, rounding = np.random.default_rng(4), np.spacing(np.abs(values).astype(np.float16)).astype(np.float64)
    low = rng.standard_normal((len(values), 8)) @ rng.standard_normal((8, values.shape[1]))
    low *= 0.03 * np.linalg.norm(values) / np.linalg.norm(low)
    rest = np.sqrt(share * (rounding**2).mean() / 12) * rng.standard_normal(values.shape)
    tuned = tmp_path / "tuned.gguf"
    edited(base, tuned, {name: (values + low + rest).astype(np.float16)})
    gguflora.extract(tuned, base, tmp_path / "lora.gguf", rank=8, outtype="f32")
    svd = best_of_rank(read_tensors(tuned)[name] - values, 8)
    assert distance(lora_changes(tmp_path / "lora.gguf")[name], low) < distance(svd, low)


def test_change_of_full_rank_in_f16_is_approximated_best(tmp_path):
    """Beyond the rank there is more than rounding: the closest matrix is asked for, not the likeliest."""
    base = builders.gguf_model("llama", "wide", "F16")
    name, values = "blk.0.ffn_up.weight", read_tensors(base)["blk.0.ffn_up.weight"]
    change = 0.02 * values.std() * np.random.default_rng(3).standard_normal(values.shape)
    tuned = tmp_path / "tuned.gguf"
    edited(base, tuned, {name: (values + change).astype(np.float16)})
    report = gguflora.extract(tuned, base, tmp_path / "lora.gguf", rank=8, iterations=12, outtype="f32")
    difference = read_tensors(tuned)[name].astype(np.float64) - values
    best = distance(best_of_rank(difference, 8), difference)
    found = distance(lora_changes(tmp_path / "lora.gguf")[name], difference)
    assert best * (1 - 1e-6) <= found <= best * 1.001
    assert found == pytest.approx(report.errors[name], rel=1e-4)


@pytest.mark.parametrize("outtype", ["Q8_0", "Q4_K_M"])
def test_of_quantized_models_it_is_as_good_as_an_svd(outtype, tmp_path):
    base = builders.gguf_model("llama", "wide", outtype)
    tuned = merged("llama", base, SPEC, tmp_path / "tuned.gguf", "wide")
    report = gguflora.extract(tuned, base, tmp_path / "lora.gguf", rank=6, iterations=4, outtype="f32")
    before, after = read_tensors(base), read_tensors(tuned)
    found = lora_changes(tmp_path / "lora.gguf")
    for name, change in found.items():
        difference = after[name].astype(np.float64) - before[name]
        sizes = np.linalg.svd(difference, compute_uv=False)
        best = np.sqrt((sizes[6:] ** 2).sum() / (sizes**2).sum())
        error = np.linalg.norm(change - difference) / np.linalg.norm(difference)
        assert error == pytest.approx(report.errors[name], rel=1e-3)
        assert best * (1 - 1e-6) <= error <= best * 1.01, name


def test_directories(tmp_path):
    spec, model = Adapter(rank=4, targets=("q_proj", "down_proj", "lm_head")), builders.hf_model("llama")
    adapter = builders.adapter("llama", spec)
    tuned = merged_gguf(model, adapter).parent / "hf"
    report = gguflora.extract(tuned, model, tmp_path / "lora", rank=4)
    assert_same(deltas_by_peft(tmp_path / "lora"), deltas_by_peft(adapter), 1e-5)
    assert report.tensors == 5
    gguflora.extract(tuned, model, tmp_path / "lora.gguf", rank=4, outtype="f32")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), merged_changes("llama", spec), 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_file_to_peft_directory(name, tmp_path):
    """Of two GGUF files as a PEFT directory: transposed layers; stacks of experts of which only some differ."""
    base = zoo.gguf_model(name)
    weights = zoo.tensors(base)
    target = "blk.1.ffn_down_exps.weight" if name == "mixtral" else "blk.1.ffn_down.weight"
    rng, change = np.random.default_rng(5), np.zeros(weights[target].shape, np.float32)
    low = rng.standard_normal((change.shape[-2], 2)) @ rng.standard_normal((2, change.shape[-1]))
    change[(2,) if name == "mixtral" else ...] = low
    edited(base, tmp_path / "tuned.gguf", {target: weights[target] + change})
    gguflora.extract(tmp_path / "tuned.gguf", base, tmp_path / "lora", rank=3)
    gguflora.convert(tmp_path / "lora", base, tmp_path / "lora.gguf", outtype="f32")
    found = zoo.tensors(tmp_path / "lora.gguf")
    product = found[f"{target}.lora_b"].astype(np.float64) @ found[f"{target}.lora_a"]
    np.testing.assert_allclose(product, change, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_directories_of_16_bits(dtype, tmp_path):
    """Closer to the change than the best approximation of the difference of the two rounded models."""
    spec, model = Adapter(rank=4, targets=("q_proj", "down_proj")), builders.hf_model("llama")
    adapter = builders.adapter("llama", spec)
    stored = {}
    for name, source in (("base", model), ("tuned", merged_gguf(model, adapter).parent / "hf")):
        (tmp_path / name).mkdir()
        shutil.copy(source / "config.json", tmp_path / name)
        weights = safetensors.torch.load_file(source / "model.safetensors")
        rounded = {key: weight.to(dtype).contiguous() for key, weight in weights.items()}
        safetensors.torch.save_file(rounded, tmp_path / name / "model.safetensors", {"format": "pt"})
        stored[name] = {key: weight.double().numpy() for key, weight in rounded.items()}
    gguflora.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "lora", rank=4)
    found, known = deltas_by_peft(tmp_path / "lora"), deltas_by_peft(adapter)
    assert found.keys() == known.keys()
    for name, change in known.items():
        svd = best_of_rank(stored["tuned"][f"{name}.weight"] - stored["base"][f"{name}.weight"], 4)
        assert distance(found[name], change) < 0.7 * distance(svd, change), name


def edited(source, target, values):
    """A copy of a GGUF file with other values in some F32 (or, for such arrays, F16) tensors."""
    from gguflora.files.gguf import GgufFile

    shutil.copyfile(source, target)
    with GgufFile(source) as file, target.open("r+b") as out:
        for name, array in values.items():
            out.seek(file.tensors[name].offset)
            out.write(array.astype(np.float16 if array.dtype == np.float16 else np.float32).tobytes())


def test_what_a_lora_cannot_hold_is_named(tmp_path):
    base = builders.gguf_model("gemma2")
    weights = read_tensors(base)
    names = ("blk.0.attn_norm.weight", "token_embd.weight", "blk.0.attn_q.weight")
    edited(base, tmp_path / "tuned.gguf", {name: weights[name] * 1.5 for name in names})
    report = gguflora.extract(tmp_path / "tuned.gguf", base, tmp_path / "lora.gguf", rank=4)
    assert report.left_out.keys() == set(names[:2])
    assert "norm or bias" in report.left_out[names[0]]
    assert "differs by 0.5 of its norm" in report.left_out[names[0]]
    assert "tied" in report.left_out[names[1]]
    assert len([warning for warning in report.warnings if "left out" in warning]) == 2
    assert report.errors.keys() == {names[2]}


@pytest.mark.parametrize("spectrum", ["flat", "hyperbolic", "two levels"])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_error_is_within_a_thousandth_of_the_optimum(spectrum, rank, tmp_path):
    base = builders.gguf_model("llama")
    weights, rng, edits = read_tensors(base), np.random.default_rng(3), {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.1.ffn_down.weight"):
        u, _, v = np.linalg.svd(rng.standard_normal(weights[name].shape), full_matrices=False)
        numbers = np.arange(1, u.shape[1] + 1)
        sizes = {"flat": 1 - numbers / 1e4, "hyperbolic": 1 / numbers, "two levels": np.where(numbers > rank, 0.9, 1)}
        edits[name] = weights[name] + 0.1 * (u * sizes[spectrum]) @ v
    edited(base, tmp_path / "tuned.gguf", edits)
    report = gguflora.extract(tmp_path / "tuned.gguf", base, tmp_path / "lora.gguf", rank=rank, outtype="f32")
    found, after = lora_changes(tmp_path / "lora.gguf"), read_tensors(tmp_path / "tuned.gguf")
    for name in edits:
        change = after[name].astype(np.float64) - weights[name]
        best = np.linalg.norm(np.linalg.svd(change, compute_uv=False)[rank:])
        error = np.linalg.norm(change - found[name])
        assert error <= 1.001 * best, (name, error / best)
        assert report.errors[name] == pytest.approx(error / np.linalg.norm(change), rel=1e-3)


@pytest.mark.parametrize("shape", [(48, 300), (300, 48), (200, 200)], ids=str)
@pytest.mark.parametrize("rank", [1, 40])
@pytest.mark.parametrize("is_exact", [True, False])
def test_both_ways_find_the_optimum_of_a_flat_spectrum(is_exact, rank, shape, monkeypatch):
    """The exact decomposition, which small matrices and high ranks get, and passes: both to the promised 0.1 %."""
    change = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    zero = np.zeros(shape, np.float32)
    rows = lambda start, stop: (change[start:stop], zero[start:stop])  # noqa: E731
    item = Difference("x", *shape, False, None, None, None, rows)
    monkeypatch.setattr(extraction, "_is_exact_faster", lambda item, rank: is_exact)
    delta, error = extraction._approximate(item, rank, None, None, 0)
    whole = change.astype(np.float64)
    best = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[rank:])
    found = np.linalg.norm(whole - delta.scaling * delta.b.astype(np.float64) @ delta.a)
    assert best * (1 - 1e-9) <= found <= best * (1 + 1e-6 if is_exact else 1.001)
    assert error == pytest.approx(found / np.linalg.norm(whole), rel=1e-6)


def test_the_faster_way_is_taken():
    def item(n_rows, n_columns):
        return Difference("x", n_rows, n_columns, False, None, None, None, lambda start, stop: None)

    assert extraction._is_exact_faster(item(576, 1536), 64)
    assert extraction._is_exact_faster(item(64, 4096), 16)
    assert not extraction._is_exact_faster(item(4096, 4096), 64)
    assert not extraction._is_exact_faster(item(64, 1 << 20), 64)


def tuned_copy(name, folder, shift=0.02):
    """A model of the zoo with every weight moved at random; as a directory, and as a torch model."""
    model = zoo.model(name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator) * parameter.std().clamp(min=0.1)
            parameter.add_(shift * step)
    return model, zoo.save(name, model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ORDERED)
def test_every_directory_loads_in_peft(name, tmp_path):
    """Of two GGUF files; the deltas are as many as the report says, and none is lost while loading."""
    _, tuned = tuned_copy(name, tmp_path / "tuned")
    base, after = zoo.gguf_model(name), zoo.to_gguf(name, tuned)
    gguflora.extract(after, base, tmp_path / "lora", rank=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(zoo.model(name), tmp_path / "lora")
    assert not [str(item.message) for item in told if "missing" in str(item.message).lower()]
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    saved = safetensors.numpy.load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(layers) >= sum(key.endswith(("lora_A.weight", "lora_embedding_A")) for key in saved)
    assert all(layer.get_delta_weight("default").any() for layer in layers)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gptneox", "bloom", "falcon", "cohere2", "llama_biases"])
def test_directories_answer_as_the_tuned_model(name, tmp_path):
    """At full rank, with norms as modules_to_save and tied embeddings, PEFT's model has the tuned one's logits."""
    tuned, folder = tuned_copy(name, tmp_path / "tuned")
    config = json.loads((zoo.checkpoint(name) / "config.json").read_text())
    shutil.copytree(zoo.checkpoint(name), tmp_path / "base")
    config.pop("tie_word_embeddings", None)
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    report = gguflora.extract(folder, tmp_path / "base", tmp_path / "lora", rank=512)
    model = peft.PeftModel.from_pretrained(zoo.model(name), tmp_path / "lora").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted, found, before = (m(input_ids=ids).logits for m in (tuned.eval(), model, zoo.model(name).eval()))
    left = (found - wanted).norm() / (before - wanted).norm()
    assert all("bias" in key for key in report.left_out)
    assert left < (0.25 if report.left_out else 1e-4)


QUICK = ("qwen3moe", "granitemoe", "llama4")
EXPERTS = (
    "qwen2moe",
    "qwen3moe",
    "mixtral",
    "olmoe",
    "jamba",
    "deepseek2",
    "glm4_moe_lite",
    "granitemoe",
    "gptoss",
    "llama4",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EXPERTS])
def test_experts_of_directories(name, tmp_path):
    """In each form that checkpoints hold experts in: PEFT adds the change of every one to the model in memory."""
    stacks = [key for key, values in zoo.model(name).named_parameters() if "experts" in key and values.ndim == 3]
    adapted = zoo.peft_model(name, target_modules=["q_proj", "o_proj"], target_parameters=stacks)
    adapted.save_pretrained(tmp_path / "known")
    tuned = zoo.save(name, adapted.merge_and_unload(), tmp_path / "tuned")
    gguflora.extract(tuned, zoo.checkpoint(name), tmp_path / "lora", rank=8)
    before = dict(zoo.model(name).named_parameters())
    known, found = (
        peft.PeftModel.from_pretrained(zoo.model(name), tmp_path / folder).merge_and_unload()
        for folder in ("known", "lora")
    )
    found = dict(found.named_parameters())
    for key, values in known.named_parameters():
        change, got = ((each - before[key]).detach().double() for each in (values, found[key]))
        assert (got - change).norm() <= 1e-3 * change.norm() + 1e-6, key
    assert all((found[key] - before[key]).abs().max() > 0.01 for key in stacks)


def test_norms_of_directories_are_saved(tmp_path):
    model = builders.hf_model("llama")
    shutil.copytree(model, tmp_path / "tuned")
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    names = ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    changed = weights | {name: weights[name] * 2 for name in names}
    safetensors.numpy.save_file(changed, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    report = gguflora.extract(tmp_path / "tuned", model, tmp_path / "lora", rank=64)
    assert report.left_out == {}
    assert report.saved == (names[0],)
    assert report.errors.keys() == {names[1]}
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), tmp_path / "lora")
    np.testing.assert_allclose(loaded.merge_and_unload().model.norm.weight.detach().numpy(), 2 * weights[names[0]])
    report = gguflora.extract(tmp_path / "tuned", model, tmp_path / "lora.gguf", rank=64)
    assert report.left_out.keys() == {names[0]}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("new_tokens", [0, 3])
def test_embeddings_of_full_rank_and_new_tokens_are_saved(name, new_tokens, tmp_path):
    """PEFT loads the result on a base with as many tokens, and has the tuned model's logits."""
    tuned, base = zoo.model(name).eval(), zoo.model(name).eval()
    n_tokens, width = tuned.get_input_embeddings().weight.shape
    n_tokens += new_tokens
    torch.manual_seed(3)
    for model in (tuned, base) if new_tokens else ():
        model.resize_token_embeddings(n_tokens)
    with torch.no_grad():
        tuned.get_input_embeddings().weight.add_(0.01 * torch.randn(n_tokens, width))
        layer = next(
            values for key, values in tuned.named_parameters() if key.endswith(("q_proj.weight", "c_attn.weight"))
        )
        layer += 0.01 * torch.randn(layer.shape[0], 1) @ torch.randn(1, layer.shape[1])
    tuned.save_pretrained(tmp_path / "tuned")
    report = gguflora.extract(tmp_path / "tuned", zoo.checkpoint(name), tmp_path / "lora", rank=2)
    assert report.left_out == {}
    is_tied = tuned.get_output_embeddings().weight is tuned.get_input_embeddings().weight
    assert len(report.saved) == (2 if is_tied or new_tokens else 1)
    ids = torch.tensor([[5, 9, 17, n_tokens - 1, 4, 8]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        wanted, found = (model(input_ids=ids).logits for model in (tuned, loaded))
    assert (found - wanted).norm() < 1e-3 * (before - wanted).norm()


def test_energy_threads_and_seed(tmp_path):
    base = builders.gguf_model("llama")
    tuned = merged("llama", base, Adapter(rank=8), tmp_path / "tuned.gguf")
    for name, threads in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        gguflora.extract(tuned, base, tmp_path / name / "lora.gguf", rank=8, threads=threads)
    assert (tmp_path / "one/lora.gguf").read_bytes() == (tmp_path / "three/lora.gguf").read_bytes()
    report = gguflora.extract(tuned, base, tmp_path / "some.gguf", rank=8, energy=0.8)
    assert report.ranks[1] < 8
    assert all(error <= np.sqrt(0.2) + 1e-6 for error in report.errors.values())


def test_bad_input(tmp_path):
    base = builders.gguf_model("llama")
    with pytest.raises(AdapterError, match="no weight that a LoRA could change differs"):
        gguflora.extract(base, base, tmp_path / "lora.gguf", rank=4)
    with pytest.raises(MismatchError, match=r"but .* is 'llama'"):
        gguflora.extract(builders.gguf_model("qwen2"), base, tmp_path / "lora.gguf", rank=4)
    with pytest.raises(MismatchError, match="two GGUF files or two"):
        gguflora.extract(builders.hf_model("llama"), base, tmp_path / "lora.gguf", rank=4)
    weights = read_tensors(base)
    edited(base, tmp_path / "tuned.gguf", {"blk.0.attn_q.weight": weights["blk.0.attn_q.weight"] * np.nan})
    with pytest.raises(AdapterError, match=r"blk\.0\.attn_q\.weight: one of the models holds NaN"):
        gguflora.extract(tmp_path / "tuned.gguf", base, tmp_path / "lora.gguf", rank=4)
    assert not (tmp_path / "lora.gguf").exists()


def test_command_line(tmp_path):
    base = builders.gguf_model("llama")
    tuned = merged("llama", base, SPEC, tmp_path / "tuned.gguf")
    result = run("extract", tuned, "--base", base, "--rank", 4, "-o", tmp_path / "lora.gguf", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"] == 14
