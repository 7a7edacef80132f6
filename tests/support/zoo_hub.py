"""Weights as files on the Hub name and split them, for models that transformers saves in another way."""

import re
from collections.abc import Callable, Mapping

import torch

Weights = dict[str, torch.Tensor]


def renamed(*pairs: tuple[str, str]) -> Callable[[Weights], Weights]:
    """Replace patterns in all names."""

    def rename(weights: Weights) -> Weights:
        named = {}
        for key, value in weights.items():
            name = key
            for pattern, other in pairs:
                name = re.sub(pattern, other, name)
            named[name] = value
        return named

    return rename


def _halves(weights: Mapping[str, torch.Tensor], parts: tuple[str, str]) -> Weights:
    """Split fused gate and up of dense layers."""
    result = {}
    for key, value in weights.items():
        if key.endswith("gate_up_proj.weight"):
            for part, half in zip(parts, value.chunk(2), strict=True):
                result[key.replace("gate_up_proj", part)] = half.contiguous()
        else:
            result[key] = value
    return result


def minimax_m3(weights: Weights) -> Weights:
    """MiniMax M3: a matrix for each expert (w1, w2, w3), and names of the experts' block and of the indexer."""
    result: Weights = {}
    for key, value in _halves(weights, ("gate_proj", "up_proj")).items():
        block = re.sub(r"\.mlp\.(experts|gate\.|shared_experts)", r".block_sparse_moe.\1", key)
        block = block.replace("block_sparse_moe.gate.e_score", "block_sparse_moe.e_score")
        block = re.sub(r"\.indexer\.(\w+)\.", r".index_\1.", block)
        if "experts.gate_up_proj" in block:
            for expert, pair in enumerate(value):
                for part, half in zip(("w1", "w3"), pair.chunk(2), strict=True):
                    result[block.replace("gate_up_proj", f"{expert}.{part}.weight")] = half.contiguous()
        elif block.endswith("experts.down_proj") and value.ndim == 3:
            for expert, matrix in enumerate(value):
                result[block.replace("down_proj", f"{expert}.w2.weight")] = matrix.contiguous()
        else:
            result[block] = value
    return result


def deepseek_ocr(weights: Weights) -> Weights:
    """DeepSeek-OCR: a matrix for each expert, below ``model``."""
    result: Weights = {}
    for key, value in weights.items():
        name = key if key.startswith("model.") else f"model.{key}"
        if value.ndim != 3:
            result[name] = value
            continue
        for expert, matrix in enumerate(value):
            parts = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("down_proj",)
            for part, share in zip(parts, matrix.chunk(len(parts)), strict=True):
                result[re.sub(r"\w+$", f"{expert}.{part}.weight", name)] = share.contiguous()
    return result
