"""PEFT methods whose change is of low rank: merged and converted, against PEFT's own merge."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

import gguflora
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.module_order import in_order
from gguflora.adapters.peft.unsupported import REFUSED
from gguflora.errors import UnsupportedAdapterError
from support import builders, zoo
from support.adapters import random_adapter
from support.asserts import assert_equals_peft, assert_same_changes, changes
from support.oracles.gguf_files import lora_changes
from support.oracles.peft import merged_gguf

ARCHS = ("llama", "qwen2", "phi3")
LAYERS = {arch: list(builders.ARCHITECTURES[arch].linear) for arch in ARCHS}
SIDES = {arch: [name for name in names if not name.startswith("down")] for arch, names in LAYERS.items()}


def methods(arch):
    """A configuration of each method and option, for the linear layers of an architecture."""
    layers = LAYERS[arch]
    first, second, third = layers[0], layers[1], layers[2]
    patterns = {"rank_pattern": {first: 6, f"layers.1.*{second}": 2}, "alpha_pattern": {third: 3, first: 20}}
    return {
        "adalora": peft.AdaLoraConfig(target_modules=layers, init_r=6, target_r=4, lora_alpha=16, total_step=10),
        "adalora_without_alpha": peft.AdaLoraConfig(
            target_modules=layers, init_r=5, target_r=4, lora_alpha=0, total_step=10
        ),
        "vera": peft.VeraConfig(target_modules=layers, r=16, projection_prng_key=7),
        "vera_without_projection": peft.VeraConfig(
            target_modules=layers, r=16, projection_prng_key=2**40 + 3, save_projection=False
        ),
        "pvera": peft.PveraConfig(target_modules=layers, r=16),
        "pvera_without_projection": peft.PveraConfig(
            target_modules=layers, r=16, projection_prng_key=11, save_projection=False
        ),
        "vblora": peft.VBLoRAConfig(target_modules=layers, r=4, num_vectors=12, vector_length=16, topk=2),
        "vblora_three": peft.VBLoRAConfig(target_modules=layers, r=3, num_vectors=300, vector_length=8, topk=3),
        "vblora_top": peft.VBLoRAConfig(
            target_modules=layers, r=4, num_vectors=300, vector_length=16, topk=3, save_only_topk_weights=True
        ),
        "miss": peft.MissConfig(target_modules=layers, r=8),
        "miss_remainder": peft.MissConfig(target_modules=layers, r=7),
        "miss_random": peft.MissConfig(target_modules=layers, r=8, init_weights=False),
        "miss_mini": peft.MissConfig(target_modules=layers, r=8, mini_r=4, init_weights="mini"),
        "delora": peft.DeloraConfig(target_modules=layers, r=5),
        "delora_pattern": peft.DeloraConfig(target_modules=layers, r=5, rank_pattern=patterns["rank_pattern"]),
        "loha": peft.LoHaConfig(target_modules=layers, r=4, alpha=12),
        "loha_patterns": peft.LoHaConfig(target_modules=layers, r=4, alpha=12, **patterns),
        "lokr": peft.LoKrConfig(target_modules=layers, r=4, alpha=12),
        "lokr_patterns": peft.LoKrConfig(target_modules=layers, r=2, alpha=12, **patterns),
        "lokr_both": peft.LoKrConfig(target_modules=layers, r=2, decompose_both=True),
        "lokr_factor": peft.LoKrConfig(target_modules=layers, r=3, decompose_both=True, decompose_factor=4),
        "lokr_whole": peft.LoKrConfig(target_modules=layers, r=64),
        "gralora": peft.GraloraConfig(target_modules=layers, r=8, gralora_k=2, alpha=16),
        "gralora_four": peft.GraloraConfig(target_modules=layers, r=8, gralora_k=4, alpha=7),
        "tinylora": peft.TinyLoraConfig(target_modules=layers, r=3, u=5),
        "tinylora_tied": peft.TinyLoraConfig(target_modules=layers, r=2, u=4, weight_tying=0.6),
        "tinylora_without_projection": peft.TinyLoraConfig(
            target_modules=layers, r=3, u=7, weight_tying=0.3, save_projection=False, projection_seed=9
        ),
        "unilora": peft.UniLoraConfig(target_modules=layers, r=4, theta_d_length=100),
        "unilora_saved": peft.UniLoraConfig(target_modules=layers, r=4, theta_d_length=64, save_indices=True),
        "unilora_some": peft.UniLoraConfig(
            target_modules=layers[1:3], r=3, theta_d_length=4096, proj_seed=7, layers_to_transform=[1]
        ),
        "unilora_pattern": peft.UniLoraConfig(target_modules=r".*\.(o|down)_proj", r=3),
        "unilora_linear": peft.UniLoraConfig(target_modules="all-linear", r=3),
        "gralora_hybrid": peft.GraloraConfig(target_modules=layers, r=8, gralora_k=4, hybrid_r=3, alpha=16),
    }


@pytest.mark.parametrize("method", methods("llama"))
@pytest.mark.parametrize("arch", ARCHS)
def test_merge_and_convert_equal_pefts_merge(arch, method, tmp_path):
    adapter = random_adapter(arch, methods(arch)[method], std=50 if "delora" in method else 0.5)
    assert_equals_peft(arch, adapter, tmp_path)


@pytest.mark.parametrize("name", zoo.ORDERED)
def test_order_of_modules_is_transformers(name):
    """No language model holds its linear modules in another order than `in_order` says."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    modules = [key for key, module in zoo.model(name).named_modules() if isinstance(module, kinds)]
    modules = [key for key in modules if not key.endswith("coder.embed_tokens")]  # T5's, which are its ``shared``
    config = PeftConfig(Path(), "TINYLORA", {})
    assert in_order(config, sorted(modules)) == modules


@pytest.mark.parametrize("name", ["granitehybrid", "bamba"])
def test_order_of_modules_of_hybrids_is_refused(name):
    """Granite 4 and Bamba register the feed-forward part of a layer before its state-space part, Jamba after it."""
    modules = zoo.linear_modules(name, zoo.model(name)).replace("\\", "").split("|")
    with pytest.raises(UnsupportedAdapterError, match="depends on the order"):
        in_order(PeftConfig(Path(), "TINYLORA", {}), modules)


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_are_no_weights_are_refused(method, tmp_path):
    """Every method says why, and what to do instead."""
    assert method in peft.PeftType.__members__
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{method}"}}')
    with pytest.raises(UnsupportedAdapterError, match=rf"{method}: .*(train|merge|prompt|convert)"):
        gguflora.read_adapter(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_trainable_tokens(arch, tmp_path):
    """New rows of the embedding; of a tied one they are the output's rows, too."""
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 17, 200])
    adapter, base = random_adapter(arch, config), builders.gguf_model(arch)
    expected = changes(base, merged_gguf(builders.hf_model(arch), adapter))
    assert expected.keys() == {"token_embd.weight"}
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    assert_same_changes(changes(base, tmp_path / "merged.gguf"), expected, 1e-4)
    if arch == "gemma2":
        with pytest.raises(UnsupportedAdapterError, match="tied"):
            gguflora.convert(adapter, base, tmp_path / "lora.gguf")
        return
    gguflora.convert(adapter, base, tmp_path / "lora.gguf")
    assert_same_changes(lora_changes(tmp_path / "lora.gguf"), expected)
