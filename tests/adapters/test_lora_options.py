"""The options of LORA whose change is of low rank, against PEFT's merge or its forward pass."""

import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.variants import QALoraLinearVariant

import gguflora
from gguflora.errors import UnsupportedAdapterError
from support import builders
from support.adapters import random_adapter
from support.asserts import assert_equals_peft, assert_same_changes, changes
from support.builders import Adapter
from support.oracles.gguf_files import lora_changes, read_metadata
from support.oracles.llama_cpp import convert_lora, convert_model, llama_logits
from support.oracles.peft import merged_gguf, peft_logits


def linear(arch):
    """All linear layers."""
    return list(builders.ARCHITECTURES[arch].linear)


def bdlora(arch):
    right = [name for name in linear(arch) if name.startswith(("o_", "down"))]
    left = [name for name in linear(arch) if name.startswith(("q", "up", "gate"))]
    return BdLoraConfig(target_modules_bd_a=right, target_modules_bd_b=left, nblocks=4, match_strict=False)


OPTIONS = {
    "bdlora": lambda arch: {"use_bdlora": bdlora(arch), "r": 8, "lora_alpha": 12},
    "velora": lambda arch: {"velora_config": VeloraConfig(num_groups=8)},
    "monteclora": lambda arch: {"monteclora_config": MontecloraConfig()},
    "eva_ranks": lambda arch: {"rank_pattern": {f"layers.0.*{linear(arch)[0]}": 3}, "use_rslora": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
def test_option_equals_pefts_merge(arch, option, tmp_path):
    config = peft.LoraConfig(target_modules=linear(arch), **OPTIONS[option](arch))
    assert_equals_peft(arch, random_adapter(arch, config), tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_bias_is_merged_and_cannot_be_converted(rslora, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_bias=True, lora_alpha=12, use_rslora=rslora)
    adapter, base = random_adapter("qwen2", config), builders.gguf_model("qwen2")
    expected = changes(base, merged_gguf(builders.hf_model("qwen2"), adapter))
    assert {"blk.0.attn_q.bias", "blk.1.attn_v.bias", "blk.1.attn_v.weight"} <= expected.keys()
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected)
    with pytest.raises(UnsupportedAdapterError, match=r"biases.*merge"):
        gguflora.convert(adapter, base, tmp_path / "lora.gguf")


def _corda(base, config):
    config.corda_config = CordaConfig()
    preprocess_corda(base, config, run_model=lambda: [base(text[None]) for text in TEXT])


def _lora_ga(base, config):
    config.lora_ga_config = LoraGAConfig()

    def train_step():
        base(TEXT, labels=TEXT).loss.backward()

    preprocess_loraga(base, config, train_step)


TEXT = torch.arange(40, 160).reshape(2, 60)
PREPARE = {"corda": _corda, "lora_ga": _lora_ga}


def started(start, rslora=False):
    """A model whose base PEFT has changed, and whose adapter has been trained since; and what it saved before."""
    config = peft.LoraConfig(target_modules=linear("llama"), r=4, init_lora_weights=start, use_rslora=rslora)
    base = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model("llama"), dtype=torch.float32)
    PREPARE.get(start, lambda *_: None)(base, config)
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, or the start would be repeated
    saved = Path(tempfile.mkdtemp(prefix=f"{start}-", dir=builders.hf_model("llama").parent))
    model.save_pretrained(saved / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, saved


@pytest.mark.parametrize(
    ("start", "rslora"),
    [*((name, flag) for name in ("pissa", "olora") for flag in (False, True)),
     ("pissa_niter_4", False), ("corda", False), ("lora_ga", False)],
)  # fmt: skip
def test_converted_starts_are_plain_lora(start, rslora, tmp_path):
    """save_pretrained(path_initial_model_for_weight_conversion=...) writes twice the rank."""
    model, saved = started(start, rslora)
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(saved / "converted", path_initial_model_for_weight_conversion=saved / "start")
    assert_equals_peft("llama", saved / "converted", tmp_path)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda"])
def test_on_the_base_that_peft_has_changed_it_is_a_plain_lora(start, tmp_path):
    """The other way out that the refusal names; PEFT's merge of the two is the truth."""
    model, saved = started(start)
    model.save_pretrained(saved / "trained")  # with init_lora_weights true
    weights = {
        key.replace(".base_layer", ""): value.clone() for key, value in model.get_base_model().state_dict().items()
    }
    residual = {key: value for key, value in weights.items() if ".lora_" not in key}
    paths = [shutil.copytree(builders.hf_model("llama"), tmp_path / name) for name in ("residual", "merged")]
    merged = {key: value.clone() for key, value in model.merge_and_unload().state_dict().items()}
    for path, tensors in zip(paths, (residual, merged), strict=True):
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    base, expected = (convert_model(path, path.with_suffix(".gguf")) for path in paths)
    gguflora.merge(base, saved / "trained", tmp_path / "out.gguf")
    assert_same_changes(changes(base, tmp_path / "out.gguf"), changes(base, expected), 1e-4)


def test_qalora_equals_pefts_forward_pass(tmp_path):
    """PEFT makes it for GPTQ layers only, and cannot merge it: here its variant is put on plain layers."""
    config = peft.LoraConfig(target_modules=linear("qwen2"), lora_alpha=12, use_qalora=True, qalora_group_size=16)
    model_dir, base = builders.hf_model("qwen2"), builders.gguf_model("qwen2")
    hf = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(hf, config)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.layer.Linear)
    }
    for layer in layers.values():
        QALoraLinearVariant.init(layer, "default", config)
        layer.lora_variant["default"] = QALoraLinearVariant()
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    expected = {}
    for name, layer in layers.items():
        unit = torch.eye(layer.in_features)
        with torch.no_grad():
            expected[gguf_name(name)] = (layer(unit) - layer.base_layer(unit)).T.numpy().astype(np.float64)
    gguflora.convert(tmp_path / "adapter", base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)
    gguflora.merge(base, tmp_path / "adapter", tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)


def gguf_name(module):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    return names.get_name(module.removeprefix("base_model.model.")) + ".weight"


def test_qalora_on_a_layer_that_is_not_quantized_is_plain(tmp_path):
    config = peft.LoraConfig(target_modules=linear("llama"), use_qalora=True, qalora_group_size=16)
    assert_equals_peft("llama", random_adapter("llama", config), tmp_path)


# -- activated LoRA --


def activated(arch="llama"):
    config = peft.LoraConfig(target_modules=linear(arch), alora_invocation_tokens=[70, 71, 200], task_type="CAUSAL_LM")
    return random_adapter(arch, config)


def test_activated_lora_names_its_tokens(tmp_path):
    adapter, base = activated(), builders.gguf_model("llama")
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    field = gguf.GGUFReader(tmp_path / "lora.gguf").get_field("adapter.alora.invocation_tokens")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == [70, 71, 200]
    convert_lora(adapter, builders.hf_model("llama"), tmp_path / "theirs.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), lora_changes(tmp_path / "theirs.gguf"), 1e-6)


def test_activated_lora_keeps_its_tokens_when_stored_again(tmp_path):
    base = builders.gguf_model("llama")
    gguflora.convert(activated(), base, tmp_path / "lora.gguf")
    gguflora.convert(tmp_path / "lora.gguf", base, tmp_path / "again.gguf", outtype="q8_0")
    assert read_metadata(tmp_path / "again.gguf")["adapter.alora.invocation_tokens"] == [70, 71, 200]


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_activated_lora_is_never_merged(form, tmp_path):
    adapter, base = activated(), builders.gguf_model("llama")
    if form == "gguf":
        gguflora.convert(adapter, base, tmp_path / "lora.gguf")
        adapter = tmp_path / "lora.gguf"
    with pytest.raises(UnsupportedAdapterError, match="invocation tokens"):
        gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


# -- refused --


@pytest.mark.parametrize(
    ("option", "value"),
    [("layer_replication", [[0, 2], [1, 2]]), ("arrow_config", {"top_k": 2}), ("init_lora_weights", "loftq")],
)
def test_refused_option_says_why(option, value, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(Path(builders.adapter("llama", Adapter())), adapter)
    builders.edit_config(adapter, **{option: value})
    with pytest.raises(UnsupportedAdapterError, match=option):
        gguflora.convert(adapter, builders.gguf_model("llama"), tmp_path / "lora.gguf")


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_lora_bias_where_the_base_has_none(arch, tmp_path):
    """llama.cpp reads biases that the file brings; PEFT's forward pass adds them, though it refuses to merge."""
    layers = [name for name in builders.ARCHITECTURES[arch].linear if name.split("_")[0] in {"q", "k", "v", "qkv"}]
    layers += ["o_proj", "down_proj"] if arch == "llama" else []
    config = peft.LoraConfig(target_modules=layers, lora_bias=True, lora_alpha=12)
    adapter, base = random_adapter(arch, config), builders.gguf_model(arch)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    added = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    added -= {tensor.name for tensor in gguf.GGUFReader(base).tensors}
    assert len(added) == 2 * len(layers)
    assert all(name.endswith(".bias") for name in added)
    expected, cold = peft_logits(builders.hf_model(arch), adapter), llama_logits(base)
    assert np.abs(cold - expected).max() > 0.1
    assert np.abs(llama_logits(tmp_path / "merged.gguf") - expected).max() < 1e-2


def test_lora_bias_that_llama_cpp_would_not_read(tmp_path):
    config = peft.LoraConfig(target_modules=["o_proj"], lora_bias=True)
    with pytest.raises(gguflora.GgufloraError, match=r"attn_output\.bias"):
        gguflora.merge(builders.gguf_model("qwen3"), random_adapter("qwen3", config), tmp_path / "merged.gguf")
