"""The orders in which GGUF stores the rows or columns of a Hugging Face weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.regions import rows_of
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

Order = Callable[[BaseModel, int, int], Indices]
"""A function of a base, a layer and a number of rows (or columns) that returns the order in which GGUF stores them."""


def unchanged(base: BaseModel, layer: int, n: int) -> Indices:
    """Return the order of the Hugging Face weight."""
    del base, layer
    return np.arange(n)


def rotary_q(base: BaseModel, layer: int, n: int) -> Indices:
    """Put the two rows of each rotated pair next to each other, within each query head."""
    return _rotary(base, n, _heads(base, base.n_head, layer))


def rotary_k(base: BaseModel, layer: int, n: int) -> Indices:
    """Put the two rows of each rotated pair next to each other, within each key head."""
    return _rotary(base, n, _heads(base, base.n_head_kv, layer))


def _rotary(base: BaseModel, n: int, heads: int) -> Indices:
    """Order the rows of each head as row 0 of the first half, row 0 of the second half, row 1 of the first half, ...

    Hugging Face rotates row i with row i + head_dim / 2; ggml's standard rotary embedding rotates adjacent rows.
    """
    return _grid(base, n, heads, 2).swapaxes(1, 2).reshape(n)


def halves_q(base: BaseModel, layer: int, n: int) -> Indices:
    """Put the rotated rows of each query head into halves, where the base uses M-RoPE; else keep the order (GLM-4V)."""
    return _halves(base, n, base.n_head, layer)


def halves_k(base: BaseModel, layer: int, n: int) -> Indices:
    """Put the rotated rows of each key head into halves, see `halves_q`."""
    return _halves(base, n, base.n_head_kv, layer)


def _halves(base: BaseModel, n: int, heads: tuple[int, ...], layer: int) -> Indices:
    """Order the rotated rows of each head as the even ones, then the odd ones; the rest of the head follows.

    Hugging Face rotates adjacent rows here; ggml's M-RoPE rotates row i with row i + n_mrope / 2.
    """
    if not base.n_mrope:
        return np.arange(n)
    grid = _grid(base, n, _heads(base, heads, layer), 1)[:, 0]
    rotated, others = grid[:, : base.n_mrope], grid[:, base.n_mrope :]
    return np.concatenate([rotated[:, ::2], rotated[:, 1::2], others], axis=1).reshape(n)


def qkv_by_kind(base: BaseModel, layer: int, n: int) -> Indices:
    """Reorder (q, k, v) of each head to q of all heads, k of all heads, v of all heads (GPT-NeoX, Bloom)."""
    return _grid(base, n, _heads(base, base.n_head, layer), 3).swapaxes(0, 1).reshape(n)


def qkv_of_groups(base: BaseModel, layer: int, n: int) -> Indices:
    """Reorder (q.., k, v) of each group of heads with shared k and v to all q, all k, all v (Falcon, InternLM2)."""
    heads, groups = _heads(base, base.n_head, layer), _heads(base, base.n_head_kv, layer)
    grid = _grid(base, n, groups, heads // groups + 2)
    return np.concatenate([grid[:, :-2].reshape(-1), grid[:, -2].reshape(-1), grid[:, -1].reshape(-1)])


def tiled_values(base: BaseModel, layer: int, n: int) -> Indices:
    """Reorder value heads from grouped by key head to tiled: one head of each group in turn (Qwen3.5)."""
    return _grid(base, n, base.n_groups, _value_heads(base, layer) // max(base.n_groups, 1)).swapaxes(0, 1).reshape(n)


def qkv_with_tiled_values(base: BaseModel, layer: int, n: int) -> Indices:
    """Keep queries and keys in place, and tile the value heads after them."""
    values = rows_of(base, f"blk.{layer}.attn_gate.weight")
    return np.concatenate([np.arange(n - values), n - values + tiled_values(base, layer, values)])


def qkv_of_linear_attention(base: BaseModel, layer: int, n: int) -> Indices:
    """Return the order of ``attn_qkv`` in a layer of linear attention; in other layers it is unchanged."""
    linear = f"blk.{layer}.attn_gate.weight" in base.shapes
    return qkv_with_tiled_values(base, layer, n) if linear else np.arange(n)


def _value_heads(base: BaseModel, layer: int) -> int:
    return rows_of(base, f"blk.{layer}.ssm_a")


def _heads(base: BaseModel, heads: tuple[int, ...], layer: int) -> int:
    if layer >= len(heads) or heads[layer] < 1:
        raise MismatchError(f"{base.path}: does not say how many attention heads layer {layer} has")
    return heads[layer]


def _grid(base: BaseModel, n: int, outer: int, inner: int) -> Indices:
    """Return the numbers from 0 to n - 1 in an array (outer, inner, ..)."""
    if outer < 1 or inner < 1 or n % (outer * inner):
        raise MismatchError(
            f"{base.path}: {n} rows or columns cannot be divided into {outer} x {inner} heads, as {base.architecture} "
            "requires"
        )
    return np.arange(n).reshape(outer, inner, -1)
