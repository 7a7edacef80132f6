"""LoRA's scaling, by which the product of the factors is multiplied."""

from __future__ import annotations

import math

from gguflora.adapters.peft.config import PeftConfig


def lora_scaling(config: PeftConfig, module: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
    alpha = config.for_module("lora_alpha", "alpha_pattern", module, 8)
    return alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)
