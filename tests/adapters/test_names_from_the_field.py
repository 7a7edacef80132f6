"""Names that training, other libraries and outer models give to tensors: the same file as from PEFT's own names."""

import json
import shutil

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import gguflora
from gguflora.adapters.peft.wrappers import unwrapped
from gguflora.errors import AdapterError
from support import builders, zoo
from support.adapters import NEW_TOKENS
from support.asserts import assert_same_changes, changes
from support.builders import Adapter
from support.oracles.gguf_files import lora_changes
from support.oracles.llama_cpp import convert_model

PREFIX = "base_model.model."
OUTER = ["llm.", "thinker.", "language.", "language_model.", "pretrained_model.", "model.language_model.",
         "0.auto_model.", "thinker.model.", "model.llm.", "encoder."]  # fmt: skip
WRAPPED = {
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled_outside": lambda key: f"_orig_mod.{key}",
    "distributed": lambda key: f"module.{key}",
    "distributed_twice": lambda key: f"module.module.{key}",
    "distributed_inside": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "fsdp": lambda key: key.replace("layers.", "layers._fsdp_wrapped_module.").replace(
        "_wrapped_module.0.", "_wrapped_module.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "doubled_prefix": lambda key: f"{PREFIX}{key}",
    "doubled_name": lambda key: key.replace(".weight", ".default.default.weight"),
    "everything": lambda key: "module._orig_mod." + key.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
}  # fmt: skip


def renamed(tmp_path, rename, spec=Adapter(seed=5), arch="llama"):  # noqa: B008  (Adapter is frozen)
    folder = shutil.copytree(builders.adapter(arch, spec), tmp_path / "renamed")
    path = folder / "adapter_model.safetensors"
    tensors = {rename(key): tensor for key, tensor in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path)
    return folder


def assert_converts_alike(tmp_path, folder, spec=Adapter(seed=5), arch="llama"):  # noqa: B008
    base = builders.gguf_model(arch)
    for name, adapter in (("expected", builders.adapter(arch, spec)), ("found", folder)):
        gguflora.convert(adapter, base, tmp_path / f"{name}.gguf")
    assert_same_changes(lora_changes(tmp_path / "found.gguf"), lora_changes(tmp_path / "expected.gguf"), 0)


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_of_training_are_stripped(tmp_path, wrapper):
    assert_converts_alike(tmp_path, renamed(tmp_path, WRAPPED[wrapper]))


@pytest.mark.parametrize("outer", OUTER)
def test_what_wraps_the_language_model_is_stripped(tmp_path, outer):
    assert_converts_alike(tmp_path, renamed(tmp_path, lambda key: key.replace(PREFIX, PREFIX + outer)))


def test_two_tensors_that_unwrap_to_one_name_are_refused(tmp_path):
    folder = renamed(tmp_path, lambda key: key)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    key = next(iter(tensors))
    safetensors.numpy.save_file(tensors | {f"module.{key}": tensors[key] + 1}, path)
    with pytest.raises(AdapterError, match="two different tensors"):
        gguflora.inspect(folder)
    safetensors.numpy.save_file(tensors | {f"module.{key}": tensors[key]}, path)
    assert_converts_alike(tmp_path, folder)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
     "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight",
     "base_model.model.encoder.layer.0.module_norm.weight"],
)  # fmt: skip
def test_names_without_wrappers_stay(key):
    assert unwrapped(key) == key


def test_tinkers_output_is_the_head(tmp_path):
    spec = Adapter(targets=("q_proj", "lm_head"), seed=2)
    folder = renamed(tmp_path, lambda key: key.replace(f"{PREFIX}lm_head", f"{PREFIX}model.unembed_tokens"), spec)
    assert_converts_alike(tmp_path, folder, spec)


def write_lora(folder, factors, **fields):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_tinkers_stacks_of_experts(tmp_path):
    base = zoo.gguf_model("qwen3moe")
    shapes = gguflora.files.gguf.GgufFile(base).tensors
    rng, factors, expected = np.random.default_rng(3), {}, {}
    for name, tensor in (("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")):
        experts, n_out, n_in = shapes[f"blk.1.{tensor}.weight"].shape
        a = rng.standard_normal((1 if name != "w2" else experts, 4, n_in)).astype(np.float32)
        b = rng.standard_normal((experts if name != "w2" else 1, n_out, 4)).astype(np.float32)
        module = f"{PREFIX}model.layers.1.mlp.experts.{name}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        expected[f"blk.1.{tensor}.weight"] = 2.0 * b.astype(np.float64) @ a
    gguflora.convert(write_lora(tmp_path / "tinker", factors), base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)


def test_unsloths_lists_of_experts(tmp_path):
    base = zoo.gguf_model("gptoss")
    shapes = gguflora.files.gguf.GgufFile(base).tensors
    rng, factors = np.random.default_rng(3), {}
    experts, width, hidden = shapes["blk.0.ffn_gate_exps.weight"].shape
    products = {"gate_up": np.zeros((experts, 2 * width, hidden)), "down": np.zeros((experts, hidden, width))}
    for kind, stack in products.items():
        for e in range(experts):
            a = rng.standard_normal((4, stack.shape[2])).astype(np.float32)
            b = rng.standard_normal((stack.shape[1], 4)).astype(np.float32)
            module = f"{PREFIX}model.layers.0.mlp.experts.{kind}_projs.{e}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            stack[e] = 2.0 * b.astype(np.float64) @ a
    expected = {
        "blk.0.ffn_gate_exps.weight": products["gate_up"][:, 0::2],  # as the converter splits gate_up_proj
        "blk.0.ffn_up_exps.weight": products["gate_up"][:, 1::2],
        "blk.0.ffn_down_exps.weight": products["down"],
    }
    gguflora.convert(write_lora(tmp_path / "unsloth", factors), base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)


@pytest.fixture(scope="module")
def with_new_tokens(tmp_path_factory):
    """PEFT's default flow: tokens added, their rows trained, plain save_pretrained; and PEFT's own merge."""
    folder = tmp_path_factory.mktemp("tokens")
    source = builders.hf_model("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(NEW_TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = [5, 17, *range(len(tokenizer) - len(NEW_TOKENS), len(tokenizer))]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": rows})
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    keys = safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any("token_adapter.base_layer" in key for key in keys), "the flow that this test is about"
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return folder / "adapter", convert_model(folder / "merged", folder / "merged.gguf")


def test_added_and_trained_tokens_of_plain_save_pretrained(with_new_tokens, tmp_path):
    adapter, expected = with_new_tokens
    base = builders.gguf_model("llama")
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    before, after = (gguflora.files.gguf.GgufFile(path).tensors for path in (tmp_path / "merged.gguf", expected))
    assert {name: entry.shape for name, entry in before.items()} == {name: entry.shape for name, entry in after.items()}
    found = changes(expected, tmp_path / "merged.gguf")
    assert all(np.abs(change).max() < 1e-5 for change in found.values()), found.keys()
    assert gguflora.inspect(adapter, base).changes
