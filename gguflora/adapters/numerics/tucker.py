"""Weights of convolutions by a core tensor and two factors (CP form of LoHa and LoKr, ``use_effective_conv2d``)."""

from __future__ import annotations

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import expect
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array


def from_core(config: PeftConfig, module: str, rank: int, core: Array, a: Array, b: Array) -> Float64Array:
    """``w[o, i, k, l] = sum(core[p, q, k, l] * a[p, o] * b[q, i])`` (``peft.tuners.loha.layer``, HadaWeightCP).

    Args:
        config: of the adapter, for messages.
        module: the same.
        rank: of the factors.
        core: (rank, rank, kernel, kernel); of a convolution over time, whose kernel is (k,), (rank, rank, k, 1).
        a: (rank, n_out).
        b: (rank, inputs of a group).
    """
    expect(config, module, "the core", core, (rank, rank, None, None))
    expect(config, module, "its first factor", a, (rank, None))
    expect(config, module, "its second factor", b, (rank, None))
    result: Float64Array = np.einsum("pqkl,po,qi->oikl", as_float64(core), as_float64(a), as_float64(b), optimize=True)
    return result


def dense(values: Float64Array, factor: float) -> LowRank:
    """A change by a matrix as it is: of a convolution it has few columns, so its rank is low."""
    n_out, n_in = values.shape
    return LowRank(np.eye(n_in), values, factor) if n_in <= n_out else LowRank(values, np.eye(n_out), factor)


def check_size(config: PeftConfig, module: str, values: Float64Array, n_out: int) -> Float64Array:
    """The numbers of a product as a matrix of ``n_out`` rows, in the order in which they lie in memory."""
    if not n_out or values.size % n_out:
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: {values.size} numbers cannot be a weight of {n_out} rows"
        )
    return values.reshape(n_out, -1)
