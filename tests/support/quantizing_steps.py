"""The steps of a quantized tensor, found in the weights that gguf-py reads from it."""

import gguf
import numpy as np


def steps_by_gguf(path, name):
    """The mean over groups of 16 weights of the least distance between two weights of a group that differ."""
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == name)
    values = np.sort(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type).reshape(-1, 16), axis=1)
    gaps = np.diff(values, axis=1)
    gaps[gaps < 1e-6 * np.abs(values).max()] = np.inf
    least = gaps.min(axis=1)
    return float(least[np.isfinite(least)].mean())
