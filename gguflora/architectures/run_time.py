"""What llama.cpp's graphs do not multiply through their LoRA path: there a GGUF LoRA is silently ignored.

Facts from llama.cpp's ``src/models/*.cpp`` and ``src/llama-graph.cpp`` (``build_lora_mm``).
"""

from __future__ import annotations

import re
from typing import Final

from gguflora.base_model import BaseModel

_ANY: Final = {
    r"position_embd\.weight|token_types\.weight": "llama.cpp only looks up its rows, without adapters",
    r".*\.ssm_conv1d\.weight": "llama.cpp applies the convolution without adapters",
    r".*\.attn_rel_b\.weight": "llama.cpp only looks up its rows, without adapters",
    r"cls\..*": "llama.cpp applies the classifier without adapters",
}
_OF_LATENT_ATTENTION: Final = {
    r"blk\.\d+\.attn_(?:q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)\.weight": "llama.cpp computes it without adapters",
    r"output\.weight": "llama.cpp computes it without adapters",
}
_BY_ARCHITECTURE: Final = {
    **dict.fromkeys(("deepseek2", "deepseek2-ocr", "deepseek32", "glm-dsa", "mistral4"), _OF_LATENT_ATTENTION),
}


def ignored_at_run_time(base: BaseModel, tensor: str) -> str | None:
    """Why llama.cpp would ignore a GGUF LoRA of a tensor; None if it applies it.

    Args:
        base: the base model.
        tensor: name of one of its tensors.
    """
    if len(base.shapes.get(tensor, (0, 0))) < 2:
        return "it is a vector, which a GGUF LoRA cannot change"
    rules = {**_ANY, **_BY_ARCHITECTURE.get(base.architecture, {})}
    return next((reason for pattern, reason in rules.items() if re.fullmatch(pattern, tensor)), None)
