"""``inspect``: describe an adapter, its delta of each weight, and what llama.cpp cannot apply."""

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
from gguflora.architectures.unruled import unknown_warning
from gguflora.errors import HotSwapError, MismatchError, UnsupportedAdapterError, listed
from gguflora.files.gguf import GgufFile
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import weight_files
from gguflora.lora.preflight import problems_of
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas, read_values
from gguflora.placement.copies import describe_copies, without_copies
from gguflora.placement.language_part import language_part
from gguflora.placement.place import PlacedDelta, place
from gguflora.placement.prefix import fit_prefix
from gguflora.placement.rows import AnyRows
from gguflora.placement.target import ChangedTensor, changed_tensor

if TYPE_CHECKING:
    from gguflora.lora.spectra import RankChoice, Spectrum

_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class InspectedChange:
    """The delta of one weight.

    Attributes:
        name: name of the base's tensor; without a base, name of the Hugging Face weight.
        shape: shape of the tensor; None if it depends on a base that was not given.
        rank: rank of the delta; None if it is not known to be of low rank.
        factor: scaling of the delta, alpha / rank or the method's equivalent; None for a sum of several parts.
        norm: Frobenius norm of the delta; None if it depends on a base that was not given.
        relative: norm of the delta divided by the norm of the base's tensor.
        problem: why llama.cpp cannot apply the delta at run time; None if it can.
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
        adapter: name of the adapter.
        path: path of its weights.
        method: ``peft_type`` of a PEFT adapter, "MLX", or "GGUF LoRA".
        sha256: SHA-256 of its weights.
        size: bytes of its weights.
        base: path of the base model, if one was given.
        architecture: GGUF name of the base's architecture, if it is known.
        changes: the delta of each weight.
        invocation_tokens: tokens that activate an aLoRA; empty for other adapters.
        virtual_tokens: number of virtual tokens of a soft prompt; 0 for other adapters.
        warnings: messages for the user.
        spectra: singular values of each delta, if requested.
        ranks: what lower ranks would keep, for all deltas and for each kind of module, if requested.
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
        """Number of deltas that llama.cpp cannot apply at run time."""
        return sum(delta.problem is not None for delta in self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        paths = {"path": str(self.path), "base": None if self.base is None else str(self.base)}
        return {**asdict(self), **paths, "problems": self.problems}


@remote_inputs(adapter="adapter", base="config")
def inspect(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    ranks: bool = False,
    text_only: bool = False,
    plot: str | os.PathLike[str] | None = None,
    trust_names: bool = False,
) -> InspectReport:
    """Describe an adapter. With a base, also measure its deltas and report what llama.cpp cannot apply.

    Args:
        adapter: PEFT or mlx-lm directory, or GGUF LoRA file.
        base: its base model: a GGUF file, or a directory with ``config.json``, whose weights are not read.
        ranks: compute the singular values of each delta and what lower ranks would keep.
        text_only: take only the part of a multimodal model's adapter that changes the language model.
        plot: path of a plot of the singular values to write (PNG, SVG or PDF); needs matplotlib.
        trust_names: apply the adapter by name and shape where the order of a tensor's rows is not known.

    Raises:
        GgufloraError: if the inputs cannot be read or do not fit together, or the plot cannot be written.
    """
    if is_soft_prompt(adapter) and not ranks and plot is None:
        return _inspect_soft_prompt(Path(adapter), base)
    source = language_part(read_adapter(adapter)) if text_only else read_adapter(adapter)
    model = None if base is None else read_base(base, trust_names=trust_names)
    spectra, choices = _find_spectra(source, adapter, model, plot) if ranks or plot is not None else ((), ())
    warnings = list(source.warnings)
    if model is None:
        changes = tuple(_describe_without_base(name, parts) for name, parts in source.deltas.items())
        if source.from_base_shapes:
            warnings.append(f"the changes of {source.method} depend on the base: give it with --base")
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


def _find_spectra(
    source: Adapter,
    path: str | os.PathLike[str],
    model: BaseModel | None,
    plot: str | os.PathLike[str] | None,
) -> tuple[tuple[Spectrum, ...], tuple[RankChoice, ...]]:
    from gguflora.lora.factored import NEARLY_ALL, factor  # noqa: PLC0415  (seldom asked for)
    from gguflora.lora.plots import plot_spectra  # noqa: PLC0415
    from gguflora.lora.spectra import rank_choices, spectra_of  # noqa: PLC0415

    factored = factor(source, path, model, energy=NEARLY_ALL)
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


def _describe_without_base(name: str, parts: Sequence[Delta | ShapeDependentDelta]) -> InspectedChange:
    """Describe a delta as far as that is possible without a base."""
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
    """Return the deltas on a base, and warnings about the file as a whole."""
    problems: dict[str, str] = {}
    if source.architecture is not None:
        try:
            problems = problems_of(source.path, model)
        except HotSwapError as error:
            changes = (_describe_without_base(name, parts) for name, parts in source.deltas.items())
            return tuple(replace(delta, problem="see the warning") for delta in changes), [str(error)]
    fit = {name: parts for name, parts in source.deltas.items() if _tensor_of(name) not in problems}
    unfit = [_describe_unfit(source, model, name, problem) for name, problem in problems.items()]
    fitting, told = _describe_fit(replace(source, deltas=fit), model)
    return (*fitting, *unfit), told


def _tensor_of(name: str) -> str:
    """Remove the expert's index from a name like ``<tensor>.<e>``."""
    tensor, _, expert = name.rpartition(".")
    return tensor if expert.isdecimal() else name


def _describe_unfit(source: Adapter, model: BaseModel, tensor: str, problem: str) -> InspectedChange:
    """Describe a delta that llama.cpp cannot load or apply."""
    parts = [part for name, parts in source.deltas.items() if _tensor_of(name) == tensor for part in parts]
    low = [part for part in parts if isinstance(part, LowRank)]
    if not low:  # a norm
        return InspectedChange(tensor, model.shapes.get(tensor), None, None, None, None, problem)
    norm = sum(_norm(part) ** 2 for part in low) ** 0.5
    return InspectedChange(tensor, model.shapes.get(tensor), low[0].rank, low[0].scaling, norm, None, problem)


def _describe_fit(source: Adapter, model: BaseModel) -> tuple[list[InspectedChange], list[str]]:
    if model.path.is_dir():
        return [_describe_placed(model, name, items, None) for name, items in place(source, model).items()], []
    whole = with_biases(model)
    with GgufFile(model.path) as file:
        everything = place(source, whole)
        placed = without_copies(file, everything)
        norms = _measure(file, {name: items for name, items in placed.items() if name not in whole.absent})
        norms |= {name: (_norm_of_new_bias(items), 0.0) for name, items in placed.items() if name in whole.absent}
        changes = [_describe_placed(whole, name, items, norms.get(name)) for name, items in placed.items()]
        unread = [f"{name} is {file.tensors[name].type.name}" for name in placed if name not in norms]
        notes = [f"norms cannot be measured, as values cannot be read: {listed(unread, 4)}"] if unread else []
        return changes, [*describe_copies(everything, placed), *notes]


def _norm_of_new_bias(items: Sequence[PlacedDelta]) -> float:
    """Norm of the delta of a bias that the base does not have."""
    return float(np.linalg.norm(sum(item.compute(np.zeros(item.shape), 0) for item in items)))


def _describe_placed(
    model: BaseModel, name: str, items: Sequence[PlacedDelta], norms: tuple[float, float] | None
) -> InspectedChange:
    parts = [item.low_rank() for item in items]
    low = [part for part in parts if part is not None]
    rank = _rank(items, low) if len(low) == len(parts) else None
    scalings = {part.scaling for part in low}
    norm, base = norms or (None, None)
    return InspectedChange(
        name=name,
        shape=model.shapes.get(name),
        rank=rank,
        factor=scalings.pop() if len(scalings) == 1 and rank is not None else None,
        norm=norm,
        relative=norm / base if norm is not None and base else None,
        problem=_problem(model, name, is_low=rank is not None),
    )


def _rank(items: Sequence[PlacedDelta], parts: Sequence[LowRank]) -> int:
    """Rank of a tensor's delta: ranks of parts at the same rows add up, and the highest sum counts."""
    rank_at_row: dict[int, int] = {}
    for item, part in zip(items, parts, strict=True):
        rank_at_row[item.tensor_slice.start] = rank_at_row.get(item.tensor_slice.start, 0) + part.rank
    return max(rank_at_row.values())


def _problem(model: BaseModel, name: str, *, is_low: bool) -> str | None:
    reason = aborts_at_run_time(model, name) or ignored_at_run_time(model, name)
    if reason:
        return f"{reason}: merge it"
    return None if is_low else "it is not of low rank: merge it, or convert with --rank or --energy"


def _measure(file: GgufFile, placed: Mapping[str, Sequence[PlacedDelta]]) -> dict[str, tuple[float, float]]:
    """Return the norms of the delta and of the base's tensor, by tensor whose values can be read."""
    targets = {name: changed_tensor(file, name, items) for name, items in placed.items()}
    targets = {name: target for name, target in targets.items() if target.source.type.block_bytes}
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
