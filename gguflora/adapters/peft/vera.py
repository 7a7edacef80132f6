"""VERA: ``W' = W + diag(b) B diag(d) A`` (https://arxiv.org/abs/2310.11454; PEFT: tuners/vera/layer.py), and PVERA.

All modules share A (r, max n_in) and B (max n_out, r); each uses the first n_in columns and n_out rows. A module has
``vera_lambda_d`` (r) and ``vera_lambda_b`` (n_out). Without ``save_projection`` the file holds neither A nor B: they
are regenerated with torch's generator, and depend on the shapes of all adapted weights.

PVERA (PEFT: tuners/pvera/layer.py) samples its lambda from a distribution. A and d have 2 r rows; a merge uses the
first half, which gives the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.numerics.torch_rng import TorchGenerator
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    by_module,
    expect,
    split_shared,
    take,
)
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array


def read_vera(config: PeftConfig, tensors: Mapping[str, Array], base: BaseShapes) -> dict[str, Delta]:
    """Read the delta of every adapted weight of a VERA adapter."""
    return _read(config, tensors, base, "vera", 1)


def read_pvera(config: PeftConfig, tensors: Mapping[str, Array], base: BaseShapes) -> dict[str, Delta]:
    """Read the delta of every adapted weight of a PVERA adapter."""
    return _read(config, tensors, base, "pvera", 2)


def _read(
    config: PeftConfig, tensors: Mapping[str, Array], base: BaseShapes, method: str, multiple: int
) -> dict[str, Delta]:
    shared, own = split_shared(config, tensors, [f"{method}_A", f"{method}_B"])
    names = f"{method}_lambda_b", f"{method}_lambda_d"
    modules = by_module(config, own, names)
    shapes = {module: base.shape(f"{module}.weight") for module in modules}
    if shared:
        a, b = take(config, "base_model", shared, f"{method}_A", f"{method}_B")
    else:
        a, b = _projections(config, list(shapes.values()), multiple)
    deltas: dict[str, Delta] = {}
    for module, parts in modules.items():
        n_out, n_in = shapes[module]
        lambda_b, lambda_d = take(config, module, parts, *names)
        expect(config, module, names[0], lambda_b, (n_out,))
        expect(config, module, names[1], lambda_d, (a.shape[0],))
        rank = b.shape[1]
        if a.shape[0] != multiple * rank or a.shape[1] < n_in or b.shape[0] < n_out:
            raise AdapterError(
                f"{config.path.parent}: the shared A is {a.shape} and B is {b.shape}, too small for module {module!r} "
                f"with a weight of shape {(n_out, n_in)}"
            )
        left = as_float64(lambda_b)[:, None] * as_float64(b[:n_out])
        right = as_float64(lambda_d)[:rank, None] * as_float64(a[:rank, :n_in])
        deltas[f"{module}.weight"] = LowRank(right, left, 1.0)
    return deltas


def _projections(config: PeftConfig, shapes: Sequence[tuple[int, int]], multiple: int) -> tuple[Array, Array]:
    """Generate A and B from ``projection_prng_key`` as PEFT does."""
    rank = config.integer("r", 256, minimum=1)
    generator = TorchGenerator(config.integer("projection_prng_key", 0))
    n_out, n_in = max(n_out for n_out, _ in shapes), max(n_in for _, n_in in shapes)
    return generator.kaiming_uniform((multiple * rank, n_in)), generator.kaiming_uniform((n_out, rank))
