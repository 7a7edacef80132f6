"""Compute the factors that a GGUF LoRA holds: one pair for each tensor, or a stack of pairs for expert tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.deltas import LowRank, Replace, ReplaceRows, as_float64, sum_factors
from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.mapping import can_untie
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Shape
from gguflora.files.safetensors import Array
from gguflora.lora.low_rank import Dense, RankRule, Uncut, shrink, truncate
from gguflora.placement.base_weights import BaseTensors, WholeTensorDeltas, read_values
from gguflora.placement.copies import describe_copies, without_copies, without_copy
from gguflora.placement.place import PlacedDelta, cautions, place
from gguflora.placement.rows import AnyRows
from gguflora.placement.target import changed_tensor
from gguflora.quants.arrays import Float64Array


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The factors of a tensor's delta ``scaling * b @ a``.

    Attributes:
        tensor: GGUF name of the tensor.
        a: (rank, n_in), or (n_experts, rank, n_in).
        b: (n_out, rank), or (n_experts, n_out, rank).
        scaling: alpha / rank.
        error: relative error if the delta was approximated, else None.
        cautions: messages for the user.
    """

    tensor: str
    a: Array
    b: Array
    scaling: float
    error: float | None = None
    cautions: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return int(self.a.shape[-2])


def factor_adapter(adapter: Adapter, base: BaseModel, rank: int | None, energy: float | None) -> list[Factors]:
    """Return the factors of every delta of an adapter.

    Args:
        adapter: the adapter.
        base: its base model; weights are read only for deltas that depend on them.
        rank: approximate deltas of a higher rank with this rank.
        energy: approximate deltas with the lowest rank that keeps this share of their squared norm.

    Raises:
        AdapterError: if the adapter changes nothing.
        UnsupportedAdapterError: if a delta is not of low rank and may not be approximated, or llama.cpp cannot apply
            it.
    """
    placed = place(adapter, base)
    if not placed:
        raise AdapterError(f"{adapter.path}: changes no weight; there is nothing to convert")
    if base.path.is_dir():
        kept = _without_base_copies(placed)
        _refuse_tied(adapter, base, kept)
        factored = _factor_all(adapter, base, None, kept, rank, energy)
    else:
        with GgufFile(base.path) as file:
            kept = without_copies(file, placed)
            _refuse_tied(adapter, base, kept)
            factored = _factor_all(adapter, base, file, kept, rank, energy)
    told = tuple(describe_copies(placed, kept))
    return [replace(factors, cautions=(*factors.cautions, *told)) for factors in factored[:1]] + factored[1:]


def uncut_factors(adapter: Adapter, base: BaseModel, files: ExitStack) -> tuple[dict[str, Uncut], list[str]]:
    """Return every delta of an adapter whole, and messages for the user.

    Args:
        adapter: the adapter.
        base: its base model; weights are read only for deltas that depend on them.
        files: keeps the base's file open for the deltas that are computed later.

    Returns:
        The deltas by tensor name; expert e of a stack gets the name ``<tensor>.<e>``.

    Raises:
        AdapterError: if the adapter changes nothing.
        UnsupportedAdapterError: if a delta needs the base's weights and the base is a directory, or llama.cpp cannot
            apply it.
    """
    placed = place(adapter, base)
    if not placed:
        raise AdapterError(f"{adapter.path}: changes no weight")
    file = None if base.path.is_dir() else files.enter_context(GgufFile(base.path))
    placed = _without_base_copies(placed) if file is None else without_copies(file, placed)
    _refuse_tied(adapter, base, placed)
    factorization = _Factorization(file, placed, None, None)
    deltas: dict[str, Uncut] = {}
    texts: list[str] = []
    failed = []
    for name, items in placed.items():
        factors = factorization.factor(name, items, base.shapes[name])
        if factors is not None:
            deltas |= unstacked([factors])
        elif file is None or _is_vector(name, base.shapes[name]):
            failed.append(name)
        else:
            deltas |= factorization.dense(name, base.shapes[name])
            texts += cautions(file, {name: items})
    if failed:
        raise _not_low_rank(adapter, base, failed, len(placed))
    return deltas, list(dict.fromkeys(texts))


def unstacked(factored: Sequence[Factors]) -> dict[str, LowRank]:
    """Return pairs by tensor name; expert e of a stack gets the name ``<tensor>.<e>``."""
    pairs = {}
    for item in factored:
        if item.a.ndim == 2:
            pairs[item.tensor] = LowRank(item.a, item.b, item.scaling)
        else:
            for expert in range(len(item.a)):
                pairs[f"{item.tensor}.{expert}"] = LowRank(item.a[expert], item.b[expert], item.scaling)
    return pairs


def _without_base_copies(placed: dict[str, list[PlacedDelta]]) -> dict[str, list[PlacedDelta]]:
    """Drop deltas that are marked as copies of base weights; the weights to compare them to are not available."""
    kept = {
        name: [
            without_copy(item) if isinstance(item.delta, Replace) and item.delta.is_base_copy else item
            for item in items
        ]
        for name, items in placed.items()
    }
    changed = {name: [item for item in items if item is not None] for name, items in kept.items()}
    return {name: items for name, items in changed.items() if items}


def _refuse_tied(adapter: Adapter, base: BaseModel, placed: dict[str, list[PlacedDelta]]) -> None:
    changed = [name for name in (TOKEN_EMBEDDING, OUTPUT) if name in placed]
    if base.is_tied and changed:
        weights = " and ".join(item.weight for name in changed for item in placed[name][:1])
        advice = (
            "merge the adapter instead, which unties them"
            if can_untie(base)
            else f"it can be merged only if it changes both alike: {base.architecture} has no output weight of its own"
        )
        raise UnsupportedAdapterError(
            f"{adapter.path}: changes {weights}, but the output weight of {base.path} is tied to its token embedding: "
            f"llama.cpp aborts on such a LoRA; {advice}"
        )


def _factor_all(
    adapter: Adapter,
    base: BaseModel,
    file: GgufFile | None,
    placed: dict[str, list[PlacedDelta]],
    rank: int | None,
    energy: float | None,
) -> list[Factors]:
    factorization = _Factorization(file, placed, rank, energy)
    by_tensor = {name: factorization.factor(name, items, base.shapes[name]) for name, items in placed.items()}
    failed = [name for name, factors in by_tensor.items() if factors is None]
    if failed:
        raise _not_low_rank(adapter, base, failed, len(by_tensor))
    return [factors for factors in by_tensor.values() if factors is not None]


def _not_low_rank(adapter: Adapter, base: BaseModel, failed: list[str], n_changes: int) -> UnsupportedAdapterError:
    shown = ", ".join(failed[:6]) + (" ..." if len(failed) > 6 else "")
    subject = f"{adapter.path}: {len(failed)} of {n_changes} changes"
    if any(_is_vector(name, base.shapes[name]) for name in failed):
        return UnsupportedAdapterError(
            f"{subject} are of norms or biases, which a GGUF LoRA cannot hold: {shown}; merge the adapter instead"
        )
    hint = " with the base as a GGUF file" if base.path.is_dir() else ""
    return UnsupportedAdapterError(
        f"{subject} are not of low rank, as a GGUF LoRA must be: {shown}; merge the adapter, or approximate it with "
        f"--rank N or --energy 0.999{hint}"
    )


def _is_vector(name: str, shape: Shape) -> bool:
    """Whether a tensor is a norm or a bias, or a stack of the experts' biases."""
    return len(shape) < 2 or name.endswith(".bias")


class _Factorization:
    """Factors the deltas of one adapter; reads the base's weights only for deltas that need them."""

    def __init__(
        self, file: GgufFile | None, placed: dict[str, list[PlacedDelta]], rank: int | None, energy: float | None
    ) -> None:
        self._file = file
        self._rule = None if rank is None and energy is None else RankRule(rank, energy)
        known = {} if file is None else {name: items for name, items in placed.items() if name in file.tensors}
        self._targets = (
            {} if file is None else {name: changed_tensor(file, name, items) for name, items in known.items()}
        )
        self._whole = None if file is None else WholeTensorDeltas(BaseTensors(file), list(self._targets.values()))

    def factor(self, name: str, items: Sequence[PlacedDelta], shape: Shape) -> Factors | None:
        """Return the factors of one tensor's delta, or None if it has none."""
        if _is_vector(name, shape):
            return None
        parts = [self._low_rank(item) for item in items]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return self._approximate_tensor(name, shape)
        stack = _stack(name, items, known, shape)
        rule = self._rule
        fits = rule is None or (rule.rank is not None and stack.rank <= rule.rank)
        return stack if rule is None or fits else _shrink(stack, rule)

    def _low_rank(self, item: PlacedDelta) -> LowRank | None:
        """Return a slice's factors or None. For replaced rows, A is the difference from the base, B selects rows."""
        if isinstance(item.delta, ReplaceRows) and self._file is not None and item.tensor_slice.rows is None:
            tensor = self._file.tensors[item.tensor_slice.tensor]
            ids = item.delta.ids[item.delta.ids < tensor.n_rows]
            if len(ids) < len(item.delta.ids):
                return None
            old = np.concatenate([read_values(self._file, tensor, row, row + 1) for row in ids])
            b = np.zeros((tensor.n_rows, len(ids)), np.float32)
            b[ids, np.arange(len(ids))] = 1.0
            return LowRank((as_float64(item.delta.values) - old).astype(np.float32), b, 1.0)
        return item.low_rank()

    def _approximate_tensor(self, name: str, shape: Shape) -> Factors | None:
        if self._rule is None or self._file is None:
            return None
        self._rule.check()
        pairs = [truncate(delta.values(), self._rule) for delta in self.dense(name, shape).values()]
        placed = {name: [item for item, _ in self._targets[name].deltas]}
        return replace(_join_approximations(name, pairs, shape), cautions=cautions(self._file, placed))

    def dense(self, name: str, shape: Shape) -> dict[str, Dense]:
        """Return the delta of one tensor as matrices, one for each expert; needs the base's file."""
        assert self._whole is not None
        target, whole, (n_out, n_in) = self._targets[name], self._whole, shape[-2:]
        starts = range(0, target.source.n_rows, n_out)

        def values(start: int) -> Float64Array:
            return AnyRows(target.source, start, start + n_out, target.deltas, whole).delta(start, start + n_out)

        names = [f"{name}.{number}" if len(shape) > 2 else name for number in range(len(starts))]
        return {part: Dense((n_out, n_in), partial(values, start)) for part, start in zip(names, starts, strict=True)}


def _shrink(factors: Factors, rule: RankRule) -> Factors:
    rule.check()
    stacked = factors.a.ndim == 3
    a, b = (factors.a, factors.b) if stacked else (factors.a[None], factors.b[None])
    pairs = [shrink(LowRank(x, y, factors.scaling), rule) for x, y in zip(a, b, strict=True)]
    return _join_approximations(factors.tensor, pairs, (0,) * (3 if stacked else 2))


def _join_approximations(name: str, pairs: Sequence[tuple[LowRank, float]], shape: Shape) -> Factors:
    """Join the approximations of a tensor's experts; the error is that of the worst one."""
    rank = max(pair.rank for pair, _ in pairs)
    a = np.stack([_pad_rank(pair.a, rank, axis=0) for pair, _ in pairs])
    b = np.stack([_pad_rank(pair.b, rank, axis=1) for pair, _ in pairs])
    a, b = (a, b) if len(shape) == 3 else (a[0], b[0])
    return Factors(name, a, b, 1.0, max(error for _, error in pairs))


def _pad_rank(array: Float64Array | Array, rank: int, axis: int) -> Array:
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - array.shape[axis])
    return np.pad(array, missing)


def _stack(name: str, items: Sequence[PlacedDelta], parts: Sequence[LowRank], shape: Shape) -> Factors:
    """Return the sum of the parts, each placed at its rows of the tensor."""
    n_out, n_in = shape[-2:]
    if len(parts) == 1 and parts[0].shape == shape:
        return Factors(name, parts[0].a, parts[0].b, parts[0].scaling)
    factors = {part.scaling for part in parts}
    common = factors.pop() if len(factors) == 1 else None  # kept apart from B, which then stays as it was stored
    experts: dict[int, list[LowRank]] = {}
    for item, part in zip(items, parts, strict=True):
        expert, row = divmod(item.tensor_slice.start, n_out)
        plain = part if common is None else replace(part, scaling=1.0)
        experts.setdefault(expert, []).append(_with_zero_rows(plain, row, n_out))
    scaling = 1.0 if common is None else common
    if len(shape) == 2:
        a, b = sum_factors((part, 1.0) for part in experts[0])
        return Factors(name, a, b, scaling)
    rank = max(sum(part.rank for part in group) for group in experts.values())
    a = np.zeros((shape[0], rank, n_in), np.float32)
    b = np.zeros((shape[0], n_out, rank), np.float32)
    for expert, group in experts.items():
        expert_a, expert_b = sum_factors((part, 1.0) for part in group)
        a[expert, : len(expert_a)], b[expert, :, : len(expert_a)] = expert_a, expert_b
    return Factors(name, a, b, scaling)


def _with_zero_rows(part: LowRank, first: int, n_out: int) -> LowRank:
    """Place a delta at row ``first`` of a matrix with ``n_out`` rows."""
    below = n_out - first - part.b.shape[0]
    return part if not first and not below else LowRank(part.a, np.pad(part.b, [(first, below), (0, 0)]), part.scaling)
