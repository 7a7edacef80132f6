"""LOHA: ``W' = W + scaling * (a1 b1) o (a2 b2)``, with the Hadamard product o (https://arxiv.org/abs/2108.06098).

Source: PEFT, tuners/loha.

Tensors of a module: ``hada_w1_a``, ``hada_w2_a`` (n_out, r) and ``hada_w1_b``, ``hada_w2_b`` (r, n_in); scaling is
alpha / r. The Hadamard product of two matrices of rank r has rank r^2: its factors are the elementwise products of all
pairs of columns of a1, a2 and of all pairs of rows of b1, b2.

A convolution (Mamba's ``conv1d``) is treated as a matrix (n_out, inputs of a group * kernel). With
``use_effective_conv2d`` each of its two matrices has a core tensor as well, see `tucker.from_core`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.numerics.tucker import dense, from_core
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    Parts,
    by_module,
    expect,
    take,
)
from gguflora.files.safetensors import Array

_PARTS: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES: Final = ("hada_t1", "hada_t2")


def read_loha(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, tensors, (*_PARTS, *_CORES)).items():
        with_cores = any(core in parts for core in _CORES)
        deltas[f"{module}.weight"] = (_read_cores if with_cores else _read_factors)(config, module, parts)
    return deltas


def _scaling(config: PeftConfig, module: str, rank: int) -> float:
    return config.for_module("alpha", "alpha_pattern", module, 8) / rank


def _read_factors(config: PeftConfig, module: str, parts: Parts) -> LowRank:
    a1, b1, a2, b2 = take(config, module, parts, *_PARTS)
    rank = config.rank(module, a1.shape[-1])
    n_out, n_in = a1.shape[0], b1.shape[-1]
    for name, part, shape in zip(_PARTS, (a1, b1, a2, b2), [(n_out, rank), (rank, n_in)] * 2, strict=True):
        expect(config, module, name, part, shape)
    left = (as_float64(a1)[:, :, None] * as_float64(a2)[:, None, :]).reshape(n_out, -1)
    right = (as_float64(b1)[:, None] * as_float64(b2)[None]).reshape(-1, n_in)
    return LowRank(right, left, _scaling(config, module, rank))


def _read_cores(config: PeftConfig, module: str, parts: Parts) -> LowRank:
    a1, b1, a2, b2, core1, core2 = take(config, module, parts, *_PARTS, *_CORES)
    rank = config.rank(module, a1.shape[0])
    product = from_core(config, module, rank, core1, a1, b1) * from_core(config, module, rank, core2, a2, b2)
    return dense(product.reshape(len(product), -1), _scaling(config, module, rank))
