"""Optional biases: those that llama.cpp applies if a file has them, so that a merge may add them.

Source: llama.cpp's ``src/llama-model.cpp`` (``create_tensor_qkv``), ``src/llama-graph.cpp`` (``build_qkv``) and the
``TENSOR_NOT_REQUIRED`` biases of ``src/models/*.cpp``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from gguflora.architectures.base_model import BaseModel

_ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_EVERY: Final = (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_READ: Final = {
    **dict.fromkeys(("llama", "mistral3", "minicpm", "granite"), _EVERY),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "internlm2", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "qwen3moe", "smollm3"),
        _ATTENTION,
    ),
}
_WEIGHT: Final = re.compile(r"(blk\.\d+\.(\w+))\.weight")


def with_biases(base: BaseModel) -> BaseModel:
    """Return a description of the base that also has every bias llama.cpp would read; the added ones are ``absent``."""
    absent = {}
    for name, shape in base.shapes.items():
        match = _WEIGHT.fullmatch(name)
        if match and match[2] in _READ.get(base.architecture, ()) and f"{match[1]}.bias" not in base.shapes:
            absent[f"{match[1]}.bias"] = shape[:1]
    return replace(base, shapes={**base.shapes, **absent}, absent=frozenset(absent))
