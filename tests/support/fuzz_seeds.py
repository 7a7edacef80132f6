"""Adapters of many PEFT methods for the llama of `fuzzing.py`, as PEFT saves them; needs torch and peft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from support import fuzzing

SOME = ["q_proj", "k_proj", "down_proj"]
METHODS: dict[str, tuple[Callable[..., peft.PeftConfig], dict[str, Any]]] = {
    "lora_dora": (peft.LoraConfig, {"r": 4, "use_dora": True}),
    "lora_whole": (peft.LoraConfig, {"r": 4, "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 3]}),
    "lora_bias": (peft.LoraConfig, {"r": 4, "alpha_pattern": {"k_proj": 3}}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 6, "target_r": 4, "total_step": 10}),
    "loha": (peft.LoHaConfig, {"r": 2}),
    "lokr": (peft.LoKrConfig, {"r": 2}),
    "vera": (peft.VeraConfig, {"r": 8}),
    "vblora": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2}),
    "miss": (peft.MissConfig, {"r": 4}),
    "delora": (peft.DeloraConfig, {"r": 4}),
    "gralora": (peft.GraloraConfig, {"r": 4, "gralora_k": 2}),
    "tinylora": (peft.TinyLoraConfig, {"r": 2, "u": 3}),
    "unilora": (peft.UniLoraConfig, {"r": 2, "theta_d_length": 32}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hira": (peft.HiraConfig, {"r": 4}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 8}),
    "road": (peft.RoadConfig, {"variant": "road_4", "group_size": 8}),
    "c3a": (peft.C3AConfig, {"block_size": 16}),
    "shira": (peft.ShiraConfig, {"r": 2, "mask_type": "random"}),
    "supertuning": (peft.SupertuningConfig, {"sparsity": 0.9, "r": 2}),
    "glora": (peft.GloraConfig, {"r": 4}),
    "deft": (peft.DeftConfig, {"r": 4}),
    "osf": (peft.OSFConfig, {"effective_rank": 10}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 50}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 50}),
    "randlora": (peft.RandLoraConfig, {"r": 6}),
    "frod": (peft.FrodConfig, {"sparse_rate": 0.05}),
    "peanut": (peft.PeanutConfig, {"r": 4, "depth": 1}),
}


def write_all(folder: Path) -> None:
    """A directory of each method."""
    for name, (config, options) in METHODS.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(_llama(), config(target_modules=SOME, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(str(folder / f"peft_{name}"))
        (folder / f"peft_{name}" / "README.md").unlink(missing_ok=True)


def _llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=fuzzing.HIDDEN, intermediate_size=fuzzing.FFN, num_attention_heads=fuzzing.HEADS,
        num_key_value_heads=fuzzing.KV_HEADS, vocab_size=fuzzing.VOCABULARY, num_hidden_layers=fuzzing.LAYERS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
