"""From the tensors of a GGUF LoRA back to the weights of the Hugging Face model: `placement` the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures import TensorSlice
from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.mapping import adaptable_weights
from gguflora.errors import ArchitectureError, listed
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import FactoredAdapter, Pairs, for_base

_TRANSPOSED: Final = {"llama4"}
"""Where PEFT takes the experts' parameters (n_experts, n_in, n_out) for (n_experts, n_out, n_in)."""

_TASKS: Final = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
"""PEFT's names for what models do that do not generate text after a prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class _DeltaPart:
    """The change of one slice of a weight: LowRank in the slice's own rows and columns, and which rows these are."""

    delta: LowRank
    rows: Array


def for_model(adapter: FactoredAdapter, base: BaseModel) -> FactoredAdapter:
    """The same adapter, by the names and in the row order of the Hugging Face model's weights.

    Raises:
        ArchitectureError: if a tensor's weight has no known name.
        GgufloraError: if adapter and base do not fit together.
    """
    if adapter.architecture is None:
        return adapter
    pairs = for_base(adapter, base).pairs
    weights = adaptable_weights(base)
    claimed = {_key(tensor_slice, base) for slices in weights.values() for tensor_slice in slices}
    strangers = [name for name in pairs if name not in claimed]
    if strangers:
        raise ArchitectureError(
            f"{adapter.path}: {len(strangers)} of {len(pairs)} tensors have no module in a Hugging Face model of "
            f"{base.architecture}: {listed(strangers)}"
        )
    found = {name: _gather(pairs, slices, base) for name, slices in weights.items()}
    deltas = {name: delta for name, delta in found.items() if delta is not None}
    if base.architecture in _TRANSPOSED:
        deltas = {name: delta.transposed() if ".experts." in name else delta for name, delta in deltas.items()}
    fields = {"task_type": _TASKS.get(base.architecture, "CAUSAL_LM"), **adapter.fields}
    if base.architecture == "gpt2":  # whose layers hold their weights transposed
        fields["fan_in_fan_out"] = True
    return replace(adapter, pairs=deltas, architecture=None, fields=fields)


def _key(tensor_slice: TensorSlice, base: BaseModel) -> str:
    """The name of the pair that holds a slice's change."""
    shape = base.shapes[tensor_slice.tensor]
    return f"{tensor_slice.tensor}.{tensor_slice.start // shape[-2]}" if len(shape) > 2 else tensor_slice.tensor


def _gather(pairs: Pairs, slices: Sequence[TensorSlice], base: BaseModel) -> LowRank | None:
    """The change of a weight from those of its slices; None if none of them is changed."""
    known = [
        (tensor_slice, pairs[_key(tensor_slice, base)]) for tensor_slice in slices if _key(tensor_slice, base) in pairs
    ]
    parts = [_delta_part(tensor_slice, delta, base) for tensor_slice, delta in known]
    changed = [part for part in parts if part is not None]
    if not changed:
        return None
    n_out = max(sum(len(p.rows) for p in slices if p.rows is not None), *(int(p.rows.max()) + 1 for p in changed))
    return _joined(changed, n_out)


def _delta_part(tensor_slice: TensorSlice, delta: LowRank, base: BaseModel) -> _DeltaPart | None:
    """A slice's share of a tensor's change; None if it is a part of a fused tensor and left as it was."""
    stride = base.shapes[tensor_slice.tensor][-2]
    start = tensor_slice.start % stride
    count = stride if tensor_slice.rows is None or tensor_slice.transposed else len(tensor_slice.rows)
    if count < stride:
        used = np.flatnonzero(as_float32(delta.b)[start : start + count].any(axis=0))
        if not len(used):
            return None
        delta = replace(delta, a=delta.a[used], b=delta.b[start : start + count][:, used])
    own = delta.transposed() if tensor_slice.transposed else delta
    if tensor_slice.columns is not None:
        a = np.empty_like(own.a)
        a[:, tensor_slice.columns] = own.a
        own = replace(own, a=a)
    return _DeltaPart(own, np.arange(own.b.shape[0]) if tensor_slice.rows is None else tensor_slice.rows)


def _joined(parts: Sequence[_DeltaPart], n_out: int) -> LowRank:
    """One change of a whole weight; parts that share A, as those do that were cut from one weight, share it again."""
    first = parts[0].delta
    if all(part.delta.scaling == first.scaling and _same(part.delta.a, first.a) for part in parts):
        return LowRank(first.a, np.sum([_spread(part, n_out) for part in parts], axis=0), first.scaling)
    if all(part.delta.scaling == first.scaling for part in parts):
        b = [_spread(part, n_out) for part in parts]
        return LowRank(_below([part.delta for part in parts]), np.concatenate(b, axis=1), first.scaling)
    folded = [replace(part, delta=_with_factor_1(part.delta)) for part in parts]
    return _joined(folded, n_out)


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _below(deltas: Sequence[LowRank]) -> Array:
    return np.concatenate([as_float32(delta.a) for delta in deltas], axis=0)


def _spread(part: _DeltaPart, n_out: int) -> Array:
    """B of a part in the rows of the whole weight."""
    b = np.zeros((n_out, part.delta.rank), np.float32)
    b[part.rows] = as_float32(part.delta.b)
    return b


def _with_factor_1(delta: LowRank) -> LowRank:
    return LowRank(delta.a, (as_float64(delta.b) * delta.scaling).astype(np.float32), 1.0)
