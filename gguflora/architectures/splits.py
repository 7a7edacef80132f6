"""Hugging Face weights that GGUF splits into several tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.orders import Order, qkv_of_groups, rotary_k, rotary_q, unchanged
from gguflora.architectures.regions import rows_of
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

_HEAD_NORM: Final = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.(?P<kind>[qk])_layernorm\.norms\.(?P<head>\d+)\.weight"
)

_ALTUP: Final = re.compile(r"(?:.*\.)?altup_(?P<side>|unembed_)projections\.(?P<index>\d+)\.weight")

Split = Callable[[BaseModel, int, str], list[TensorSlice]]
"""A function of a base, a layer and ``.weight`` or ``.bias`` that returns the slices of a weight."""

ROTARY_QKV: Mapping[str, Order] = {"attn_q": rotary_q, "attn_k": rotary_k, "attn_v": unchanged}


def concatenated(parts: Mapping[str, Order]) -> Split:
    """Return the split of a weight whose rows are those of several tensors, one after the other, each in its order."""

    def split(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
        sizes = {name: rows_of(base, f"blk.{layer}.{name}{kind}") for name in parts}
        return _cut(base, layer, kind, parts, np.arange(sum(sizes.values())))

    return split


def grouped_qkv(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of InternLM2's wqkv, which has (q.., k, v) of each group of heads."""
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


def convolution_of_kinds(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of Kimi Linear's convolution in transformers 5, which has the channels of q, k and v.

    GGUF has a tensor (1, channels, 1, width) for each of the three.
    """
    slices, start = [], 0
    for part in "qkv":
        tensor = f"blk.{layer}.ssm_conv1d_{part}{kind}"
        if tensor not in base.shapes:
            raise MismatchError(f"{base.path} has no tensor {tensor!r}, as {base.architecture} should")
        n = math.prod(base.shapes[tensor][:-1])
        slices.append(TensorSlice(tensor, rows=np.arange(start, start + n)))
        start += n
    return slices


def experts_of_blocks(tensor: str, *, transposed: bool) -> Split:
    """Return the split of DBRX's experts, which lie below each other in one matrix (n_experts * n_inner, n_embd)."""

    def split(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
        del kind  # the parameter's name has no ".weight"
        name = f"blk.{layer}.{tensor}.weight"
        shape = base.shapes.get(name, ())
        if len(shape) != 3:
            raise MismatchError(f"{base.path}: {name!r} is {shape}, expected a stack of experts")
        if not transposed:
            return [TensorSlice(name)]
        n_experts, n_out, n_inner = shape
        rows = np.arange(n_experts * n_inner).reshape(n_experts, n_inner)
        return [TensorSlice(name, expert * n_out, rows=rows[expert], transposed=True) for expert in range(n_experts)]

    return split


def shared_gate_up(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of gate and up in Granite's shared MLP, which is the layer's only MLP if it has no experts."""
    suffix = "_shexp" if f"blk.{layer}.ffn_gate_shexp{kind}" in base.shapes else ""
    return concatenated({f"ffn_gate{suffix}": unchanged, f"ffn_up{suffix}": unchanged})(base, layer, kind)


def shared_down(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slice of down in Granite's shared MLP, see `shared_gate_up`."""
    suffix = "_shexp" if f"blk.{layer}.ffn_down_shexp{kind}" in base.shapes else ""
    return [TensorSlice(f"blk.{layer}.ffn_down{suffix}{kind}")]


def latent_keys_and_values(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of DeepSeek's kv_b_proj.

    GGUF has one stack of each head's k, transposed, and one of each head's v. Older files have the weight unchanged.
    """
    whole = f"blk.{layer}.attn_kv_b{kind}"
    if whole in base.shapes:
        return [TensorSlice(whole)]
    keys, values = f"blk.{layer}.attn_k_b{kind}", f"blk.{layer}.attn_v_b{kind}"
    shape_k, shape_v = base.shapes.get(keys, ()), base.shapes.get(values, ())
    if len(shape_k) != 3 or len(shape_v) != 3 or shape_k[0] != shape_v[0]:
        raise MismatchError(
            f"{base.path}: {keys!r} is {shape_k} and {values!r} {shape_v}, expected two stacks with the same number of "
            "heads"
        )
    heads, latent, width_k = shape_k
    rows = np.arange(heads * (width_k + shape_v[1])).reshape(heads, -1)
    slices = []
    for head, head_rows in enumerate(rows):
        slices.append(TensorSlice(keys, head * latent, rows=head_rows[:width_k], transposed=True))
        slices.append(TensorSlice(values, head * shape_v[1], rows=head_rows[width_k:]))
    return slices


def grouped_norm(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of Mamba-2's norm, which GGUF stores as a matrix with a row for each group."""
    tensor = f"blk.{layer}.ssm_norm{kind}"
    shape = base.shapes.get(tensor, ())
    if len(shape) != 2:
        return [TensorSlice(tensor)]
    rows = np.arange(shape[0] * shape[1]).reshape(shape)
    return [TensorSlice(tensor, group, rows=rows[group], transposed=True) for group in range(shape[0])]


def head_norm_slice(base: BaseModel, path: str) -> list[TensorSlice]:
    """Return the slice of StableLM's ``self_attn.q_layernorm.norms.<h>.weight``; an empty list for other weights.

    GGUF has one tensor with a row for each head's norm.
    """
    match = _HEAD_NORM.fullmatch(path)
    if match is None:
        return []
    tensor = f"blk.{match['layer']}.attn_{match['kind']}_norm.weight"
    shape = base.shapes.get(tensor, ())
    if len(shape) != 2:
        raise MismatchError(f"{base.path}: {tensor!r} is {shape}, expected a matrix with a row for each head")
    return [TensorSlice(tensor, int(match["head"]), rows=np.arange(shape[1]), transposed=True)]


def altup_slice(base: BaseModel, path: str) -> list[TensorSlice]:
    """Return the slice of Gemma 3n's ``altup_projections.<n>.weight``, one of a stack; an empty list for others."""
    match = _ALTUP.fullmatch(path)
    if match is None:
        return []
    tensor = "altup_unembd_proj.weight" if match["side"] else "altup_proj.weight"
    shape = base.shapes.get(tensor, ())
    if len(shape) != 3 or int(match["index"]) >= shape[0]:
        raise MismatchError(f"{base.path}: {tensor!r} is {shape}, expected a stack that holds {path!r}")
    return [TensorSlice(tensor, int(match["index"]) * shape[1], rows=np.arange(shape[1]))]


def grouped_qkvz(base: BaseModel, layer: int, kind: str) -> list[TensorSlice]:
    """Return the slices of Qwen3-Next's in_proj_qkvz, which has (q, k, v.., z..) of each key head."""
    qkv, gate = f"blk.{layer}.attn_qkv{kind}", f"blk.{layer}.attn_gate{kind}"
    n_qkv, n_values = rows_of(base, qkv), rows_of(base, gate)
    groups, n_keys = base.n_groups, (n_qkv - n_values) // 2
    if groups < 1 or n_keys < 1 or n_values % groups or n_keys % groups:
        raise MismatchError(f"{base.path}: {n_qkv} rows of {qkv!r} cannot be divided into {groups} key heads")
    widths = np.cumsum([n_keys, n_keys, n_values]) // groups
    parts = np.split(np.arange(n_qkv + n_values).reshape(groups, -1), widths, axis=1)
    q, k, v, z = (part.reshape(-1) for part in parts)
    return [TensorSlice(qkv, rows=np.concatenate([q, k, v])), TensorSlice(gate, rows=z)]
