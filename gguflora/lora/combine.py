"""``combine``: merge several adapters into one, with the methods and semantics of PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.errors import AdapterError, MismatchError, listed
from gguflora.files.remote import remote_inputs
from gguflora.lora.combination import Combination, Masks, WeightsOf, random_mask
from gguflora.lora.factored import FactoredAdapter
from gguflora.lora.layer_weights import LayerWeights, Weight, count_layers, describe_weight
from gguflora.lora.low_rank import Dense, Fit, Uncut, approximation_warnings, sum_fits
from gguflora.lora.output import check_output, for_output, is_gguf, write_adapter
from gguflora.lora.same_model import check_same_model
from gguflora.lora.saved_weights import sum_saved
from gguflora.lora.task_arithmetic import CONVENTIONS, METHODS, PRUNING, SIGNS
from gguflora.lora.uncut import UncutAdapter, read_uncut

_WITH_CONVENTIONS: Final = ("ties", "dare_linear", "dare_ties")
COMBINATIONS: Final = ("cat", "svd", *METHODS, *(f"{method}_svd" for method in METHODS[1:]))

AdapterPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What `combine` did.

    Attributes:
        output: path of the GGUF LoRA file or PEFT directory.
        adapters: name, SHA-256 and weight of each adapter; a weight is a number, a gradient, or a mapping of patterns.
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
    adapters: tuple[tuple[str, str, Weight], ...]
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
    adapters: Sequence[AdapterPath | tuple[AdapterPath, Weight]],
    out: str | os.PathLike[str],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    sign: str | None = None,
    seed: int | None = None,
    ties: str | None = None,
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
            negative. A list of numbers is a gradient: they are spread evenly over the layers and interpolated. A
            mapping from patterns to either gives each weight that of the first pattern that matches its name in the
            output, and 1 if none does.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        method: ``cat``, ``svd``, ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, or one of
            the last four followed by ``_svd``.
        rank: rank of the result, for methods that end with an SVD; by default the highest rank of the adapters.
        density: share of the values that ``ties``, ``dare_*`` and ``magnitude_prune`` keep, in (0, 1].
        sign: how ``ties`` and ``dare_ties`` elect a sign: by ``total`` (the default) or by ``frequency``.
        seed: seed of the random choice of the values that DARE drops; 0 by default.
        ties: convention of ``ties`` and ``dare_*``: ``peft`` (the default) elects signs before it applies the weights,
            and ``mergekit`` after that, on whole deltas, so that ``ties`` then means ``ties_svd``.
        base: base model of all adapters; needed to mix PEFT and GGUF adapters, to write one form from the other, and
            for deltas that are not of low rank.
        outtype: type of the factors in a GGUF file.
        masks: the values that DARE keeps; replaces ``seed``.
        force: overwrite ``out``.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    if ties == "mergekit" and method in _WITH_CONVENTIONS:
        method = f"{method}_svd"
    check_options(method, rank, density, sign, seed, ties)
    target, model = Path(out), None if base is None else read_base(base)
    weighted = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    given = _checked_weights(weighted)
    inputs = [Path(path) for path, _ in weighted] + ([] if base is None else [Path(base)])
    check_output(target, inputs, outtype=outtype, force=force)
    kept = 1.0 if density is None else density
    chosen = masks or partial(random_mask, seed or 0, kept)
    job = Combination(method, rank, kept, sign or "total", ties or "peft", chosen, target, outtype)
    fits: dict[str, Fit] = {}
    with ExitStack() as files:
        wholes = _unify_names(
            [read_uncut(path, model, files, keep_saved=not is_gguf(target)) for path, _ in weighted], model, target
        )
        sources = [whole.source for whole in wholes]
        weights_of = _weights_of(given, wholes, model)
        warnings = (*_collect_warnings(sources), *check_same_model(wholes))
        saved = sum_saved([whole.saved for whole in wholes], [whole.deltas for whole in wholes], weights_of, model)
        if saved:
            warnings = (*warnings, f"{listed(list(saved))}: whole weights, combined as their weighted sum")
            wholes = [replace(whole, deltas=_without(whole.deltas, saved)) for whole in wholes]
        combined = replace(
            sources[0],
            name=target.stem,
            pairs=job.prepare(wholes, weights_of, fits),
            saved=saved,
            warnings=tuple(dict.fromkeys(warnings)),
            invocation_tokens=_common_invocation_tokens(sources),
        )
        written = write_adapter(combined, target, model, outtype, _describe_sources(sources, given, method))
    dense = {name: delta for whole in wholes for name, delta in whole.deltas.items() if isinstance(delta, Dense)}
    fit = sum_fits(fits.values()) if fits else None
    return CombineReport(
        output=target,
        adapters=tuple((item.name, item.sha256, weight.given) for item, weight in zip(sources, given, strict=True)),
        method=method,
        tensors=written.tensors,
        ranks=written.ranks,
        size=written.size,
        errors={name: fit.error for name, fit in fits.items()},
        relative_error=None if fit is None else fit.error,
        energy=None if fit is None else fit.energy,
        warnings=(*written.warnings, *approximation_warnings(dense, fits)),
    )


def check_options(
    method: str,
    rank: int | None,
    density: float | None,
    sign: str | None,
    seed: int | None,
    ties: str | None = None,
) -> None:
    """Check the options of `combine`.

    Raises:
        AdapterError: if one is unknown, impossible, or does not fit the method.
    """
    if method not in COMBINATIONS:
        raise AdapterError(f"method is {method!r}, expected one of {', '.join(COMBINATIONS)}")
    if sign is not None and sign not in SIGNS:
        raise AdapterError(f"sign is {sign!r}, expected one of {', '.join(SIGNS)}")
    if ties is not None and ties not in CONVENTIONS:
        raise AdapterError(f"ties is {ties!r}, expected one of {', '.join(CONVENTIONS)}")
    if ties is not None and method.removesuffix("_svd") not in _WITH_CONVENTIONS:
        raise AdapterError(f"ties is {ties!r}, but {method} is the same in every convention: leave it out")
    if sign is not None and "ties" not in method:
        raise AdapterError(f"sign is {sign!r}, but {method} elects no signs: leave it out")
    if seed is not None and "dare" not in method:
        raise AdapterError(f"seed is {seed}, but {method} draws nothing at random: leave it out")
    if rank is not None and (rank < 1 or not method.endswith("svd")):
        raise AdapterError(f"rank is {rank} and method {method}; expected a positive rank and a method with svd")
    prunes = method.removesuffix("_svd") in PRUNING
    if prunes and (density is None or not 0 < density <= 1):
        raise AdapterError(f"density is {density}; {method} needs one above 0 and up to 1, for example 0.5")
    if not prunes and density is not None:
        raise AdapterError(f"density is {density}, but {method} does not prune: leave it out")


def _checked_weights(weighted: Sequence[tuple[AdapterPath, Weight]]) -> list[LayerWeights]:
    if not weighted:
        raise AdapterError("no adapters to combine: give at least one")
    return [LayerWeights.from_weight(weight, os.fspath(path)) for path, weight in weighted]


def _weights_of(given: Sequence[LayerWeights], wholes: Sequence[UncutAdapter], base: BaseModel | None) -> WeightsOf:
    names = [[*whole.deltas, *whole.saved] for whole in wholes]
    for weights, known, whole in zip(given, names, wholes, strict=True):
        weights.check_names(known, str(whole.source.path))
    n_layers = count_layers(name for known in names for name in known) if base is None else base.n_layers
    return lambda name: [weights.of(name, n_layers) for weights in given]


def _unify_names(wholes: list[UncutAdapter], base: BaseModel | None, out: Path) -> list[UncutAdapter]:
    """Bring all adapters to the names of the output, and check that they fit the base."""
    if base is None and len({whole.source.architecture for whole in wholes}) > 1:
        raise MismatchError(
            "the adapters have different bases or file formats ("
            + ", ".join(f"{whole.source.path}: {whole.source.architecture or 'PEFT'}" for whole in wholes)
            + "): give the base model with --base"
        )
    return [for_output(whole, base, out) for whole in wholes]


def _without(deltas: Mapping[str, Uncut], names: Container[str]) -> dict[str, Uncut]:
    return {name: delta for name, delta in deltas.items() if name not in names}


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


def _describe_sources(
    sources: Sequence[FactoredAdapter], weights: Sequence[LayerWeights], method: str
) -> dict[str, str]:
    pairs = zip(sources, weights, strict=True)
    names = ", ".join(f"{source.name} x {describe_weight(weight.given)}" for source, weight in pairs)
    return {"source": names, "source.sha256": ", ".join(source.sha256 for source in sources), "combined": method}
