"""LOKR: ``W + factor * kron(w1, w2)`` (https://arxiv.org/abs/2212.10650, https://arxiv.org/abs/2309.14859).

Each of w1 and w2 is saved whole (``lokr_w1``, ``lokr_w2``) or as two factors of rank r (``lokr_w1_a``, ``lokr_w1_b``,
...); factor is alpha / r in either case. The Kronecker product of products is the product of Kronecker products, so
factors of w1 and w2 (one of them the identity, where a matrix is whole) make factors of the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.config import PeftConfig
from gguflora.adapters.keys import Parts, by_module, expect, some
from gguflora.deltas import Change, LowRank, Values, as_float64
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array

_PARTS: Final = tuple(f"lokr_w{number}{suffix}" for number in (1, 2) for suffix in ("", "_a", "_b"))


def read_lokr(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Change]:
    """The change of every adapted weight.

    Raises:
        UnsupportedAdapterError: for convolutions.
    """
    changes: dict[str, Change] = {}
    for module, parts in by_module(config, tensors, (*_PARTS, "lokr_t2")).items():
        if "lokr_t2" in parts:
            raise UnsupportedAdapterError(
                f"{config.path.parent}: module {module!r} is a convolution, which no GGUF language model has"
            )
        rank = config.rank(module)
        left_1, right_1 = _factors(config, module, parts, "lokr_w1")
        left_2, right_2 = _factors(config, module, parts, "lokr_w2")
        factor = config.for_module("alpha", "alpha_pattern", module, 8) / rank
        changes[f"{module}.weight"] = LowRank(np.kron(right_1, right_2), np.kron(left_1, left_2), factor)
    return changes


def _factors(config: PeftConfig, module: str, parts: Parts, name: str) -> tuple[Values, Values]:
    """Two matrices whose product is ``name``, of the lowest rank that is known."""
    pair = f"{name}_a", f"{name}_b"
    found = [part for part in (name, *pair) if part in parts]
    if found == [name]:
        whole = as_float64(expect(config, module, name, parts[name], (None, None)))
        n_out, n_in = whole.shape
        return (np.eye(n_out), whole) if n_out < n_in else (whole, np.eye(n_in))
    if found != list(pair):
        raise AdapterError(
            f"{config.path.parent}: module {module!r} has {some(found) or 'nothing'}, expected {name} or {pair[0]} and "
            f"{pair[1]}"
        )
    left: Array = expect(config, module, pair[0], parts[pair[0]], (None, None))
    right = expect(config, module, pair[1], parts[pair[1]], (left.shape[1], None))
    n_out, rank, n_in = *left.shape, right.shape[1]
    if rank <= min(n_out, n_in):
        return as_float64(left), as_float64(right)
    product = as_float64(left) @ as_float64(right)
    return (np.eye(n_out), product) if n_out < n_in else (product, np.eye(n_in))
