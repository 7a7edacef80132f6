"""`gguflora.export`: GGUF LoRA back to PEFT. PEFT itself loads the result; values come back as they were."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import ArchitectureError, OutputError
from support import builders, zoo
from support.adapters import UNTIED, VARIANTS, with_embeddings
from support.builders import ARCHITECTURES, Adapter
from support.cli import run
from support.oracles.peft import peft_logits

WITH_EXPERTS = [name for name in zoo.ORDERED if "num_experts" in zoo.MODELS[name].fields]


def there_and_back(adapter, base, path):
    gguflora.convert(adapter, base, path / "lora.gguf", force=True)
    gguflora.export(path / "lora.gguf", base, path / "back", force=True)
    return path / "back"


def weights(folder):
    """What was trained: PEFT also saves copies of adapted embeddings."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return {key: np.asarray(value, np.float32) for key, value in tensors.items() if "lora_" in key}


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


@pytest.mark.parametrize("variant", ["plain", "other_rank", "float16", "fan_in_fan_out"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_round_trip_is_exact(arch, variant, tmp_path):
    adapter = builders.adapter(arch, VARIANTS[variant])
    back = there_and_back(adapter, builders.gguf_model(arch), tmp_path)
    assert_equal_weights(weights(back), weights(adapter))
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, back))
    assert (new["r"], new["lora_alpha"]) == (old["r"], old["lora_alpha"])
    assert (new["rank_pattern"], new["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize("arch", UNTIED)
def test_embeddings_come_back(arch, tmp_path):
    adapter = builders.adapter(arch, with_embeddings(arch))
    back = there_and_back(adapter, builders.gguf_model(arch), tmp_path)
    assert_equal_weights(weights(back), weights(adapter))
    found, expected = (peft_logits(builders.hf_model(arch), folder) for folder in (back, adapter))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("variant", ["rslora", "patterns_rslora", "bfloat16_alpha_pattern"])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_logits_are_those_of_the_adapter(arch, variant, tmp_path):
    """With factors of their own B comes back times the factor, rounded once."""
    adapter = builders.adapter(arch, VARIANTS[variant])
    back = there_and_back(adapter, builders.gguf_model(arch, "small", "Q8_0"), tmp_path)
    found, expected = (peft_logits(builders.hf_model(arch), folder) for folder in (back, adapter))
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("name", zoo.ORDERED)
def test_every_architecture(name, tmp_path):
    """PEFT's model with the adapter that came back has the weights of the first, and every key is used."""
    adapted = zoo.peft_model(name)
    adapted.save_pretrained(tmp_path / "adapter")
    back = there_and_back(tmp_path / "adapter", zoo.gguf_model(name), tmp_path)
    loaded = peft.PeftModel.from_pretrained(zoo.model(name), back)
    assert_same_state(loaded, adapted)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts(name, tmp_path):
    """Parameters of all experts (target_parameters), together with modules."""
    model = zoo.model(name)
    owners = sorted({key.rpartition(".")[0] for key, p in model.named_parameters() if p.ndim == 3 and "experts" in key})
    assert owners
    targets = [f"{owner}.{parameter}" for owner in owners for parameter in ("gate_up_proj", "down_proj")]
    adapted = zoo.peft_model(name, target_modules=["q_proj", "o_proj", "kv_b_proj"], target_parameters=targets)
    adapted.save_pretrained(tmp_path / "adapter")
    back = there_and_back(tmp_path / "adapter", zoo.gguf_model(name), tmp_path)
    assert_same_state(peft.PeftModel.from_pretrained(zoo.model(name), back), adapted)


def assert_same_state(found, expected):
    if found.peft_config["default"].rank_pattern:  # then GGUF has no alpha for all, and B comes back times its factor
        assert_same_deltas(found, expected)
        return
    found, expected = (
        {key: value.detach().numpy() for key, value in model.state_dict(keep_vars=True).items() if "lora_" in key}
        for model in (found, expected)
    )
    assert_equal_weights(found, expected)


def assert_same_deltas(found, expected):
    found, expected = (
        {
            name: module.get_delta_weight("default").detach().numpy()
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        for model in (found, expected)
    )
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-5, atol=1e-6, err_msg=name)


def test_fused_base(tmp_path):
    """Of a base whose q, k and v are one tensor the three modules come back, with their own ranks."""
    adapted = zoo.peft_model("llama_biases")
    adapted.save_pretrained(tmp_path / "adapter")
    back = there_and_back(tmp_path / "adapter", zoo.gguf_model("llama_biases", "--fuse-qkv"), tmp_path)
    assert weights(back).keys() == weights(tmp_path / "adapter").keys()
    loaded = peft.PeftModel.from_pretrained(zoo.model("llama_biases"), back)
    assert loaded.peft_config["default"].rank_pattern == {}
    assert_same_deltas(loaded, adapted)


def test_names_the_base_and_refuses_to_overwrite_what_is_no_adapter(tmp_path):
    adapter, base = builders.adapter("llama", Adapter()), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    report = gguflora.export(tmp_path / "lora.gguf", base, tmp_path / "out", base_model_name="org/model")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    assert (report.modules, report.ranks, report.architecture) == (14, (4, 4), "llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("keep me")
    for out, force in (("out", False), ("mine", True)):
        with pytest.raises(OutputError):
            gguflora.export(tmp_path / "lora.gguf", base, tmp_path / out, force=force)
    assert (tmp_path / "mine/letter.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.gguf", "mine", "out"]


def test_tensors_without_a_module_are_named(tmp_path):
    with pytest.raises(ArchitectureError, match="names of the modules of architecture 'seed_oss' are not known"):
        zoo.peft_model("seed_oss").save_pretrained(tmp_path / "adapter")
        there_and_back(tmp_path / "adapter", zoo.gguf_model("seed_oss"), tmp_path)
    assert not (tmp_path / "back").exists()


def test_command_line(tmp_path):
    adapter, base = builders.adapter("llama", Adapter()), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    result = run("export", tmp_path / "lora.gguf", "--base", base, "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["modules"] == 14
    assert_equal_weights(weights(tmp_path / "out"), weights(adapter))
