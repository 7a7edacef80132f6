"""What an adapter is, what it does to each weight, and what llama.cpp would make of it: ``inspect``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gguflora.adapters.adapter import Adapter, read_adapter
from gguflora.adapters.deltas import (
    Delta,
    LowRank,
    ShapeDependentDelta,
    as_float64,
)
from gguflora.adapters.soft_prompt import first_task, is_soft_prompt, read_soft_prompt
from gguflora.architectures import aborts_at_run_time, ignored_at_run_time, with_biases
from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.architectures.mapping import unknown_warning
from gguflora.errors import HotSwapError, MismatchError, UnsupportedAdapterError
from gguflora.files.gguf import GgufFile
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import weight_files
from gguflora.lora.preflight import problems_of
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas, read_values
from gguflora.placement.copies import without_copies
from gguflora.placement.place import PlacedDelta, place
from gguflora.placement.prefix import fit_prefix
from gguflora.placement.rows import AnyRows
from gguflora.placement.target import ChangedTensor, changed_tensor

if TYPE_CHECKING:
    from gguflora.lora.spectra import RankChoice, Spectrum

_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class InspectedChange:
    """One change.

    Attributes:
        name: of the changed tensor in the base, or without a base of the weight in the Hugging Face model.
        shape: of the tensor; None where only a base would tell.
        rank: of the change; None if it is not known to be of low rank.
        scaling: alpha / rank, or what the method puts in its place; None for a sum of several parts.
        norm: Frobenius norm of the change; None where only a base would tell.
        relative: the same, divided by the norm of the base's tensor.
        problem: why llama.cpp could not apply it at run time.
    """

    name: str
    shape: tuple[int, ...] | None
    rank: int | None
    factor: float | None
    norm: float | None
    relative: float | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What `inspect` found.

    Attributes:
        adapter: its name.
        path: of its weights.
        method: ``peft_type`` of a PEFT adapter, "MLX", or "GGUF LoRA".
        sha256: of its weights.
        size: of its weights, in bytes.
        base: the base model, if one was given.
        architecture: of the base.
        changes: what it changes.
        invocation_tokens: of an activated LoRA.
        virtual_tokens: of a soft prompt, how many precede the first token.
        warnings: what the user should know.
        spectra: singular values of each change, if they were asked for.
        ranks: what lower ranks would keep, of all changes and of each kind of module, if that was asked for.
    """

    adapter: str
    path: Path
    method: str
    sha256: str
    size: int
    base: Path | None
    architecture: str | None
    changes: tuple[InspectedChange, ...]
    invocation_tokens: tuple[int, ...]
    warnings: tuple[str, ...]
    spectra: tuple[Spectrum, ...] = ()
    ranks: tuple[RankChoice, ...] = ()
    virtual_tokens: int = 0

    @property
    def problems(self) -> int:
        """Number of changes that llama.cpp could not apply at run time."""
        return sum(delta.problem is not None for delta in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        paths = {"path": str(self.path), "base": None if self.base is None else str(self.base)}
        return {**asdict(self), **paths, "problems": self.problems}


@remote_inputs(adapter="adapter", base="config")
def inspect(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    ranks: bool = False,
    plot: str | os.PathLike[str] | None = None,
) -> InspectReport:
    """Describe an adapter; with a base, measure its changes and say what llama.cpp cannot apply.

    Args:
        adapter: PEFT or mlx-lm directory, or GGUF LoRA file.
        base: its base model, a GGUF file, or a directory with ``config.json``, of which no weights are read.
        ranks: find the singular values of each change, and what lower ranks would keep.
        plot: draw the singular values into this picture (PNG, SVG or PDF); needs matplotlib.

    Raises:
        GgufloraError: if they cannot be read or do not fit together, or the picture cannot be written.
    """
    if is_soft_prompt(adapter) and not ranks and plot is None:
        return _inspect_soft_prompt(Path(adapter), base)
    source = read_adapter(adapter)
    model = None if base is None else read_base(base)
    spectra, choices = _spectra(adapter, model, plot) if ranks or plot is not None else ((), ())
    warnings = list(source.warnings)
    if model is None:
        changes = tuple(_alone(name, parts) for name, parts in source.deltas.items())
        if source.from_base_shapes:
            warnings.append(f"what {source.method} changes depends on the base: give one with --base")
    else:
        changes, about_file = _on_base(source, model)
        unknown = unknown_warning(model)
        warnings += [*about_file, *([] if unknown is None else [unknown])]
    return InspectReport(
        adapter=source.name,
        path=source.path,
        method=source.method,
        sha256=source.sha256,
        size=sum(path.stat().st_size for path in weight_files(source.path)),
        base=None if model is None else model.path,
        architecture=source.architecture if model is None else model.architecture,
        changes=changes,
        invocation_tokens=source.invocation_tokens,
        warnings=tuple(warnings),
        spectra=spectra,
        ranks=choices,
    )


def _spectra(
    adapter: str | os.PathLike[str], model: BaseModel | None, plot: str | os.PathLike[str] | None
) -> tuple[tuple[Spectrum, ...], tuple[RankChoice, ...]]:
    from gguflora.lora.factored import NEARLY_ALL, read_factored  # noqa: PLC0415  (seldom asked for)
    from gguflora.lora.plots import plot_spectra  # noqa: PLC0415
    from gguflora.lora.spectra import rank_choices, spectra_of  # noqa: PLC0415

    factored = read_factored(adapter, model, energy=NEARLY_ALL)
    spectra = spectra_of(factored.pairs)
    if plot is not None:
        plot_spectra(spectra, factored.name, Path(plot))
    return spectra, rank_choices(spectra)


def _inspect_soft_prompt(folder: Path, base: str | os.PathLike[str] | None) -> InspectReport:
    prompt = read_soft_prompt(folder, first_task(folder))
    model = None if base is None else read_base(base)
    warnings = []
    if model is not None:
        try:
            fit_prefix(prompt, model)
        except (MismatchError, UnsupportedAdapterError) as error:
            warnings.append(str(error))
    return InspectReport(
        adapter=prompt.name,
        path=prompt.path,
        method=prompt.method,
        sha256=prompt.sha256,
        size=prompt.path.stat().st_size,
        base=None if model is None else model.path,
        architecture=None if model is None else model.architecture,
        changes=(),
        invocation_tokens=(),
        warnings=tuple(warnings),
        virtual_tokens=prompt.n_virtual,
    )


def _alone(name: str, parts: Sequence[Delta | ShapeDependentDelta]) -> InspectedChange:
    """A change as far as it is known without a base."""
    part = parts[0] if len(parts) == 1 else None
    shape = None if isinstance(parts[0], ShapeDependentDelta) else parts[0].shape
    if not isinstance(part, LowRank):
        return InspectedChange(name, shape, None, None, None, None, None)
    return InspectedChange(name, shape, part.rank, part.scaling, _norm(part), None, None)


def _norm(delta: LowRank) -> float:
    """Frobenius norm of ``scaling * b @ a``, without the product."""
    a, b = as_float64(delta.a), as_float64(delta.b)
    return abs(delta.scaling) * float(np.sqrt(max(((b.T @ b) * (a @ a.T)).sum(), 0.0)))


def _on_base(source: Adapter, model: BaseModel) -> tuple[tuple[InspectedChange, ...], list[str]]:
    """The changes, and what is wrong with the file as a whole."""
    problems: dict[str, str] = {}
    if source.architecture is not None:
        try:
            problems = problems_of(source.path, model)
        except HotSwapError as error:
            changes = (_alone(name, parts) for name, parts in source.deltas.items())
            return tuple(replace(delta, problem="see the warning") for delta in changes), [str(error)]
    fit = {name: parts for name, parts in source.deltas.items() if _tensor_of(name) not in problems}
    unfit = [_unfit(source, model, name, problem) for name, problem in problems.items()]
    return (*_measured(replace(source, deltas=fit), model), *unfit), []


def _tensor_of(name: str) -> str:
    """The tensor of a GGUF LoRA's change, which may be one of expert e: ``<tensor>.<e>``."""
    tensor, _, expert = name.rpartition(".")
    return tensor if expert.isdecimal() else name


def _unfit(source: Adapter, model: BaseModel, tensor: str, problem: str) -> InspectedChange:
    """A change that llama.cpp could not load or apply."""
    parts = [part for name, parts in source.deltas.items() if _tensor_of(name) == tensor for part in parts]
    low = [part for part in parts if isinstance(part, LowRank)]
    norm = sum(_norm(part) ** 2 for part in low) ** 0.5
    return InspectedChange(tensor, model.shapes.get(tensor), low[0].rank, low[0].scaling, norm, None, problem)


def _measured(source: Adapter, model: BaseModel) -> list[InspectedChange]:
    if model.path.is_dir():
        return [_placed(model, name, items, None) for name, items in place(source, model).items()]
    whole = with_biases(model)
    with GgufFile(model.path) as file:
        placed = without_copies(file, place(source, whole))
        norms = _measure(file, {name: items for name, items in placed.items() if name not in whole.absent})
        norms |= {name: (_from_nothing(items), 0.0) for name, items in placed.items() if name in whole.absent}
        return [_placed(whole, name, items, norms[name]) for name, items in placed.items()]


def _from_nothing(items: Sequence[PlacedDelta]) -> float:
    """Norm of the change of a bias that the base does not have."""
    return float(np.linalg.norm(sum(item.compute(np.zeros(item.shape), 0) for item in items)))


def _placed(
    model: BaseModel, name: str, items: Sequence[PlacedDelta], norms: tuple[float, float] | None
) -> InspectedChange:
    parts = [item.low_rank() for item in items]
    low = [part for part in parts if part is not None]
    ranks = _ranks(items, low) if len(low) == len(parts) else None
    factors = {part.scaling for part in low}
    norm, base = norms or (None, None)
    return InspectedChange(
        name=name,
        shape=model.shapes.get(name),
        rank=ranks,
        factor=factors.pop() if len(factors) == 1 and ranks is not None else None,
        norm=norm,
        relative=norm / base if norm is not None and base else None,
        problem=_problem(model, name, is_low=ranks is not None),
    )


def _ranks(items: Sequence[PlacedDelta], parts: Sequence[LowRank]) -> int:
    """The rank of a sum of parts; of parts on top of each other, the highest."""
    by_place: dict[int, int] = {}
    for item, part in zip(items, parts, strict=True):
        by_place[item.tensor_slice.start] = by_place.get(item.tensor_slice.start, 0) + part.rank
    return max(by_place.values())


def _problem(model: BaseModel, name: str, *, is_low: bool) -> str | None:
    reason = aborts_at_run_time(model, name) or ignored_at_run_time(model, name)
    if reason:
        return f"{reason}: merge it"
    return None if is_low else "it is not of low rank: merge it, or convert with --rank or --energy"


def _measure(file: GgufFile, placed: Mapping[str, Sequence[PlacedDelta]]) -> dict[str, tuple[float, float]]:
    """Norms of the change and of the base's tensor."""
    targets = {name: changed_tensor(file, name, items) for name, items in placed.items()}
    whole = WholeTensorDeltas(BaseTensors(file), list(targets.values()))
    return {name: _norms(file, target, whole) for name, target in targets.items()}


def _norms(file: GgufFile, target: ChangedTensor, whole: WholeTensorDeltas) -> tuple[float, float]:
    tensor, delta, base = target.source, 0.0, 0.0
    n_rows = 1 if len(tensor.shape) == 1 else tensor.n_rows
    rows = AnyRows(tensor, 0, n_rows, target.deltas, whole)
    step = max(1, _BLOCK // tensor.n_in)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        delta += float((rows.delta(start, stop) ** 2).sum())
        base += float((read_values(file, tensor, start, stop) ** 2).sum())
    return delta**0.5, base**0.5
