"""Hugging Face weights that GGUF cuts into several tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.orders import Order, as_they_are, qkv_of_groups, rotary_k, rotary_q
from gguflora.architectures.regions import rows_of
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

_NORM_OF_HEAD: Final = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.(?P<kind>[qk])_layernorm\.norms\.(?P<head>\d+)\.weight"
)

Split = Callable[[BaseModel, int, str], list[TensorSlice]]
"""From a base, a layer and ``.weight`` or ``.bias`` to the slices of a weight."""

ROTARY_QKV: Mapping[str, Order] = {"attn_q": rotary_q, "attn_k": rotary_k, "attn_v": as_they_are}


def one_below_the_other(parts: Mapping[str, Order]) -> Split:
    """The rows of one tensor after those of the other, each in its order."""

    def split(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
        sizes = {name: rows_of(base, f"blk.{layer}.{name}{kind}") for name in parts}
        return _cut(base, layer, kind, parts, np.arange(sum(sizes.values())))

    return split


def grouped_qkv(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """InternLM2's wqkv: (q.., k, v) of each group of heads."""
    n = sum(rows_of(base, f"blk.{layer}.{name}{kind}") for name in ROTARY_QKV)
    return _cut(base, layer, kind, ROTARY_QKV, qkv_of_groups(base, layer, n))


def _cut(base: BaseModel, layer: int, kind: str, parts: Mapping[str, Order], rows: Indices) -> list[TensorSlice]:
    slices, start = [], 0
    for name, order in parts.items():
        tensor = f"blk.{layer}.{name}{kind}"
        n = rows_of(base, tensor)
        slices.append(TensorSlice(tensor, rows=rows[start : start + n][order(base, layer, n)]))
        start += n
    return slices


def shared_gate_up(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Granite's shared MLP: that of the shared expert, or the layer's only one if it has no experts."""
    suffix = "_shexp" if f"blk.{layer}.ffn_gate_shexp{kind}" in base.shapes else ""
    return one_below_the_other({f"ffn_gate{suffix}": as_they_are, f"ffn_up{suffix}": as_they_are})(base, layer, kind)


def shared_down(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """The other half of `shared_gate_up`."""
    suffix = "_shexp" if f"blk.{layer}.ffn_down_shexp{kind}" in base.shapes else ""
    return [TensorSlice(f"blk.{layer}.ffn_down{suffix}{kind}")]


def latent_keys_and_values(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """DeepSeek's kv_b_proj: of each head k (transposed) and v, stacked apart; older files have it as it is."""
    whole = f"blk.{layer}.attn_kv_b{kind}"
    if whole in base.shapes:
        return [TensorSlice(whole)]
    keys, values = f"blk.{layer}.attn_k_b{kind}", f"blk.{layer}.attn_v_b{kind}"
    shape_k, shape_v = base.shapes.get(keys, ()), base.shapes.get(values, ())
    if len(shape_k) != 3 or len(shape_v) != 3 or shape_k[0] != shape_v[0]:
        raise MismatchError(
            f"{base.path}: {keys!r} is {shape_k} and {values!r} {shape_v}, expected stacks of as many heads"
        )
    heads, latent, width_k = shape_k
    rows = np.arange(heads * (width_k + shape_v[1])).reshape(heads, -1)
    slices = []
    for head, of_head in enumerate(rows):
        slices.append(TensorSlice(keys, head * latent, rows=of_head[:width_k], transposed=True))
        slices.append(TensorSlice(values, head * shape_v[1], rows=of_head[width_k:]))
    return slices


def norm_of_head(base: BaseModel, path: str) -> list[TensorSlice]:
    """StableLM's ``self_attn.q_layernorm.norms.<h>.weight``: a row of all heads' norms; none for any other weight."""
    found = _NORM_OF_HEAD.fullmatch(path)
    if found is None:
        return []
    tensor = f"blk.{found['layer']}.attn_{found['kind']}_norm.weight"
    shape = base.shapes.get(tensor, ())
    if len(shape) != 2:
        raise MismatchError(f"{base.path}: {tensor!r} is {shape}, expected a row for the norm of each head")
    return [TensorSlice(tensor, int(found["head"]), rows=np.arange(shape[1]), transposed=True)]


def grouped_qkvz(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Qwen3-Next's in_proj_qkvz: (q, k, v.., z..) of each key head."""
    qkv, gate = f"blk.{layer}.attn_qkv{kind}", f"blk.{layer}.attn_gate{kind}"
    n_qkv, n_values = rows_of(base, qkv), rows_of(base, gate)
    groups, n_keys = base.n_groups, (n_qkv - n_values) // 2
    if groups < 1 or n_keys < 1 or n_values % groups or n_keys % groups:
        raise MismatchError(f"{base.path}: {n_qkv} rows of {qkv!r} cannot be shared out to {groups} key heads")
    widths = np.cumsum([n_keys, n_keys, n_values]) // groups
    parts = np.split(np.arange(n_qkv + n_values).reshape(groups, -1), widths, axis=1)
    q, k, v, z = (part.reshape(-1) for part in parts)
    return [TensorSlice(qkv, rows=np.concatenate([q, k, v])), TensorSlice(gate, rows=z)]
