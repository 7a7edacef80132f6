"""Adapters that several tests use: ways to write a LoRA, random ones of any method, of tied and of grown embeddings."""

import tempfile
from functools import lru_cache
from pathlib import Path

import peft
import torch
import transformers

from support import builders
from support.builders import ARCHITECTURES, Adapter, Trained
from support.oracles.llama_cpp import convert_model
from support.oracles.peft import peft_model
from support.workspace import workspace

PLAIN = Adapter()
PATTERN_RANKS = (("down_proj", 8), ("model.layers.0.self_attn.o_proj", 2), (r"layers\.1\.self_attn\..*", 6))
PATTERN_ALPHAS = (("down_proj", 3.0), (r"model\.layers\.0\..*", 20.0), ("o_proj", 5.0))
VARIANTS = {
    "plain": PLAIN,
    "other_rank": Adapter(rank=7, alpha=10.5, seed=1),
    "rslora": Adapter(rank=6, options=(("use_rslora", True),)),
    "rank_pattern": Adapter(options=(("rank_pattern", PATTERN_RANKS),)),
    "alpha_pattern": Adapter(options=(("alpha_pattern", PATTERN_ALPHAS),)),
    "patterns_rslora": Adapter(
        options=(("rank_pattern", PATTERN_RANKS), ("alpha_pattern", PATTERN_ALPHAS), ("use_rslora", True))
    ),
    "bfloat16": Adapter(dtype=torch.bfloat16),
    "float16": Adapter(dtype=torch.float16),
    "bfloat16_alpha_pattern": Adapter(dtype=torch.bfloat16, options=(("alpha_pattern", PATTERN_ALPHAS),)),
    "bin": Adapter(bin=True),
    "bin_bfloat16": Adapter(bin=True, dtype=torch.bfloat16),
    "fan_in_fan_out": Adapter(edited=(("fan_in_fan_out", True),)),
}
UNTIED = [name for name, arch in ARCHITECTURES.items() if not arch.tied]


def with_embeddings(arch, **fields):
    return Adapter(targets=(*ARCHITECTURES[arch].linear, "embed_tokens", "lm_head"), **fields)


def random_adapter(arch, config, std=0.5):
    """What PEFT saves for a configuration, all trainable tensors random."""
    model_dir = builders.hf_model(arch)
    path = Path(tempfile.mkdtemp(prefix=f"{config.peft_type.lower()}-", dir=model_dir.parent))
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = std * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def _lora(*targets, **options):
    return Trained(peft.LoraConfig, targets, {"r": 4, "lora_alpha": 8, **options})


TOKENS = [3, 40, 41, 55, 200]
TIED = {
    "embedding": _lora("q_proj", "embed_tokens"),
    "output": _lora("q_proj", "lm_head"),
    "both": _lora("embed_tokens", "lm_head"),
    "dora_both": _lora("embed_tokens", "lm_head", use_dora=True),
    "whole_embedding": _lora("q_proj", modules_to_save=["embed_tokens"]),
    "whole_output": _lora("q_proj", modules_to_save=["lm_head"]),
    "whole_both": _lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "whole_tied": _lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "lora_tied": _lora("q_proj", "embed_tokens", ensure_weight_tying=True),
    "tokens": _lora("q_proj", trainable_token_indices=TOKENS),
    "tokens_by_name": _lora("q_proj", trainable_token_indices={"embed_tokens": TOKENS}),
    "only_tokens": Trained(peft.TrainableTokensConfig, ("embed_tokens",), {"token_indices": TOKENS}),
    "oft_embedding": Trained(peft.OFTConfig, ("embed_tokens",), {"oft_block_size": 16}, std=0.05),
}
"""Adapters of an embedding, of an output, or of both, for models that tie the two."""

NEW_TOKENS = ["<|tool|>", "gguflora", "<|end|>"]
PADDED_TO = {"llama": 8, "qwen2": 8, "gemma3": None}  # llama.cpp takes the padding off again for gemma


@lru_cache
def resized(arch, targets=("q_proj", "v_proj")):
    """Directory of an adapter, with its tokenizer, and the GGUF file of the merged model."""
    source = builders.hf_model(arch)
    directory = workspace() / f"resized-{arch}-{'-'.join(targets)}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(NEW_TOKENS[1:2])
    tokenizer.add_special_tokens({"additional_special_tokens": [NEW_TOKENS[0], NEW_TOKENS[2]]})
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=PADDED_TO[arch], mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets)))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(directory / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(directory / "adapter")
    adapted.merge_and_unload().save_pretrained(directory / "merged")
    tokenizer.save_pretrained(directory / "merged")
    return directory / "adapter", convert_model(directory / "merged", directory / "merged.gguf")


def lora_layers(model, name):
    """Module names and layers that have an adapter of this name."""
    return {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in {**module.lora_A, **module.lora_embedding_A}
    }


def deltas_by_peft(out, arch="llama"):
    """PEFT's delta of each layer, with an adapter read from its directory."""
    model = peft_model(builders.hf_model(arch), out)
    with torch.no_grad():
        return {
            key: module.get_delta_weight("default").numpy() for key, module in lora_layers(model, "default").items()
        }
