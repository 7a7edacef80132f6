"""Super-tuning: numbers added to some elements of the weight, in "Supra" also a LoRA (https://arxiv.org/abs/2607.09287).

Tensors of a module (``peft.tuners.supertuning``): ``supertuning_indices`` (n,), element numbers of the weight in row
order, ``supertuning_values`` (n,), and with ``r`` set ``supertuning_lora_A`` (r, n_in), ``supertuning_lora_B``
(n_out, r): ``W' = W + sparse + lora_alpha / r * B A``.

Without ``save_precomputed_indices`` the elements are determined from the base: those with the largest (``select_top``)
or smallest absolute values, in that order. That requires a base with the original, unquantized weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gguflora.adapters.deltas import Delta, FunctionDelta, LowRank, ShapeDependentDelta, as_float64
from gguflora.adapters.numerics.sparse import add_sparse
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import (
    Parts,
    by_module,
    expect,
    take,
)
from gguflora.errors import AdapterError, MissingExtraError, UnsupportedAdapterError
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_SPARSE = ("supertuning_indices", "supertuning_values")
_FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


def read_supertuning(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    modules = by_module(config, tensors, [*_SPARSE, *_FACTORS])
    return {f"{module}.weight": _read_module(config, module, parts) for module, parts in modules.items()}


def _read_module(config: PeftConfig, module: str, parts: Parts) -> ShapeDependentDelta:
    where = f"{config.path.parent}: module {module!r}"
    low_rank = _read_factors(config, module, parts)
    if _SPARSE[0] not in parts:
        return _by_size(config, module, parts, low_rank)
    indices, values = take(config, module, {name: part for name, part in parts.items() if name in _SPARSE}, *_SPARSE)
    expect(config, module, _SPARSE[1], values, (None,))
    if indices.shape != values.shape or indices.dtype.kind not in "iu":
        raise AdapterError(f"{where}: {_SPARSE[0]} has shape {indices.shape}, expected {len(values)} whole numbers")

    def build(shape: tuple[int, int]) -> Delta:
        rows, columns = np.divmod(indices.astype(np.int64), shape[1])
        sparse = add_sparse(where, shape, rows, columns, values)
        return sparse if low_rank is None else _sum(sparse, low_rank)

    return ShapeDependentDelta((None, None) if low_rank is None else low_rank.shape, build)


def _by_size(config: PeftConfig, module: str, parts: Parts, low_rank: LowRank | None) -> ShapeDependentDelta:
    """Return the delta that adds the values to the weight's largest or smallest elements."""
    where = f"{config.path.parent}: module {module!r}"
    (values,) = take(config, module, {name: part for name, part in parts.items() if name in _SPARSE}, _SPARSE[1])
    expect(config, module, _SPARSE[1], values, (None,))
    largest = bool(config.fields.get("select_top", True))

    def compute(w: Float64Array, rows: Indices) -> Float64Array:
        delta = np.zeros(w.size)
        delta[_find(where, w, len(values), largest=largest)] = as_float64(values)
        return delta.reshape(w.shape) + (0.0 if low_rank is None else low_rank.compute(w, rows))

    known = (None, None) if low_rank is None else low_rank.shape
    return ShapeDependentDelta(known, lambda shape: FunctionDelta(shape, compute, whole=True))


def _find(where: str, w: Float64Array, count: int, *, largest: bool) -> Indices:
    """Return the elements that were chosen for training, in the same order.

    Raises:
        UnsupportedAdapterError: if the base is quantized, so the elements cannot be determined.
        MissingExtraError: if elements have equal absolute values, and torch is needed to order them.
    """
    hint = "save the adapter with save_precomputed_indices=True"
    ranking = -np.abs(w).ravel() if largest else np.abs(w).ravel()
    order = np.argsort(ranking, kind="stable")[: count + 1]
    ties = np.count_nonzero(np.diff(ranking[order]) == 0)
    if count > w.size or (ties > 0.01 * count and not _is_half(w)):
        raise UnsupportedAdapterError(
            f"{where} has no {_SPARSE[0]}: it changes the base's {'largest' if largest else 'smallest'} weights, and a "
            f"quantized base does not show which those are; give the unquantized base, or {hint}"
        )
    if not ties:
        return order[:count]
    try:
        import torch  # noqa: PLC0415  (slow to import, and needed only for ties)
    except ImportError as error:
        raise MissingExtraError(
            f"{where} has no {_SPARSE[0]}, and some of the weights it changes are of equal size: their order",
            "torch's sort",
            "torch",
            f"or {hint}",
        ) from error
    scores = torch.from_numpy(np.abs(w).astype(np.float32).ravel())
    chosen: Indices = torch.topk(scores, count, largest=largest).indices.numpy()
    return chosen


def _is_half(w: Float64Array) -> bool:
    """Whether all numbers are bfloat16 or float16 values, in which ties are frequent without quantization."""
    single = w.astype(np.float32)
    return not (single.view(np.uint32) & 0xFFFF).any() or bool((single.astype(np.float16) == single).all())


def _read_factors(config: PeftConfig, module: str, parts: Parts) -> LowRank | None:
    if config.fields.get("r") is None:
        return None
    a, b = take(config, module, {name: part for name, part in parts.items() if name in _FACTORS}, *_FACTORS)
    expect(config, module, _FACTORS[0], a, (int(config.number("r", 0)), None))
    expect(config, module, _FACTORS[1], b, (None, a.shape[0]))
    alpha = config.fields.get("lora_alpha")
    return LowRank(a, b, 2.0 if alpha is None else config.number("lora_alpha", 0) / a.shape[0])


def _sum(sparse: FunctionDelta, low_rank: LowRank) -> FunctionDelta:
    def delta(w: Float64Array, rows: Indices) -> Float64Array:
        return sparse.compute(w, rows) + low_rank.compute(w, rows)

    return FunctionDelta(sparse.shape, delta)
