"""LOKR: ``W' = W + scaling * kron(w1, w2)`` (https://arxiv.org/abs/2212.10650, https://arxiv.org/abs/2309.14859).

Each of w1 and w2 is stored whole (``lokr_w1``, ``lokr_w2``) or as two factors of rank r (``lokr_w1_a``, ``lokr_w1_b``,
...); scaling is alpha / r in either case. As kron(A B, C D) = kron(A, C) kron(B, D), the delta has the Kronecker
products of the factors of w1 and w2 as its factors; a whole matrix is the product of itself and the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.numerics.tucker import check_size, dense, from_core
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import Parts, by_module, expect
from gguflora.errors import AdapterError, listed
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array

_PARTS: Final = tuple(f"lokr_w{number}{suffix}" for number in (1, 2) for suffix in ("", "_a", "_b"))
_CORE: Final = "lokr_t2"
_NOTHING: Final = np.zeros(0)


def read_lokr(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, tensors, (*_PARTS, _CORE)).items():
        ranks = [part.shape[int(name.endswith("_a") and _CORE not in parts)] for name, part in _stored_factors(parts)]
        rank = config.rank(module, ranks[0] if ranks else 0)
        scaling = config.for_module("alpha", "alpha_pattern", module, 8) / rank
        convolution = _convolution(config, module, parts, rank)
        left_1, right_1 = _factors(config, module, parts, "lokr_w1")
        if convolution is not None:
            product = np.kron(_kernelwise(left_1 @ right_1, convolution), convolution)
            values = check_size(config, module, as_float64(product), len(left_1) * len(convolution))
            deltas[f"{module}.weight"] = dense(values, scaling)
            continue
        left_2, right_2 = _factors(config, module, parts, "lokr_w2")
        deltas[f"{module}.weight"] = LowRank(np.kron(right_1, right_2), np.kron(left_1, left_2), scaling)
    return deltas


def _stored_factors(parts: Parts) -> list[tuple[str, Array]]:
    """Return the stored factors of w1 and w2, from whose shapes the rank follows."""
    return [(name, part) for name, part in parts.items() if name.endswith(("_a", "_b")) and part.ndim == 2]


def _convolution(config: PeftConfig, module: str, parts: Parts, rank: int) -> Float64Array | None:
    """Remove w2 of a convolution, (n_out, inputs of a group, kernel..), from the parts; None if it is a matrix."""
    if _CORE in parts:
        a, b = parts.pop("lokr_w2_a", _NOTHING), parts.pop("lokr_w2_b", _NOTHING)
        return from_core(config, module, rank, parts.pop(_CORE), a, b)
    whole = parts.get("lokr_w2")
    if whole is None or whole.ndim not in {3, 4}:
        return None
    return as_float64(parts.pop("lokr_w2"))


def _kernelwise(w1: Float64Array, w2: Float64Array) -> Float64Array:
    """Add kernel axes of size 1 to w1 if the kernel of w2 has two dimensions, as PEFT's make_kron does."""
    return w1[:, :, None, None] if w2.ndim == 4 else w1


def _factors(config: PeftConfig, module: str, parts: Parts, name: str) -> tuple[Float64Array, Float64Array]:
    """Return two matrices whose product is ``name``, with the lowest inner dimension possible."""
    pair = f"{name}_a", f"{name}_b"
    stored = [part for part in (name, *pair) if part in parts]
    if stored == [name]:
        whole = as_float64(expect(config, module, name, parts[name], (None, None)))
        n_out, n_in = whole.shape
        return (np.eye(n_out), whole) if n_out < n_in else (whole, np.eye(n_in))
    if stored != list(pair):
        raise AdapterError(
            f"{config.path.parent}: module {module!r} has {listed(stored) or 'nothing'}, expected {name} or {pair[0]} "
            f"and {pair[1]}"
        )
    left: Array = expect(config, module, pair[0], parts[pair[0]], (None, None))
    right = expect(config, module, pair[1], parts[pair[1]], (left.shape[1], None))
    n_out, rank, n_in = *left.shape, right.shape[1]
    if rank <= min(n_out, n_in):
        return as_float64(left), as_float64(right)
    product = as_float64(left) @ as_float64(right)
    return (np.eye(n_out), product) if n_out < n_in else (product, np.eye(n_in))
