"""``combine``: merge several adapters into one, with the methods and semantics of PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.errors import AdapterError, MismatchError, listed
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import (
    FactoredAdapter,
    for_base,
    is_embedding,
    read_factored,
)
from gguflora.lora.low_rank import shrink, truncate
from gguflora.lora.output import check_output, write_adapter
from gguflora.lora.task_arithmetic import (
    METHODS,
    PRUNING,
    SIGNS,
    combine_arrays,
)

COMBINATIONS: Final = (*METHODS, "cat", "svd", *(f"{method}_svd" for method in METHODS[1:]))

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
        errors: relative error of each truncated delta, by name; only for methods that end with an SVD.
        warnings: messages for the user.
    """

    output: Path
    adapters: tuple[tuple[str, str, float], ...]
    method: str
    tensors: int
    ranks: tuple[int, int]
    size: int
    errors: dict[str, float]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(adapters="adapter", base="config")
def combine(
    adapters: Sequence[AdapterPath | tuple[AdapterPath, float]],
    out: str | os.PathLike[str],
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    seed: int = 0,
    base: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    masks: Masks | None = None,
    force: bool = False,
) -> CombineReport:
    """Combine adapters into one.

    A weight that only some adapters change is combined from those adapters. Methods without "svd" work on the factors
    (each is multiplied by the square root of ``weight * alpha / rank``, with the sign on A) and need equal ranks.
    "cat" concatenates the factors and is exact. "svd" is the best approximation of the sum and is computed from the
    factors. The other "_svd" methods hold one dense matrix per adapter in memory.

    The result scales each adapter by its own alpha / rank. PEFT does the same, except that the result inherits
    ``use_rslora`` from the first adapter and is then too strong by sqrt(rank); `tests/lora/test_combine.py` shows
    both.

    Args:
        adapters: PEFT directories and GGUF LoRA files, each alone (weight 1) or as ``(path, weight)``; a weight may be
            negative.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        method: ``linear``, ``cat``, ``svd``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, or one of
            the last four followed by ``_svd``.
        rank: rank of the result, for methods that end with an SVD; by default the highest rank of the adapters.
        density: share of the values that ``ties``, ``dare_*`` and ``magnitude_prune`` keep, in (0, 1].
        sign: how ``ties`` and ``dare_ties`` elect a sign: by ``total`` or by ``frequency``.
        seed: seed of the random choice of the values that DARE drops.
        base: base model of all adapters; needed to mix PEFT and GGUF adapters, to write one form from the other, and
            for deltas that are not of low rank.
        outtype: type of the factors in a GGUF file.
        masks: the values that DARE keeps; replaces ``seed``.
        force: overwrite ``out``.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    check_options(method, rank, density, sign)
    target, model = Path(out), None if base is None else read_base(base)
    weighted = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    weights = _checked_weights(weighted)
    inputs = [Path(path) for path, _ in weighted] + ([] if base is None else [Path(base)])
    check_output(target, inputs, outtype=outtype, force=force)
    sources = _unify_names([read_factored(path, model, rank) for path, _ in weighted], model)
    # for a single adapter PEFT ignores the method and only scales the factors
    effective, kept = method if len(sources) > 1 else "linear", 1.0 if density is None else density
    job = _Combination(effective, rank, kept, sign, masks or partial(_mask, seed, kept))
    pairs, errors = job.run(sources, weights)
    combined = replace(sources[0], name=target.stem, pairs=pairs, warnings=_collect_warnings(sources))
    combined = replace(combined, invocation_tokens=_common_invocation_tokens(sources))
    written = write_adapter(combined, target, model, outtype, _describe_sources(sources, weights, method))
    return CombineReport(
        output=target,
        adapters=tuple((item.name, item.sha256, weight) for item, weight in zip(sources, weights, strict=True)),
        method=method,
        tensors=written.tensors,
        ranks=written.ranks,
        size=written.size,
        errors=errors,
        warnings=written.warnings,
    )


def check_options(method: str, rank: int | None, density: float | None, sign: str) -> None:
    """Check the options of `combine`.

    Raises:
        AdapterError: if one is unknown, impossible, or does not fit the method.
    """
    if method not in COMBINATIONS:
        raise AdapterError(f"method is {method!r}, expected one of {', '.join(COMBINATIONS)}")
    if sign not in SIGNS:
        raise AdapterError(f"sign is {sign!r}, expected one of {', '.join(SIGNS)}")
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


def _unify_names(sources: list[FactoredAdapter], base: BaseModel | None) -> list[FactoredAdapter]:
    """Bring all adapters to the same names: Hugging Face weights if all use them, else GGUF tensors."""
    kinds = {source.architecture for source in sources}
    if len(kinds) == 1 and base is None:
        return sources
    if kinds == {None}:
        return sources
    if base is None:
        raise MismatchError(
            "the adapters have different bases or file formats ("
            + ", ".join(f"{source.path}: {source.architecture or 'PEFT'}" for source in sources)
            + "): give the base model with --base"
        )
    return [for_base(source, base) for source in sources]


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

    def run(
        self, sources: Sequence[FactoredAdapter], weights: Sequence[float]
    ) -> tuple[dict[str, LowRank], dict[str, float]]:
        """Return the combined deltas and the relative errors of the truncated ones, both by name."""
        names = dict.fromkeys(name for source in sources for name in source.pairs)
        ranks = [delta.rank for source in sources for delta in source.pairs.values()]
        pairs, errors = {}, {}
        for name in names:
            terms = [
                _Term(number, source.pairs[name], weight)
                for number, (source, weight) in enumerate(zip(sources, weights, strict=True))
                if name in source.pairs
            ]
            _check_shapes(name, terms, sources)
            if self.method.endswith("svd"):
                pairs[name], errors[name] = self._by_svd(name, terms, self.rank or max(ranks))
            else:
                pairs[name] = _concatenate(terms) if self.method == "cat" else self._by_factors(name, terms)
        return pairs, errors

    def _by_factors(self, name: str, terms: Sequence[_Term]) -> LowRank:
        ranks = {term.delta.rank for term in terms}
        if len(ranks) > 1:
            raise MismatchError(
                f"{name}: the adapters have ranks {listed([str(rank) for rank in ranks])}, but {self.method} adds "
                "factors and needs equal ranks: use cat or svd, or resize the adapters first"
            )
        # PEFT puts the sign on its A; for an embedding A and B are swapped here
        flip = is_embedding(name)
        deltas = [term.delta.transposed() if flip else term.delta for term in terms]
        sizes = [term.weight * term.delta.scaling for term in terms]
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

    def _by_svd(self, name: str, terms: Sequence[_Term], rank: int) -> tuple[LowRank, float]:
        if self.method == "svd":
            return shrink(_concatenate(terms), rank, None)
        deltas = [_to_dense(term.delta) for term in terms]
        whole = self._arrays(name, "delta", terms, deltas, [term.weight for term in terms])
        return truncate(as_float64(whole), rank, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """One adapter's delta of a weight. ``adapter`` is the index of the adapter."""

    adapter: int
    delta: LowRank
    weight: float


def _check_shapes(name: str, terms: Sequence[_Term], sources: Sequence[FactoredAdapter]) -> None:
    shapes = {term.delta.shape for term in terms}
    if len(shapes) > 1:
        by_adapter = ", ".join(f"{sources[term.adapter].path}: {term.delta.shape}" for term in terms)
        raise MismatchError(f"{name}: different shapes, so the adapters have different bases: {by_adapter}")


def _concatenate(terms: Sequence[_Term]) -> LowRank:
    """Return the exact sum of the deltas; its rank is the sum of their ranks."""
    a = [as_float64(term.delta.a) * (term.weight * term.delta.scaling) for term in terms]
    b = [as_float32(term.delta.b) for term in terms]
    return LowRank(np.concatenate(a, axis=0).astype(np.float32), np.concatenate(b, axis=1), 1.0)


def _to_dense(delta: LowRank) -> NDArray[np.float32]:
    return np.float32(delta.scaling) * (as_float32(delta.b) @ as_float32(delta.a))
