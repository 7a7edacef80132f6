"""Weights of convolutions as a core tensor and two factors (LoHa and LoKr with ``use_effective_conv2d``)."""

from __future__ import annotations

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import expect
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array


def from_core(config: PeftConfig, module: str, rank: int, core: Array, a: Array, b: Array) -> Float64Array:
    """Return ``w[o, i, k, l] = sum(core[p, q, k, l] * a[p, o] * b[q, i])``.

    Source: ``peft.tuners.loha.layer``, HadaWeightCP.

    Args:
        config: configuration of the adapter, for messages.
        module: name of the module, for messages.
        rank: rank of the factors.
        core: core tensor, (rank, rank, kernel, kernel), or (rank, rank, kernel, 1) for a one-dimensional convolution.
        a: first factor, (rank, n_out).
        b: second factor, (rank, inputs of a group).

    Returns:
        float64 array (n_out, inputs of a group, kernel, kernel).
    """
    expect(config, module, "the core", core, (rank, rank, None, None))
    expect(config, module, "its first factor", a, (rank, None))
    expect(config, module, "its second factor", b, (rank, None))
    result: Float64Array = np.einsum("pqkl,po,qi->oikl", as_float64(core), as_float64(a), as_float64(b), optimize=True)
    return result


def dense(values: Float64Array, scaling: float) -> LowRank:
    """Return ``scaling * values`` as a low-rank delta; its rank is low because a convolution has few columns."""
    n_out, n_in = values.shape
    return LowRank(np.eye(n_in), values, scaling) if n_in <= n_out else LowRank(values, np.eye(n_out), scaling)


def check_size(config: PeftConfig, module: str, values: Float64Array, n_out: int) -> Float64Array:
    """Reshape values to a matrix with ``n_out`` rows.

    Raises:
        AdapterError: if their number is not a multiple of ``n_out``.
    """
    if not n_out or values.size % n_out:
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: {values.size} numbers cannot be a weight of {n_out} rows"
        )
    return values.reshape(n_out, -1)
