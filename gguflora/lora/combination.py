"""The methods of `combine`: from the deltas of several adapters to one delta."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.deltas import LowRank, as_float64, fold
from gguflora.errors import MismatchError, UnsupportedAdapterError, listed
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import ComputedPairs, FactoredAdapter, is_embedding
from gguflora.lora.low_rank import Dense, Fit, RankRule, Uncut, cut, values_of
from gguflora.lora.output import rounding
from gguflora.lora.task_arithmetic import METHODS, combine_arrays
from gguflora.lora.uncut import UncutAdapter
from gguflora.quants.arrays import Float64Array

Masks = Callable[[int, str, str, tuple[int, ...]], NDArray[np.bool_]]
"""Returns the mask of values that DARE keeps.

Arguments: index of the adapter, name of the weight, array ("a", "b" or "delta"), shape of the array.
"""

WeightsOf = Callable[[str], Sequence[float]]
"""Returns the weight of each adapter for the model's weight of a name."""


def random_mask(
    seed: int, density: float, adapter: int, name: str, part: str, shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Draw the values that DARE keeps; the draws of each adapter, weight and factor are independent of the order."""
    rng = np.random.default_rng([seed, adapter, zlib.crc32(f"{name} {part}".encode())])
    return rng.random(shape, np.float32) < density


@dataclass(frozen=True, slots=True)
class Combination:
    """The options of one combination."""

    method: str
    rank: int | None
    density: float
    sign: str
    convention: str
    masks: Masks
    out: Path
    outtype: str

    def prepare(self, wholes: Sequence[UncutAdapter], weights_of: WeightsOf, fits: dict[str, Fit]) -> ComputedPairs:
        """Return the combined deltas, which are computed when they are read.

        Args:
            wholes: the adapters, whose weights have the names of the output.
            weights_of: the weights of the adapters.
            fits: receives how well each delta fits, for methods that end with an SVD.

        Raises:
            UnsupportedAdapterError: if a delta is not of low rank and the method needs factors.
            MismatchError: if deltas of one weight differ in shape, or in rank where the method needs equal ranks.
        """
        rank = self._rank_of(wholes)
        terms = {
            name: _terms(name, wholes, weights_of(name))
            for name in dict.fromkeys(n for whole in wholes for n in whole.deltas)
        }
        for name, parts in terms.items():
            _check_shapes(name, parts, [whole.source for whole in wholes])
            if self.method in METHODS:
                self._check_ranks(name, parts)

        def compute(name: str) -> LowRank:
            parts = terms[name]
            if self.method == "cat":
                return _concatenate(parts)
            if not self.method.endswith("svd"):
                return self._by_factors(name, parts)
            total = _sum(parts) if self.method == "svd" else self._dense_sum(name, parts)
            pair, fits[name] = cut(total, RankRule(rank), rounding(name, self.out, self.outtype))
            return pair if pair.scaling == 1 else LowRank(pair.a, fold(pair), 1.0)

        return ComputedPairs(terms, compute)

    def _rank_of(self, wholes: Sequence[UncutAdapter]) -> int:
        """Return the rank of the result of an SVD: by default the highest of the adapters."""
        if self.rank is not None:
            return self.rank
        for whole in wholes:
            if whole.dense:
                advice = "give --rank" if self.method.endswith("svd") else "use --method svd with --rank"
                raise UnsupportedAdapterError(
                    f"{whole.source.path}: {len(whole.dense)} of {len(whole.deltas)} changes are not of low rank "
                    f"({listed(whole.dense)}); {advice}"
                )
        return max(delta.rank for whole in wholes for delta in whole.deltas.values() if isinstance(delta, LowRank))

    def _check_ranks(self, name: str, terms: Sequence[Term]) -> None:
        ranks = {term.low_rank.rank for term in terms}
        if len(ranks) > 1:
            raise MismatchError(
                f"{name}: the adapters have ranks {listed([str(rank) for rank in ranks])}, but {self.method} adds "
                "factors and needs equal ranks: use cat or svd, or resize the adapters first"
            )

    def _by_factors(self, name: str, terms: Sequence[Term]) -> LowRank:
        factors = [term.low_rank for term in terms]
        # PEFT puts the sign on its A; for an embedding A and B are swapped here
        flip = is_embedding(name)
        deltas = [delta.transposed() if flip else delta for delta in factors]
        sizes = [term.weight * delta.scaling for term, delta in zip(terms, factors, strict=True)]
        roots = [math.sqrt(abs(size)) for size in sizes]
        signed = [math.copysign(root, size) if size else 0.0 for root, size in zip(roots, sizes, strict=True)]
        a = self._arrays(name, "a", terms, [delta.a for delta in deltas], signed)
        b = self._arrays(name, "b", terms, [delta.b for delta in deltas], roots)
        combined = LowRank(a, b, 1.0)
        return combined.transposed() if flip else combined

    def _arrays(
        self, name: str, part: str, terms: Sequence[Term], arrays: Sequence[Array], weights: Sequence[float]
    ) -> Array:
        def mask(index: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
            return self.masks(terms[index].adapter, name, part, shape)

        method = self.method.removesuffix("_svd")
        numbers = [as_float32(array) for array in arrays]
        return combine_arrays(numbers, weights, method, self.density, self.sign, mask, self.convention)

    def _dense_sum(self, name: str, terms: Sequence[Term]) -> Dense:
        def values() -> Float64Array:
            deltas = [_to_dense(term.delta) for term in terms]
            return as_float64(self._arrays(name, "delta", terms, deltas, [term.weight for term in terms]))

        return Dense(terms[0].delta.shape, values)


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's delta of a weight. ``adapter`` is the index of the adapter."""

    adapter: int
    delta: Uncut
    weight: float

    @property
    def low_rank(self) -> LowRank:
        """The delta as factors."""
        assert isinstance(self.delta, LowRank)
        return self.delta


def _terms(name: str, wholes: Sequence[UncutAdapter], weights: Sequence[float]) -> list[Term]:
    pairs = enumerate(zip(wholes, weights, strict=True))
    return [Term(number, whole.deltas[name], weight) for number, (whole, weight) in pairs if name in whole.deltas]


def _check_shapes(name: str, terms: Sequence[Term], sources: Sequence[FactoredAdapter]) -> None:
    shapes = {term.delta.shape for term in terms}
    if len(shapes) > 1:
        by_adapter = ", ".join(f"{sources[term.adapter].path}: {term.delta.shape}" for term in terms)
        raise MismatchError(f"{name}: different shapes, so the adapters have different bases: {by_adapter}")


def _concatenate(terms: Sequence[Term], dtype: type[np.floating[Any]] = np.float32) -> LowRank:
    """Return the exact sum of the deltas; its rank is the sum of their ranks."""
    deltas = [(term.low_rank, term.weight) for term in terms]
    a = [(as_float64(delta.a) * (weight * delta.scaling)).astype(dtype) for delta, weight in deltas]
    b = [as_float32(delta.b).astype(dtype) for delta, _ in deltas]
    return LowRank(np.concatenate(a, axis=0), np.concatenate(b, axis=1), 1.0)


def _sum(terms: Sequence[Term]) -> Uncut:
    """Return the weighted sum of the deltas in double precision, since nearly equal ones may be subtracted."""
    if all(isinstance(term.delta, LowRank) for term in terms):
        return _concatenate(terms, np.float64)

    def values() -> Float64Array:
        total = terms[0].weight * values_of(terms[0].delta)
        for term in terms[1:]:
            total += term.weight * values_of(term.delta)
        return total

    return Dense(terms[0].delta.shape, values)


def _to_dense(delta: Uncut) -> NDArray[np.float32]:
    if isinstance(delta, Dense):
        return delta.values().astype(np.float32)
    return np.float32(delta.scaling) * (as_float32(delta.b) @ as_float32(delta.a))
