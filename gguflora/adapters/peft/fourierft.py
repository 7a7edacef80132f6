"""FourierFT: a few learned entries of the delta's discrete Fourier transform (https://arxiv.org/abs/2405.03003).

Tensor of a module: ``fourierft_spectrum`` (n,). The positions of its entries are the first n numbers of
``torch.randperm(n_out * n_in)`` with the seed ``random_loc_seed``; all other entries are 0. The delta is ``scaling``
times the real part of the inverse transform (``peft.tuners.fourierft.layer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, ShapeDependentDelta, as_float64
from gguflora.adapters.numerics.torch_rng import TorchGenerator
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_fourierft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    scaling = config.number("scaling", 150)
    deltas = {}
    for module, parts in by_module(config, tensors, ["fourierft_spectrum"]).items():
        (spectrum,) = take(config, module, parts, "fourierft_spectrum")
        expect(config, module, "fourierft_spectrum", spectrum, (None,))
        deltas[f"{module}.weight"] = _with_shape(config, module, spectrum, scaling)
    return deltas


def _with_shape(config: PeftConfig, module: str, spectrum: Array, scaling: float) -> ShapeDependentDelta:
    def build(shape: tuple[int, int]) -> Delta:
        positions = random_positions(config, module, shape, len(spectrum))
        return FunctionDelta(shape, partial(_transform, spectrum, positions, scaling), whole=True)

    return ShapeDependentDelta((None, None), build)


def random_positions(config: PeftConfig, module: str, shape: tuple[int, int], count: int) -> tuple[Indices, Indices]:
    """Return rows and columns of the entries that FourierFT and WaveFT learn.

    Args:
        config: configuration of the adapter.
        module: name of the module, for messages.
        shape: shape (n_out, n_in) of the weight.
        count: number of learned entries.

    Raises:
        AdapterError: if there are more entries than weights.
    """
    if count > shape[0] * shape[1]:
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: has {count} entries for a weight of shape {shape}"
        )
    return _positions(int(config.number("random_loc_seed", 777)), shape, count)


@lru_cache(maxsize=32)  # the layers of a model have only a few different shapes
def _positions(seed: int, shape: tuple[int, int], count: int) -> tuple[Indices, Indices]:
    rows, columns = np.divmod(TorchGenerator(seed).randperm(shape[0] * shape[1], count), shape[1])
    return rows, columns


def _transform(
    spectrum: Array, positions: tuple[Indices, Indices], scaling: float, w: Float64Array, rows: Indices
) -> Float64Array:
    # the real part of the transform is the transform of the Hermitian part, and irfft2 needs only half of that
    n_out, n_in = w.shape
    half = np.zeros((n_out, n_in // 2 + 1))
    values = as_float64(spectrum) / 2
    for sign in (1, -1):
        u, v = sign * positions[0] % n_out, sign * positions[1] % n_in
        kept = v <= n_in // 2
        np.add.at(half, (u[kept], v[kept]), values[kept])
    delta: Float64Array = scaling * np.fft.irfft2(half, s=w.shape)
    return delta
