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
class _Part:
    """The change of one piece of a weight: LowRank in the piece's own rows and columns, and which rows these are."""

    change: LowRank
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
    claimed = {_key(piece, base) for pieces in weights.values() for piece in pieces}
    strangers = [name for name in pairs if name not in claimed]
    if strangers:
        raise ArchitectureError(
            f"{adapter.path}: {len(strangers)} of {len(pairs)} tensors have no module in a Hugging Face model of "
            f"{base.architecture}: {listed(strangers)}"
        )
    found = {name: _gather(pairs, pieces, base) for name, pieces in weights.items()}
    changes = {name: change for name, change in found.items() if change is not None}
    if base.architecture in _TRANSPOSED:
        changes = {name: change.transposed() if ".experts." in name else change for name, change in changes.items()}
    fields = {"task_type": _TASKS.get(base.architecture, "CAUSAL_LM"), **adapter.fields}
    if base.architecture == "gpt2":  # whose layers hold their weights transposed
        fields["fan_in_fan_out"] = True
    return replace(adapter, pairs=changes, architecture=None, fields=fields)


def _key(piece: TensorSlice, base: BaseModel) -> str:
    """The name of the pair that holds a piece's change."""
    shape = base.shapes[piece.tensor]
    return f"{piece.tensor}.{piece.first // shape[-2]}" if len(shape) > 2 else piece.tensor


def _gather(pairs: Pairs, pieces: Sequence[TensorSlice], base: BaseModel) -> LowRank | None:
    """The change of a weight from those of its pieces; None if none of them is changed."""
    known = [(piece, pairs[_key(piece, base)]) for piece in pieces if _key(piece, base) in pairs]
    parts = [_part(piece, change, base) for piece, change in known]
    changed = [part for part in parts if part is not None]
    if not changed:
        return None
    n_out = max(sum(len(p.rows) for p in pieces if p.rows is not None), *(int(p.rows.max()) + 1 for p in changed))
    return _joined(changed, n_out)


def _part(piece: TensorSlice, change: LowRank, base: BaseModel) -> _Part | None:
    """A piece's share of a tensor's change; None if it is a part of a fused tensor and left as it was."""
    stride = base.shapes[piece.tensor][-2]
    start = piece.first % stride
    count = stride if piece.rows is None or piece.transposed else len(piece.rows)
    if count < stride:
        used = np.flatnonzero(as_float32(change.b)[start : start + count].any(axis=0))
        if not len(used):
            return None
        change = replace(change, a=change.a[used], b=change.b[start : start + count][:, used])
    own = change.transposed() if piece.transposed else change
    if piece.columns is not None:
        a = np.empty_like(own.a)
        a[:, piece.columns] = own.a
        own = replace(own, a=a)
    return _Part(own, np.arange(own.b.shape[0]) if piece.rows is None else piece.rows)


def _joined(parts: Sequence[_Part], n_out: int) -> LowRank:
    """One change of a whole weight; parts that share A, as those do that were cut from one weight, share it again."""
    first = parts[0].change
    if all(part.change.factor == first.factor and _same(part.change.a, first.a) for part in parts):
        return LowRank(first.a, np.sum([_spread(part, n_out) for part in parts], axis=0), first.factor)
    if all(part.change.factor == first.factor for part in parts):
        b = [_spread(part, n_out) for part in parts]
        return LowRank(_below([part.change for part in parts]), np.concatenate(b, axis=1), first.factor)
    folded = [replace(part, change=_with_factor_1(part.change)) for part in parts]
    return _joined(folded, n_out)


def _same(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _below(changes: Sequence[LowRank]) -> Array:
    return np.concatenate([as_float32(change.a) for change in changes], axis=0)


def _spread(part: _Part, n_out: int) -> Array:
    """B of a part in the rows of the whole weight."""
    b = np.zeros((n_out, part.change.rank), np.float32)
    b[part.rows] = as_float32(part.change.b)
    return b


def _with_factor_1(change: LowRank) -> LowRank:
    return LowRank(change.a, (as_float64(change.b) * change.factor).astype(np.float32), 1.0)
