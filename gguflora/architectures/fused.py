"""Weights that an adapter has apart and the GGUF file has fused, or the reverse.

Phi-3 and GLM-4 hold gate and up in one weight, which GGUF calls ``ffn_up``; adapters of copies with separate weights
(and bases made from such copies) name the halves. The same holds for q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.orders import Order, unchanged
from gguflora.architectures.splits import concatenated
from gguflora.architectures.tensor_slice import TensorSlice

_HALVES: Final = {"mlp.gate_proj": 0, "mlp.up_proj": 1, "feed_forward.w1": 0, "feed_forward.w3": 1}
_FUSED: Final = {
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
    "mlp.shared_experts.gate_up_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
}


def fused_slices(base: BaseModel, layer: int, module: str, kind: str, orders: Mapping[str, Order]) -> list[TensorSlice]:
    """Return the slices of a weight that is fused in the base but not here, or the reverse; an empty list otherwise.

    Args:
        base: the base model.
        layer: number of the layer.
        module: Hugging Face name of the module in the layer.
        kind: ``.weight`` or ``.bias``.
        orders: the orders of rows of the base's architecture, by GGUF name of the tensor in a layer.
    """
    if module in _HALVES:
        return _half(base, layer, _HALVES[module], kind)
    parts = _FUSED.get(module, ())
    if parts and all(f"blk.{layer}.{part}{kind}" in base.shapes for part in parts):
        return concatenated({part: orders.get(part, unchanged) for part in parts})(base, layer, kind)
    return []


def _half(base: BaseModel, layer: int, index: int, kind: str) -> list[TensorSlice]:
    tensor, down = f"blk.{layer}.ffn_up{kind}", base.shapes.get(f"blk.{layer}.ffn_down.weight", ())
    shape = base.shapes.get(tensor, ())
    if f"blk.{layer}.ffn_gate{kind}" in base.shapes or len(down) != 2 or not shape or shape[0] != 2 * down[1]:
        return []
    return [TensorSlice(tensor, index * down[1], rows=np.arange(down[1]))]
