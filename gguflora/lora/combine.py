"""``combine``: merge several adapters into one, with the methods and semantics of PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.errors import AdapterError, MismatchError, UnsupportedAdapterError, listed
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import FactoredAdapter, is_embedding
from gguflora.lora.low_rank import Dense, Fit, Uncut, approximation_warnings, cut, sum_fits, values_of
from gguflora.lora.output import check_output, for_output, rounding, write_adapter
from gguflora.lora.same_model import check_same_model
from gguflora.lora.task_arithmetic import (
    METHODS,
    PRUNING,
    SIGNS,
    combine_arrays,
)
from gguflora.lora.uncut import UncutAdapter, read_uncut
from gguflora.quants.arrays import Float64Array

COMBINATIONS: Final = ("cat", "svd", *METHODS, *(f"{method}_svd" for method in METHODS[1:]))

AdapterPath = str | os.PathLike[str]
Masks = Callable[[int, str, str, tuple[int, ...]], NDArray[np.bool_]]
"""Returns the mask of values that DARE keeps.

Arguments: index of the adapter, name of the weight, array ("a", "b" or "delta"), shape of the array.
"""


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What `combine` did.

    Attributes:
        output: path of the GGUF LoRA file or PEFT directory.
        adapters: name, SHA-256 and weight of each adapter.
        method: the method that combined them.
        tensors: number of weights that the result changes.
        ranks: smallest and largest rank of the factors.
        size: bytes of the factors.
        errors: relative error of each delta, by name, as it was written; only for methods that end with an SVD.
        relative_error: relative error of all deltas together; None for other methods.
        energy: share of the squared norm of all deltas that is kept; None for other methods.
        warnings: messages for the user.
    """

    output: Path
    adapters: tuple[tuple[str, str, float], ...]
    method: str
    tensors: int
    ranks: tuple[int, int]
    size: int
    errors: dict[str, float]
    relative_error: float | None
    energy: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(adapters="adapter", base="config")
def combine(
    adapters: Sequence[AdapterPath | tuple[AdapterPath, float]],
    out: str | os.PathLike[str],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str | None = None,
    seed: int | None = None,
    base: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    masks: Masks | None = None,
    force: bool = False,
) -> CombineReport:
    """Combine adapters into one.

    "cat" is the exact weighted sum of the deltas; the ranks add up. "svd" is the best approximation of that sum by a
    lower rank: it is added without cutting anything and then cut once. The other methods are those of PEFT's
    ``add_weighted_adapter``. Without "_svd" they work on the factors (each is multiplied by the square root of ``weight
    * alpha / rank``, with the sign on A) and need equal ranks; "linear" adds the factors, whose product is not the sum
    of the deltas. With "_svd" they work on the deltas and hold one dense matrix per adapter in memory. A weight that
    only some adapters change is combined from those adapters.

    The result scales each adapter by its own alpha / rank. PEFT does the same, except that the result inherits
    ``use_rslora`` from the first adapter and is then too strong by sqrt(rank); `tests/lora/test_combine.py` shows
    both.

    Args:
        adapters: PEFT directories and GGUF LoRA files, each alone (weight 1) or as ``(path, weight)``; a weight may be
            negative.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        method: ``cat``, ``svd``, ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, or one of
            the last four followed by ``_svd``.
        rank: rank of the result, for methods that end with an SVD; by default the highest rank of the adapters.
        density: share of the values that ``ties``, ``dare_*`` and ``magnitude_prune`` keep, in (0, 1].
        sign: how ``ties`` and ``dare_ties`` elect a sign: by ``total`` (the default) or by ``frequency``.
        seed: seed of the random choice of the values that DARE drops; 0 by default.
        base: base model of all adapters; needed to mix PEFT and GGUF adapters, to write one form from the other, and
            for deltas that are not of low rank.
        outtype: type of the factors in a GGUF file.
        masks: the values that DARE keeps; replaces ``seed``.
        force: overwrite ``out``.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    check_options(method, rank, density, sign, seed)
    target, model = Path(out), None if base is None else read_base(base)
    weighted = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    weights = _checked_weights(weighted)
    inputs = [Path(path) for path, _ in weighted] + ([] if base is None else [Path(base)])
    check_output(target, inputs, outtype=outtype, force=force)
    kept = 1.0 if density is None else density
    job = _Combination(method, rank, kept, sign or "total", masks or partial(_mask, seed or 0, kept), target, outtype)
    with ExitStack() as files:
        wholes = _unify_names([read_uncut(path, model, files) for path, _ in weighted], model, target)
        sources = [whole.source for whole in wholes]
        warnings = (*_collect_warnings(sources), *check_same_model(wholes))
        pairs, fits = job.run(wholes, weights)
    whole_deltas = {name: delta for whole in wholes for name, delta in whole.deltas.items() if isinstance(delta, Dense)}
    warnings = (*warnings, *approximation_warnings(whole_deltas, fits))
    combined = replace(sources[0], name=target.stem, pairs=pairs, warnings=tuple(dict.fromkeys(warnings)))
    combined = replace(combined, invocation_tokens=_common_invocation_tokens(sources))
    written = write_adapter(combined, target, model, outtype, _describe_sources(sources, weights, method))
    fit = sum_fits(fits.values()) if fits else None
    return CombineReport(
        output=target,
        adapters=tuple((item.name, item.sha256, weight) for item, weight in zip(sources, weights, strict=True)),
        method=method,
        tensors=written.tensors,
        ranks=written.ranks,
        size=written.size,
        errors={name: fit.error for name, fit in fits.items()},
        relative_error=None if fit is None else fit.error,
        energy=None if fit is None else fit.energy,
        warnings=written.warnings,
    )


def check_options(method: str, rank: int | None, density: float | None, sign: str | None, seed: int | None) -> None:
    """Check the options of `combine`.

    Raises:
        AdapterError: if one is unknown, impossible, or does not fit the method.
    """
    if method not in COMBINATIONS:
        raise AdapterError(f"method is {method!r}, expected one of {', '.join(COMBINATIONS)}")
    if sign is not None and sign not in SIGNS:
        raise AdapterError(f"sign is {sign!r}, expected one of {', '.join(SIGNS)}")
    if sign not in {None, "total"} and "ties" not in method:
        raise AdapterError(f"sign is {sign!r}, but {method} elects no signs: leave it out")
    if seed and "dare" not in method:
        raise AdapterError(f"seed is {seed}, but {method} draws nothing at random: leave it out")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        raise AdapterError(f"rank is {rank} and method {method}; expected a positive rank and a method with svd")
    prunes = method.removesuffix("_svd") in PRUNING
    if prunes and (density is None or not 0 < density <= 1):
        raise AdapterError(f"density is {density}; {method} needs one above 0 and up to 1, for example 0.5")
    if not prunes and density is not None:
        raise AdapterError(f"density is {density}, but {method} does not prune: leave it out")


def _checked_weights(weighted: Sequence[tuple[AdapterPath, float]]) -> list[float]:
    if not weighted:
        raise AdapterError("no adapters to combine: give at least one")
    for path, weight in weighted:
        if not abs(float(weight)) <= float(np.finfo(np.float32).max):
            raise AdapterError(f"{os.fspath(path)}: its weight is {weight}, expected a finite number")
    return [float(weight) for _, weight in weighted]


def _unify_names(wholes: list[UncutAdapter], base: BaseModel | None, out: Path) -> list[UncutAdapter]:
    """Bring all adapters to the names of the output, and check that they fit the base."""
    if base is None and len({whole.source.architecture for whole in wholes}) > 1:
        raise MismatchError(
            "the adapters have different bases or file formats ("
            + ", ".join(f"{whole.source.path}: {whole.source.architecture or 'PEFT'}" for whole in wholes)
            + "): give the base model with --base"
        )
    return [for_output(whole, base, out) for whole in wholes]


def _common_invocation_tokens(sources: Sequence[FactoredAdapter]) -> tuple[int, ...]:
    tokens = {source.invocation_tokens for source in sources}
    if len(tokens) > 1:
        raise MismatchError(
            "the adapters are activated by different tokens, which one adapter cannot express: "
            + ", ".join(f"{source.path}: {list(source.invocation_tokens) or 'always'}" for source in sources)
        )
    return tokens.pop()


def _collect_warnings(sources: Sequence[FactoredAdapter]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(warning for source in sources for warning in source.warnings))


def _describe_sources(sources: Sequence[FactoredAdapter], weights: Sequence[float], method: str) -> dict[str, str]:
    names = ", ".join(f"{source.name} x {weight:g}" for source, weight in zip(sources, weights, strict=True))
    return {"source": names, "source.sha256": ", ".join(source.sha256 for source in sources), "combined": method}


def _mask(seed: int, density: float, adapter: int, name: str, part: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Draw the values that DARE keeps; the draws of each adapter, weight and factor are independent of the order."""
    rng = np.random.default_rng([seed, adapter, zlib.crc32(f"{name} {part}".encode())])
    return rng.random(shape, np.float32) < density


@dataclass(frozen=True, slots=True)
class _Combination:
    """The options of one combination."""

    method: str
    rank: int | None
    density: float
    sign: str
    masks: Masks
    out: Path
    outtype: str

    def run(
        self, wholes: Sequence[UncutAdapter], weights: Sequence[float]
    ) -> tuple[dict[str, LowRank], dict[str, Fit]]:
        """Return the combined deltas and, for methods that end with an SVD, how well they fit; both by name."""
        names = dict.fromkeys(name for whole in wholes for name in whole.deltas)
        rank = self._rank_of(wholes)
        pairs, fits = {}, {}
        for name in names:
            terms = [
                _Term(number, whole.deltas[name], weight)
                for number, (whole, weight) in enumerate(zip(wholes, weights, strict=True))
                if name in whole.deltas
            ]
            _check_shapes(name, terms, [whole.source for whole in wholes])
            if self.method.endswith("svd"):
                total = _sum(terms) if self.method == "svd" else self._dense_sum(name, terms)
                pairs[name], fits[name] = cut(total, rank, None, rounding(name, self.out, self.outtype))
            else:
                pairs[name] = _concatenate(terms) if self.method == "cat" else self._by_factors(name, terms)
        return pairs, fits

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

    def _by_factors(self, name: str, terms: Sequence[_Term]) -> LowRank:
        factors = [term.low_rank for term in terms]
        ranks = {delta.rank for delta in factors}
        if len(ranks) > 1:
            raise MismatchError(
                f"{name}: the adapters have ranks {listed([str(rank) for rank in ranks])}, but {self.method} adds "
                "factors and needs equal ranks: use cat or svd, or resize the adapters first"
            )
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
        self, name: str, part: str, terms: Sequence[_Term], arrays: Sequence[Array], weights: Sequence[float]
    ) -> Array:
        def mask(index: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
            return self.masks(terms[index].adapter, name, part, shape)

        method = self.method.removesuffix("_svd")
        return combine_arrays([as_float32(array) for array in arrays], weights, method, self.density, self.sign, mask)

    def _dense_sum(self, name: str, terms: Sequence[_Term]) -> Dense:
        def values() -> Float64Array:
            deltas = [_to_dense(term.delta) for term in terms]
            return as_float64(self._arrays(name, "delta", terms, deltas, [term.weight for term in terms]))

        return Dense(terms[0].delta.shape, values)


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """One adapter's delta of a weight. ``adapter`` is the index of the adapter."""

    adapter: int
    delta: Uncut
    weight: float

    @property
    def low_rank(self) -> LowRank:
        """The delta as factors."""
        assert isinstance(self.delta, LowRank)
        return self.delta


def _check_shapes(name: str, terms: Sequence[_Term], sources: Sequence[FactoredAdapter]) -> None:
    shapes = {term.delta.shape for term in terms}
    if len(shapes) > 1:
        by_adapter = ", ".join(f"{sources[term.adapter].path}: {term.delta.shape}" for term in terms)
        raise MismatchError(f"{name}: different shapes, so the adapters have different bases: {by_adapter}")


def _concatenate(terms: Sequence[_Term], dtype: type[np.floating[Any]] = np.float32) -> LowRank:
    """Return the exact sum of the deltas; its rank is the sum of their ranks."""
    deltas = [(term.low_rank, term.weight) for term in terms]
    a = [(as_float64(delta.a) * (weight * delta.scaling)).astype(dtype) for delta, weight in deltas]
    b = [as_float32(delta.b).astype(dtype) for delta, _ in deltas]
    return LowRank(np.concatenate(a, axis=0), np.concatenate(b, axis=1), 1.0)


def _sum(terms: Sequence[_Term]) -> Uncut:
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
