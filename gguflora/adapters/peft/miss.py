"""MISS: one row of numbers added to every r-th column (https://arxiv.org/abs/2409.15371; PEFT: tuners/miss/layer.py).

``W' = W + M^T A`` with ``A[k, j] = 1`` where ``j mod r = k``. A module has ``miss_block``, M (r, n_out). With
``init_weights`` "mini" only the first ``mini_r`` columns are stored, and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, ShapeDependentDelta
from gguflora.adapters.peft.bat import read_bat
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array


def read_miss(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta | ShapeDependentDelta]:
    """Read the delta of every adapted weight."""
    kind = config.fields.get("init_weights")
    if kind == "bat":
        return read_bat(config, tensors)
    deltas: dict[str, Delta | ShapeDependentDelta] = {}
    for module, parts in by_module(config, tensors, ["miss_block"]).items():
        (block,) = take(config, module, parts, "miss_block")
        expect(config, module, "miss_block", block, (None, None))
        deltas[f"{module}.weight"] = _repeated(config, module, block, mini=kind == "mini")
    return deltas


def _repeated(config: PeftConfig, module: str, block: Array, *, mini: bool) -> ShapeDependentDelta:
    rank, width = block.shape

    def build(shape: tuple[int, int]) -> Delta:
        n_out, n_in = shape
        if not width or n_out % width:
            raise AdapterError(
                f"{config.path.parent}: module {module!r}: miss_block {block.shape} cannot be repeated to {n_out} rows"
            )
        a = (np.arange(n_in) % rank == np.arange(rank)[:, None]).astype(np.float32)
        return LowRank(a, np.tile(block, (1, n_out // width)).T, 1.0)

    return ShapeDependentDelta((None if mini else width, None), build)
