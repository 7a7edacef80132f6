"""WaveFT: a few learned entries of the delta's wavelet transform (https://arxiv.org/abs/2505.12532).

Tensor of a module: ``waveft_spectrum`` (n,). The positions of its entries are the first n numbers of
``torch.randperm(n_out * n_in)`` with the seed ``random_loc_seed``. Without ``use_idwt`` the delta is ``scaling`` times
this sparse matrix. With ``use_idwt`` the matrix is padded and taken as the four quarters of one level of a wavelet
transform; the delta is the inverse transform, cropped to the weight's shape (``peft.tuners.waveft.layer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, ShapeDependentDelta, as_float64
from gguflora.adapters.numerics.sparse import add_sparse
from gguflora.adapters.numerics.wavelets import LOW_PASS
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.fourierft import random_positions
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import UnsupportedAdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def read_waveft(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight.

    Raises:
        UnsupportedAdapterError: for a wavelet whose filter PEFT does not have either.
    """
    family = str(config.fields.get("wavelet_family", "db1")).lower()
    inverse = config.fields.get("use_idwt", True) is not False
    if inverse and family not in LOW_PASS:
        raise UnsupportedAdapterError(f"{config.path}: wavelet_family is {family!r}; supported: {', '.join(LOW_PASS)}")
    deltas = {}
    for module, parts in by_module(config, tensors, ["waveft_spectrum"]).items():
        (spectrum,) = take(config, module, parts, "waveft_spectrum")
        expect(config, module, "waveft_spectrum", spectrum, (None,))
        deltas[f"{module}.weight"] = _with_shape(config, module, spectrum, family if inverse else None)
    return deltas


def _with_shape(config: PeftConfig, module: str, spectrum: Array, family: str | None) -> ShapeDependentDelta:
    values = as_float64(spectrum) * config.number("scaling", 25)

    def build(shape: tuple[int, int]) -> Delta:
        positions = random_positions(config, module, shape, len(spectrum))
        if family is None:
            return add_sparse(f"{config.path.parent}: module {module!r}", shape, *positions, values)
        return FunctionDelta(shape, partial(_transform, values, positions, np.array(LOW_PASS[family])), whole=True)

    return ShapeDependentDelta((None, None), build)


def _transform(
    values: Float64Array, positions: tuple[Indices, Indices], low: Float64Array, w: Float64Array, rows: Indices
) -> Float64Array:
    # PEFT pads by the difference between the filter's length and Haar's (2), and then to an even size
    padded = tuple(size + len(low) - 2 + (size + len(low)) % 2 for size in w.shape)
    matrix = np.zeros(padded)
    matrix[tuple(at + (wide - size) // 2 for at, wide, size in zip(positions, padded, w.shape, strict=True))] = values
    top, left = (size // 2 for size in padded)
    # PEFT applies the high-pass filter along the rows to the upper right quarter, so that one belongs at the lower left
    matrix = np.block([[matrix[:top, :left], matrix[top:, :left]], [matrix[:top, left:], matrix[top:, left:]]])
    result = _synthesize(_synthesize(matrix, low).T, low).T
    top, left = ((wide - size) // 2 for wide, size in zip(result.shape, w.shape, strict=True))
    return result[top : top + w.shape[0], left : left + w.shape[1]]


def _synthesize(halves: Float64Array, low: Float64Array) -> Float64Array:
    """Apply one level of the inverse transform along the rows; their upper half is the low-pass part."""
    count, taps = len(halves) // 2, len(low)
    high = low[::-1] * (-1.0) ** np.arange(taps)
    result = np.zeros((2 * count - 2 + taps, halves.shape[1]))
    for tap in range(taps):
        result[tap : tap + 2 * count : 2] += low[tap] * halves[:count] + high[tap] * halves[count:]
    cut = (2 * taps - 3) // 2
    return result[cut : len(result) - cut]
