"""Whole weights that a PEFT directory holds beside its factors (``modules_to_save`` and trained biases), and their sum.

Every method combines them by one rule: the result's weight is the base's plus the weighted sum of all
changes of it, low-rank ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.deltas import LowRank, Replace, as_float64
from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.mapping import slices_of
from gguflora.errors import AdapterError, MismatchError
from gguflora.files.checkpoint import Checkpoint
from gguflora.files.gguf import GgufFile
from gguflora.files.safetensors import Array
from gguflora.lora.low_rank import Uncut, values_of
from gguflora.placement.base_weights import read_values
from gguflora.placement.place import PlacedDelta
from gguflora.quants.arrays import Float32Array, Float64Array

BaseWeight = Callable[[str, tuple[int, int]], Float64Array]
"""Returns a weight of the base, given its name in the Hugging Face model and the shape (n_out, n_in) of the new one."""


def split_saved(adapter: Adapter) -> tuple[Adapter, dict[str, Replace]]:
    """Split off the weights and biases that an adapter replaces as a whole; copies of the base's stay."""
    saved: dict[str, Replace] = {}
    for name, deltas in adapter.deltas.items():
        (delta, *others) = deltas
        is_module = name.endswith((".weight", ".bias")) and "conv" not in name
        if isinstance(delta, Replace) and not others and is_module and not delta.is_base_copy:
            saved[name] = delta
    rest = {name: deltas for name, deltas in adapter.deltas.items() if name not in saved}
    return replace(adapter, deltas=rest), saved


def sum_saved(
    saved: Sequence[Mapping[str, Replace]],
    deltas: Sequence[Mapping[str, Uncut]],
    weights_of: Callable[[str], Sequence[float]],
    base: BaseModel | None,
) -> dict[str, Float32Array]:
    """Return the whole weights of the weighted sum of adapters, by name.

    Args:
        saved: whole weights of each adapter.
        deltas: other deltas of each adapter.
        weights_of: returns the weight of each adapter for the model's weight of a name.
        base: the base model; needed unless the weights of the adapters that hold a weight add up to 1.

    Raises:
        MismatchError: if shapes differ between the adapters, or from the base's.
        AdapterError: if the base is needed and not given.
    """
    names = dict.fromkeys(name for item in saved for name in item)
    return {name: _sum_one(name, saved, deltas, weights_of(name), base) for name in names}


def _sum_one(
    name: str,
    saved: Sequence[Mapping[str, Replace]],
    deltas: Sequence[Mapping[str, Uncut]],
    weights: Sequence[float],
    base: BaseModel | None,
) -> Float32Array:
    whole = [(item[name], weight) for item, weight in zip(saved, weights, strict=True) if name in item]
    low = [(item[name], weight) for item, weight in zip(deltas, weights, strict=True) if name in item]
    shapes = {delta.shape for delta, _ in [*whole, *low]}
    if len(shapes) > 1:
        raise MismatchError(f"{name}: different shapes, so the adapters have different bases: {sorted(shapes)}")
    rest = 1.0 - sum(weight for _, weight in whole)
    total = sum((weight * as_float64(delta.values) for delta, weight in whole), np.zeros(shapes.pop()))
    if abs(rest) > 1e-9:
        total += rest * _base_weight(name, (total.shape[0], total.shape[1]), base)
    for delta, weight in low:
        total += weight * values_of(delta)
    values: Float32Array = total.astype(np.float32)
    is_vector = name.endswith(".bias") or whole[0][0].shape[1] == 1
    return values[:, 0] if is_vector else values


def _base_weight(name: str, shape: tuple[int, int], base: BaseModel | None) -> Float64Array:
    if base is None:
        raise AdapterError(
            f"{name} is saved as a whole (modules_to_save or a trained bias); weights that do not add up to 1 need the "
            "base's values: give it with --base"
        )
    found = _from_directory(name, base) if base.path.is_dir() else _from_gguf(name, shape, base)
    if found is None or found.shape != shape:
        raise MismatchError(
            f"{base.path}: has no {name} of shape {shape}, as the adapters hold it; if it has grown by new tokens, "
            "give weights that add up to 1"
        )
    return found


def _from_directory(name: str, base: BaseModel) -> Float64Array | None:
    with closing(Checkpoint(base.path)) as checkpoint:
        tied = "model.embed_tokens.weight" if name == "lm_head.weight" and base.is_tied else name
        stored = checkpoint.weights.get(name) or checkpoint.weights.get(tied)
        if stored is None:
            return None
        return checkpoint.read_rows(stored, np.arange(stored.n_rows)).astype(np.float64)


def _from_gguf(name: str, shape: tuple[int, int], base: BaseModel) -> Float64Array | None:
    weight = np.zeros(shape)
    zero = LowRank(np.zeros((0, shape[1])), np.zeros((shape[0], 0)), 0.0)
    tied = "model.embed_tokens.weight" if name == "lm_head.weight" and base.is_tied else name
    slices = slices_of(base, tied)
    with GgufFile(base.path) as file:
        for tensor_slice in slices:
            tensor, item = file.tensors[tensor_slice.tensor], PlacedDelta(name, zero, tensor_slice)
            is_vector = len(tensor.shape) == 1
            start = tensor_slice.start
            if not is_vector and start + item.shape[0] > tensor.n_rows:
                return None
            stored = read_values(file, tensor, start, start + item.shape[0])
            item.put(stored[start : start + item.shape[0]] if is_vector else stored, weight)
    return weight if slices else None


def as_saved(saved: Mapping[str, Replace]) -> dict[str, Array]:
    """Return whole weights of one adapter as a PEFT directory holds them."""
    return {
        name: delta.values[:, 0] if name.endswith(".bias") or delta.shape[1] == 1 else delta.values
        for name, delta in saved.items()
    }
