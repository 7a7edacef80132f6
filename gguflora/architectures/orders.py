"""Orders in which GGUF stores the rows or columns of a Hugging Face weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.regions import rows_of
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

Order = Callable[[BaseModel, int, int], Indices]
"""From a base, a layer and the number of rows (or columns) to the order in which GGUF stores them."""


def as_they_are(base: BaseModel, layer: int, n: int) -> Indices:
    """The order of the Hugging Face weight."""
    del base, layer
    return np.arange(n)


def rotary_q(base: BaseModel, layer: int, n: int) -> Indices:
    """Pairs of rotated rows of each query head side by side."""
    return _rotary(base, n, _heads(base, base.n_head, layer))


def rotary_k(base: BaseModel, layer: int, n: int) -> Indices:
    """Pairs of rotated rows of each key head side by side."""
    return _rotary(base, n, _heads(base, base.n_head_kv, layer))


def _rotary(base: BaseModel, n: int, heads: int) -> Indices:
    """Within each head: row 0 of the first half, row 0 of the second, row 1 of the first, ...

    Hugging Face rotates row i with row i + head_dim / 2; ggml's plain rotary embedding rotates neighbours.
    """
    return _grid(base, n, heads, 2).swapaxes(1, 2).reshape(n)


def qkv_by_kind(base: BaseModel, layer: int, n: int) -> Indices:
    """From (q, k, v) of each head to q of all heads, k of all, v of all (GPT-NeoX, Bloom)."""
    return _grid(base, n, _heads(base, base.n_head, layer), 3).swapaxes(0, 1).reshape(n)


def qkv_of_groups(base: BaseModel, layer: int, n: int) -> Indices:
    """From (q.., k, v) of each group of heads that share k and v to all q, all k, all v (Falcon, InternLM2)."""
    heads, groups = _heads(base, base.n_head, layer), _heads(base, base.n_head_kv, layer)
    grid = _grid(base, n, groups, heads // groups + 2)
    return np.concatenate([grid[:, :-2].reshape(-1), grid[:, -2].reshape(-1), grid[:, -1].reshape(-1)])


def values_by_turns(base: BaseModel, layer: int, n: int) -> Indices:
    """From value heads grouped by the key head they share to one of each group by turns (Qwen3.5)."""
    return _grid(base, n, base.n_groups, _value_heads(base, layer) // max(base.n_groups, 1)).swapaxes(0, 1).reshape(n)


def qkv_with_values_by_turns(base: BaseModel, layer: int, n: int) -> Indices:
    """Queries and keys as they are, then the values by turns."""
    values = rows_of(base, f"blk.{layer}.attn_gate.weight")
    return np.concatenate([np.arange(n - values), n - values + values_by_turns(base, layer, values)])


def qkv_or_values_by_turns(base: BaseModel, layer: int, n: int) -> Indices:
    """The order of ``attn_qkv`` of a linear layer; as they are in a layer of plain attention."""
    linear = f"blk.{layer}.attn_gate.weight" in base.shapes
    return qkv_with_values_by_turns(base, layer, n) if linear else np.arange(n)


def _value_heads(base: BaseModel, layer: int) -> int:
    return rows_of(base, f"blk.{layer}.ssm_a")


def _heads(base: BaseModel, heads: tuple[int, ...], layer: int) -> int:
    if layer >= len(heads) or heads[layer] < 1:
        raise MismatchError(f"{base.path}: does not say how many attention heads layer {layer} has")
    return heads[layer]


def _grid(base: BaseModel, n: int, outer: int, inner: int) -> Indices:
    """The numbers 0 to n, outer x inner x the rest."""
    if outer < 1 or inner < 1 or n % (outer * inner):
        raise MismatchError(
            f"{base.path}: {n} rows or columns cannot be shared out to {outer} x {inner} heads, as "
            f"{base.architecture} should have them"
        )
    return np.arange(n).reshape(outer, inner, -1)
