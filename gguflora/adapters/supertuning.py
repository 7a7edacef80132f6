"""Super-tuning: some of the weight's elements changed, in "Supra" a low-rank change added (https://arxiv.org/abs/2607.09287).

Tensors of a module (``peft.tuners.supertuning``): ``supertuning_indices`` (n,), element numbers of the weight in row
order, ``supertuning_values`` (n,), and with ``r`` set ``supertuning_lora_A`` (r, n_in), ``supertuning_lora_B``
(n_out, r): ``W' = W + sparse + lora_alpha / r * B A``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gguflora.adapters.config import PeftConfig
from gguflora.adapters.keys import Parts, by_module, expect, take
from gguflora.adapters.sparse import add_sparse
from gguflora.deltas import Change, Formula, Indices, LowRank, Unsized, Values
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array

_SPARSE = ("supertuning_indices", "supertuning_values")
_FACTORS = ("supertuning_lora_A", "supertuning_lora_B")


def read_supertuning(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Unsized]:
    """The change of every adapted weight."""
    modules = by_module(config, tensors, [*_SPARSE, *_FACTORS])
    return {f"{module}.weight": _read_module(config, module, parts) for module, parts in modules.items()}


def _read_module(config: PeftConfig, module: str, parts: Parts) -> Unsized:
    where = f"{config.path.parent}: module {module!r}"
    if _SPARSE[0] not in parts:
        raise UnsupportedAdapterError(
            f"{where} has no {_SPARSE[0]}: which elements it changes would have to be found by the exact order of the "
            "base's weights; save it with save_precomputed_indices=True"
        )
    low_rank = _read_factors(config, module, parts)
    indices, values = take(config, module, {name: part for name, part in parts.items() if name in _SPARSE}, *_SPARSE)
    expect(config, module, _SPARSE[1], values, (None,))
    if indices.shape != values.shape or indices.dtype.kind not in "iu":
        raise AdapterError(f"{where}: {_SPARSE[0]} has shape {indices.shape}, expected {len(values)} whole numbers")

    def build(shape: tuple[int, int]) -> Change:
        rows, columns = np.divmod(indices.astype(np.int64), shape[1])
        sparse = add_sparse(where, shape, rows, columns, values)
        return sparse if low_rank is None else _sum(sparse, low_rank)

    return Unsized((None, None) if low_rank is None else low_rank.shape, build)


def _read_factors(config: PeftConfig, module: str, parts: Parts) -> LowRank | None:
    if config.fields.get("r") is None:
        return None
    a, b = take(config, module, {name: part for name, part in parts.items() if name in _FACTORS}, *_FACTORS)
    expect(config, module, _FACTORS[0], a, (int(config.number("r", 0)), None))
    expect(config, module, _FACTORS[1], b, (None, a.shape[0]))
    alpha = config.fields.get("lora_alpha")
    return LowRank(a, b, 2.0 if alpha is None else config.number("lora_alpha", 0) / a.shape[0])


def _sum(sparse: Formula, low_rank: LowRank) -> Formula:
    def change(w: Values, rows: Indices) -> Values:
        return sparse.delta(w, rows) + low_rank.delta(w, rows)

    return Formula(sparse.shape, change)
