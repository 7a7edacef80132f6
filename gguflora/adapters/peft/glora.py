"""GLoRA: the weight scaled and shifted by low-rank matrices, the bias by the weight (https://arxiv.org/abs/2306.07967).

``W' = W + W * A + B`` and, where the layer has a bias, ``b' = b + b * D + E + W C`` (``peft.tuners.glora.layer``). Each
of A to E is stored as two factors ``glora_<A>.Xd`` and ``.Xu``, as ``glora_<A>.X``, which is broadcast to the shape, or
as ``glora_<A>.zeros``, which stands for 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gguflora.adapters.deltas import BiasFromWeight, Delta, FunctionDelta, LowRank, ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import Parts, by_module, expect
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_PARTS = [f"glora_{letter}.{kind}" for letter in "ABCDE" for kind in ("Xd", "Xu", "X", "zeros")]


def read_glora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight, and of its bias if the base has one."""
    deltas = {}
    for module, parts in by_module(config, tensors, _PARTS).items():
        paths = {letter: _path(config, module, parts, letter) for letter in "ABCDE"}
        deltas[f"{module}.weight"] = _weight(paths["A"], paths["B"])
        if any(paths[letter] is not None for letter in "CDE"):
            deltas[f"{module}.bias"] = _bias(module, paths["C"], paths["D"], paths["E"])
    return deltas


def _path(config: PeftConfig, module: str, parts: Parts, letter: str) -> LowRank | Array | None:
    """Return a product of factors, a stored column or a stored number; None for 0."""
    down, up, whole = (parts.get(f"glora_{letter}.{kind}") for kind in ("Xd", "Xu", "X"))
    if down is not None and up is not None and whole is None:
        expect(config, module, f"glora_{letter}.Xd", down, (None, None))
        expect(config, module, f"glora_{letter}.Xu", up, (down.shape[1], None))
        return LowRank(up, down, 1.0)
    if whole is not None and down is None and up is None:
        return expect(config, module, f"glora_{letter}.X", whole.reshape(-1, 1), (None, 1))
    if down is not None or up is not None or whole is not None:
        raise AdapterError(f"{config.path.parent}: module {module!r}: glora_{letter} is incomplete")
    return None


def _rows_of(path: LowRank | Array | None, w: Float64Array, rows: Indices) -> Float64Array:
    """Rows of a path, ready to be spread over those of the weight."""
    if path is None:
        return np.zeros((1, 1))
    if isinstance(path, LowRank):
        return path.compute(w, rows)
    return as_float64(path if len(path) == 1 else path[rows])


def _known(*paths: LowRank | Array | None) -> tuple[int | None, int | None]:
    """Return the sizes of the weight that follow from the paths."""
    for path in paths:
        if isinstance(path, LowRank):
            return path.shape
        if path is not None and len(path) > 1:
            return len(path), None
    return None, None


def _weight(a: LowRank | Array | None, b: LowRank | Array | None) -> ShapeDependentDelta:
    def delta(w: Float64Array, rows: Indices) -> Float64Array:
        return w * _rows_of(a, w, rows) + _rows_of(b, w, rows)

    return ShapeDependentDelta.formula(_known(a, b), delta)


def _bias(
    module: str, c: LowRank | Array | None, d: LowRank | Array | None, e: LowRank | Array | None
) -> ShapeDependentDelta:
    """Return the delta of a bias; if there is a C, it also depends on the layer's weight."""

    def build(shape: tuple[int, int]) -> Delta:
        def delta(w: Float64Array, rows: Indices) -> Float64Array:
            return w * _rows_of(d, w, rows) + _rows_of(e, w, rows)

        without_weight = FunctionDelta(shape, delta)
        if c is None:
            return without_weight
        vector = as_float64(c.b) @ as_float64(c.a) if isinstance(c, LowRank) else as_float64(c)
        return BiasFromWeight(shape, f"{module}.weight", vector, without_weight)

    return ShapeDependentDelta((_known(d, e)[0], 1), build, optional=True)
