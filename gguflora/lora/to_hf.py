"""Convert deltas of GGUF tensors back to deltas of Hugging Face weights; the inverse of `gguflora.placement`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures import TensorSlice
from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.mapping import adaptable_weights
from gguflora.errors import ArchitectureError, listed
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import FactoredAdapter, for_base
from gguflora.lora.low_rank import Dense, Uncut, values_of
from gguflora.quants.arrays import Float64Array, Indices

_TRANSPOSED: Final = {"llama4"}
"""Architectures whose expert parameters are (n_experts, n_in, n_out), which PEFT reads as (n_experts, n_out, n_in)."""

_TASKS: Final = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
"""PEFT's task types of architectures that are not causal language models."""


@dataclass(frozen=True, slots=True, eq=False)
class _DeltaPart:
    """The delta of one slice of a weight, in the slice's rows and columns, and the weight's rows that these are."""

    delta: LowRank
    rows: Array


def for_model(adapter: FactoredAdapter, base: BaseModel) -> FactoredAdapter:
    """Convert an adapter to the names and the row order of the Hugging Face model's weights.

    Raises:
        ArchitectureError: if a tensor has no counterpart in the Hugging Face model.
        GgufloraError: if adapter and base do not fit together.
    """
    if adapter.architecture is None:
        return adapter
    deltas = hf_deltas(for_base(adapter, base).pairs, base, adapter.path)
    pairs = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
    return replace(hf_fields(adapter, base), pairs=pairs)


def hf_fields(adapter: FactoredAdapter, base: BaseModel) -> FactoredAdapter:
    """Return an adapter without deltas, with the fields of ``adapter_config.json`` that a base's layers need."""
    fields = {"task_type": _TASKS.get(base.architecture, "CAUSAL_LM"), **adapter.fields}
    if base.architecture == "gpt2":  # its layers store their weights transposed
        fields["fan_in_fan_out"] = True
    return replace(adapter, pairs={}, architecture=None, fields=fields)


def hf_deltas(deltas: Mapping[str, Uncut], base: BaseModel, path: Path) -> dict[str, Uncut]:
    """Convert deltas of GGUF tensors to deltas of the Hugging Face model's weights.

    Args:
        deltas: the deltas by tensor; expert e of a stack is named ``<tensor>.<e>``.
        base: the base model.
        path: the adapter, for messages.

    Raises:
        ArchitectureError: if a tensor has no counterpart in the Hugging Face model.
    """
    weights = adaptable_weights(base)
    known_tensors = {_pair_name(tensor_slice, base) for slices in weights.values() for tensor_slice in slices}
    unknown_tensors = [name for name in deltas if name not in known_tensors]
    if unknown_tensors:
        raise ArchitectureError(
            f"{path}: {len(unknown_tensors)} of {len(deltas)} tensors have no module in a Hugging Face model of "
            f"{base.architecture}: {listed(unknown_tensors)}"
        )
    gathered = {name: _gather(deltas, slices, base) for name, slices in weights.items()}
    found = {name: delta for name, delta in gathered.items() if delta is not None}
    if base.architecture in _TRANSPOSED:
        found = {name: delta.transposed() if ".experts." in name else delta for name, delta in found.items()}
    return found


def _pair_name(tensor_slice: TensorSlice, base: BaseModel) -> str:
    """Return the name of the pair that holds a slice's delta."""
    shape = base.shapes[tensor_slice.tensor]
    return f"{tensor_slice.tensor}.{tensor_slice.start // shape[-2]}" if len(shape) > 2 else tensor_slice.tensor


def _gather(deltas: Mapping[str, Uncut], slices: Sequence[TensorSlice], base: BaseModel) -> Uncut | None:
    """Join the deltas of a weight's slices; None if no slice is changed."""
    known = [
        (tensor_slice, deltas[_pair_name(tensor_slice, base)])
        for tensor_slice in slices
        if _pair_name(tensor_slice, base) in deltas
    ]
    factored = [(tensor_slice, delta) for tensor_slice, delta in known if isinstance(delta, LowRank)]
    if len(factored) < len(known):
        return _gather_dense(known, base)
    parts = [_cut_slice(tensor_slice, delta, base) for tensor_slice, delta in factored]
    changed = [part for part in parts if part is not None]
    if not changed:
        return None
    n_out = max(sum(len(p.rows) for p in slices if p.rows is not None), *(int(p.rows.max()) + 1 for p in changed))
    return _join(changed, n_out)


def _gather_dense(known: Sequence[tuple[TensorSlice, Uncut]], base: BaseModel) -> Dense:
    """Join the deltas of a weight's slices as one matrix."""
    rows = [_rows_of(tensor_slice, base) for tensor_slice, _ in known]
    first, delta = known[0]
    n_in = delta.shape[0] if first.transposed else delta.shape[1]
    n_out = max(int(numbers.max()) + 1 for numbers in rows)

    def values() -> Float64Array:
        total = np.zeros((n_out, n_in))
        for (tensor_slice, part), numbers in zip(known, rows, strict=True):
            start = tensor_slice.start % base.shapes[tensor_slice.tensor][-2]
            matrix = values_of(part)
            matrix = matrix.T if tensor_slice.transposed else matrix[start : start + len(numbers)]
            columns = slice(None) if tensor_slice.columns is None else tensor_slice.columns
            total[numbers[:, None], np.arange(n_in)[columns]] = matrix
        return total

    return Dense((n_out, n_in), values)


def _rows_of(tensor_slice: TensorSlice, base: BaseModel) -> Indices:
    """Return the rows of the whole weight that a slice holds."""
    if tensor_slice.rows is not None:
        return tensor_slice.rows
    shape = base.shapes[tensor_slice.tensor]
    return np.arange(shape[-1] if tensor_slice.transposed else shape[-2])


def _cut_slice(tensor_slice: TensorSlice, delta: LowRank, base: BaseModel) -> _DeltaPart | None:
    """Cut a slice's delta out of a tensor's delta; None if the slice is an unchanged part of a fused tensor."""
    stride = base.shapes[tensor_slice.tensor][-2]
    start = tensor_slice.start % stride
    count = stride if tensor_slice.rows is None or tensor_slice.transposed else len(tensor_slice.rows)
    if count < stride:
        used = np.flatnonzero(as_float32(delta.b)[start : start + count].any(axis=0))
        if not len(used):
            return None
        delta = replace(delta, a=delta.a[used], b=delta.b[start : start + count][:, used])
    part = delta.transposed() if tensor_slice.transposed else delta
    if tensor_slice.columns is not None:
        a = np.empty_like(part.a)
        a[:, tensor_slice.columns] = part.a
        part = replace(part, a=a)
    return _DeltaPart(part, np.arange(part.b.shape[0]) if tensor_slice.rows is None else tensor_slice.rows)


def _join(parts: Sequence[_DeltaPart], n_out: int) -> LowRank:
    """Join parts to the delta of a whole weight. Parts cut from one tensor share A, which is stored only once."""
    first = parts[0].delta
    if all(part.delta.scaling == first.scaling and _same(part.delta.a, first.a) for part in parts):
        return LowRank(first.a, np.sum([_spread_b(part, n_out) for part in parts], axis=0), first.scaling)
    if all(part.delta.scaling == first.scaling for part in parts):
        b = [_spread_b(part, n_out) for part in parts]
        return LowRank(_stack_a([part.delta for part in parts]), np.concatenate(b, axis=1), first.scaling)
    folded = [replace(part, delta=_fold_scaling(part.delta)) for part in parts]
    return _join(folded, n_out)


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _stack_a(deltas: Sequence[LowRank]) -> Array:
    return np.concatenate([as_float32(delta.a) for delta in deltas], axis=0)


def _spread_b(part: _DeltaPart, n_out: int) -> Array:
    """Place the B of a part at its rows of the whole weight."""
    b = np.zeros((n_out, part.delta.rank), np.float32)
    b[part.rows] = as_float32(part.delta.b)
    return b


def _fold_scaling(delta: LowRank) -> LowRank:
    return LowRank(delta.a, (as_float64(delta.b) * delta.scaling).astype(np.float32), 1.0)
