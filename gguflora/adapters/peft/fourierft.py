"""FourierFT: a few learned entries of the change's discrete Fourier transform (https://arxiv.org/abs/2405.03003).

Tensor of a module: ``fourierft_spectrum`` (n,). Its entries lie at the places that ``torch.randperm(n_out * n_in)``
with the seed ``random_loc_seed`` begins with; all others are 0, and the change is ``scaling`` times the real part of
the inverse transform (``peft.tuners.fourierft.layer``).
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
    """The change of every adapted weight."""
    scaling = config.number("scaling", 150)
    deltas = {}
    for module, parts in by_module(config, tensors, ["fourierft_spectrum"]).items():
        (spectrum,) = take(config, module, parts, "fourierft_spectrum")
        expect(config, module, "fourierft_spectrum", spectrum, (None,))
        deltas[f"{module}.weight"] = _unsized(config, module, spectrum, scaling)
    return deltas


def _unsized(config: PeftConfig, module: str, spectrum: Array, scaling: float) -> ShapeDependentDelta:
    def build(shape: tuple[int, int]) -> Delta:
        places = random_places(config, module, shape, len(spectrum))
        return FunctionDelta(shape, partial(_transform, spectrum, places, scaling), whole=True)

    return ShapeDependentDelta((None, None), build)


def random_places(config: PeftConfig, module: str, shape: tuple[int, int], count: int) -> tuple[Indices, Indices]:
    """Rows and columns of the entries that FourierFT and WaveFT learn.

    Raises:
        AdapterError: if there are more of them than the weight has.
    """
    if count > shape[0] * shape[1]:
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: has {count} entries for a weight of shape {shape}"
        )
    return _places(int(config.number("random_loc_seed", 777)), shape, count)


@lru_cache(maxsize=32)  # the layers of a model share a few shapes
def _places(seed: int, shape: tuple[int, int], count: int) -> tuple[Indices, Indices]:
    rows, columns = np.divmod(TorchGenerator(seed).randperm(shape[0] * shape[1], count), shape[1])
    return rows, columns


def _transform(
    spectrum: Array, places: tuple[Indices, Indices], scaling: float, w: Float64Array, rows: Indices
) -> Float64Array:
    # the real part of the transform is the transform of the Hermitian part, of which half is enough
    n_out, n_in = w.shape
    half = np.zeros((n_out, n_in // 2 + 1))
    values = as_float64(spectrum) / 2
    for sign in (1, -1):
        u, v = sign * places[0] % n_out, sign * places[1] % n_in
        kept = v <= n_in // 2
        np.add.at(half, (u[kept], v[kept]), values[kept])
    delta: Float64Array = scaling * np.fft.irfft2(half, s=w.shape)
    return delta
