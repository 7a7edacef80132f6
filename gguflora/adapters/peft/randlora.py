"""RandLoRA: random bases shared by all layers, each with learned factors (https://arxiv.org/abs/2502.00987).

All layers share ``base_model.randlora_A`` (r, 1, ..) and ``base_model.randlora_B`` (.., bases, r), which are large
enough for every module. A module has ``randlora_lambda`` l (r, n) and ``randlora_gamma`` g (n, m), where m is the
smaller of n_out and n_in. Its A is ``A[k, i] = l[k, i] A[k] * g[i]``, with the first two dimensions flattened; its B
has the first rows and n bases of the shared one, with the last two dimensions flattened. The delta is
``randlora_alpha / r * B A``, transposed if n_out < n_in (``peft.tuners.randlora``). Without ``save_projection`` the
shared A and B are regenerated from ``projection_prng_key``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, FunctionDelta, LowRank, as_float64
from gguflora.adapters.numerics.torch_rng import TorchGenerator
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    SHARED_PREFIX,
    Parts,
    by_module,
    expect,
    take,
)
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_SHARED = (f"{SHARED_PREFIX}randlora_A", f"{SHARED_PREFIX}randlora_B")
_OWN = ("randlora_lambda", "randlora_gamma")


@dataclass(frozen=True, slots=True, eq=False)
class _Bases:
    """The factors and scales of the delta of one weight."""

    a: Array
    b: Array
    scales: Array
    columns: Array
    scaling: float
    transposed: bool


def read_randlora(config: PeftConfig, tensors: Mapping[str, Array], base: BaseShapes) -> dict[str, Delta]:
    """Read the delta of every adapted weight."""
    own = {name: tensor for name, tensor in tensors.items() if name not in _SHARED}
    modules = by_module(config, own, [*_OWN, "randlora_A", "randlora_B"])
    shapes = {module: base.shape(f"{module}.weight") for module in modules}
    if all(name in tensors for name in _SHARED):
        a, b = (tensors[name] for name in _SHARED)
    else:
        a, b = _random_bases(config, int(config.number("r", 32)), list(shapes.values()))
    return {
        f"{module}.weight": _read_module(config, module, parts, shapes[module], a, b)
        for module, parts in modules.items()
    }


def _read_module(
    config: PeftConfig, module: str, parts: Parts, shape: tuple[int, int], a: Array, b: Array
) -> FunctionDelta:
    low, high = min(shape), max(shape)
    scales, columns = take(config, module, {name: part for name, part in parts.items() if name in _OWN}, *_OWN)
    rank, count = expect(config, module, _OWN[0], scales, (int(config.number("r", 32)), None)).shape
    expect(config, module, _OWN[1], columns, (count, low))
    expect(config, module, "randlora_A", a, (rank, 1, None))
    expect(config, module, "randlora_B", b, (None, None, rank))
    if a.shape[2] < low or b.shape[0] < high or b.shape[1] < count:
        raise AdapterError(
            f"{config.path.parent}: randlora_A {a.shape} and randlora_B {b.shape} are too small for {module!r} {shape}"
        )
    scaling = config.number("randlora_alpha", 640) / rank
    bases = _Bases(a, b[:high, :count], scales, columns, scaling, transposed=shape[0] < shape[1])
    return FunctionDelta(shape, partial(_multiply, bases))


def _multiply(bases: _Bases, w: Float64Array, rows: Indices) -> Float64Array:
    return _factors(bases).compute(w, rows)


@lru_cache(maxsize=2)  # reused for the next rows of the same weight; an entry is about as large as the weight
def _factors(bases: _Bases) -> LowRank:
    scales, columns = as_float64(bases.scales), as_float64(bases.columns)
    a = scales[:, :, None] * as_float64(bases.a[:, :, : columns.shape[1]]) * columns
    b = as_float64(bases.b)
    product = LowRank(a.reshape(-1, a.shape[2]), b.reshape(len(b), -1), bases.scaling)
    return product.transposed() if bases.transposed else product


def _random_bases(config: PeftConfig, rank: int, shapes: list[tuple[int, int]]) -> tuple[Array, Array]:
    """Generate A and B as PEFT does: uniform in bfloat16, or of -1, 0 and 1 with ``sparse`` or ``very_sparse``."""
    n_out, n_in = (max(sizes) for sizes in zip(*shapes, strict=True))
    low, high = min(n_out, n_in), max(n_out, n_in)
    count = -(-low // rank)
    generator = TorchGenerator(int(config.number("projection_prng_key", 0)))
    if config.flag("sparse") or config.flag("very_sparse"):
        sparsity = math.sqrt(low) if config.flag("very_sparse") else 3.0
        a, b = (_signs(generator.uniform(shape), sparsity) for shape in ((rank, 1, low), (high, count, rank)))
        return a / np.float32(_deviation(a)), b / np.float32(_deviation(b))
    a = _uniform(generator, (rank, 1, low))
    b = np.concatenate([_uniform(generator, (high, 1, rank)) for _ in range(count)], axis=1)
    return _bfloat16(a / _bfloat16(_deviation(a))), _bfloat16(b / _bfloat16(_deviation(b)))


def _deviation(values: NDArray[np.float32]) -> np.float64:
    return np.float64(values.std(ddof=1, dtype=np.float64))


def _uniform(generator: TorchGenerator, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """``kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=sqrt(5))``."""
    bound = 1 / math.sqrt(shape[1] * shape[2])
    values = _bfloat16(generator.uniform(shape, -bound, bound))
    # torch excludes the upper bound: a value that rounds to it becomes the lower bound
    return np.where(values == _bfloat16(np.float64(bound)), -values, values)


def _signs(uniform: NDArray[np.float32], sparsity: float) -> NDArray[np.float32]:
    edge = 1 / (2 * sparsity)
    return (uniform > np.float32(1 - edge)).astype(np.float32) - (uniform < np.float32(edge))


def _bfloat16(values: NDArray[np.float32] | np.float64) -> NDArray[np.float32]:
    """Round to the nearest bfloat16, ties to even, and return float32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
