"""The tensors for which llama.cpp ignores a GGUF LoRA, or aborts on it.

Source: llama.cpp's ``src/models/*.cpp`` and ``src/llama-graph.cpp`` (``build_lora_mm``).
"""

from __future__ import annotations

import re
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING

_ANY: Final = {
    r"position_embd\.weight|token_types\.weight": "llama.cpp only looks up its rows, without adapters",
    r".*\.ssm_conv1d\.weight": "llama.cpp applies the convolution without adapters",
    r".*\.attn_rel_b\.weight": "llama.cpp only looks up its rows, without adapters",
    r"cls\..*": "llama.cpp applies the classifier without adapters",
    r".*\.bias": "llama.cpp adds the experts' biases without adapters",
    r".*\.ssm_[ad]": "llama.cpp applies the state-space parameters without adapters",
}
_LATENT_ATTENTION: Final = {
    r"blk\.\d+\.attn_(?:q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\.weight": "llama.cpp computes it without adapters",
    r"output\.weight": "llama.cpp computes it without adapters",
}
_LATENT_QUERIES: Final = {
    r"blk\.\d+\.attn_(?:q|q_a|q_b|kv_a_mqa|kv_b)\.weight": "llama.cpp computes it without adapters",
}
_TIME_MIXING: Final = {
    r"blk\.\d+\.time_mix_(?:w1|w2|decay_w2|a1|a2|v1|v2|g1|g2)\.weight": "llama.cpp computes it without adapters",
}
_BY_ARCHITECTURE: Final = {
    **dict.fromkeys(
        ("deepseek2", "deepseek2-ocr", "deepseek32", "dots3note", "glm-dsa", "hy-v4", "mistral4"), _LATENT_ATTENTION
    ),
    **dict.fromkeys(("minicpm3", "plm"), _LATENT_QUERIES),
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), _TIME_MIXING),
}

_FEED_FORWARD: Final = re.compile(r"(blk\.\d+\.ffn_(?:up|gate|down))\.weight")


def ignored_at_run_time(base: BaseModel, tensor: str) -> str | None:
    """Return the reason why llama.cpp ignores a GGUF LoRA of a tensor, or None if it applies it.

    Args:
        base: the base model.
        tensor: name of the tensor.
    """
    if len(base.shapes.get(tensor, (0, 0))) < 2:
        return "it is a vector, which a GGUF LoRA cannot change"
    rules = {**_ANY, **_BY_ARCHITECTURE.get(base.architecture, {})}
    return next((reason for pattern, reason in rules.items() if re.fullmatch(pattern, tensor)), None)


def aborts_at_run_time(base: BaseModel, tensor: str) -> str | None:
    """Return the reason why llama.cpp aborts the process on a GGUF LoRA of a tensor, or None if it does not.

    Args:
        base: the base model.
        tensor: name of the tensor.
    """
    if base.is_tied and tensor in {TOKEN_EMBEDDING, OUTPUT}:
        return "the output weight is tied to the token embedding, and llama.cpp aborts on such a LoRA"
    match = _FEED_FORWARD.fullmatch(tensor)
    if match and base.types.get(tensor) == "NVFP4" and f"{match[1]}.scale" in base.shapes:
        return "it is NVFP4 with a separate scale tensor, and llama.cpp aborts on such a LoRA"
    return None
