"""HiRA: the weight times a low-rank matrix, element by element (https://openreview.net/forum?id=TwJrTz9cRS).

Tensors of a module: ``hira_A`` (r, n_in), ``hira_B`` (n_out, r): ``W' = W * (1 + B A)``; of an embedding
``hira_embedding_A`` (r, rows), ``hira_embedding_B`` (width, r): ``W' = W * (1 + (B A)^T)``.

This is the weight that PEFT merges. For an embedding whose output the model scales (Gemma), PEFT's unmerged forward
pass adds the delta unscaled, so it differs from PEFT's merge and from this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gguflora.adapters.deltas import FunctionDelta, LowRank
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices

_LINEAR = ("hira_A", "hira_B")
_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


def read_hira(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, FunctionDelta]:
    """Read the delta of every adapted weight."""
    deltas = {}
    for module, parts in by_module(config, tensors, [*_LINEAR, *_EMBEDDING]).items():
        names = _EMBEDDING if _EMBEDDING[0] in parts else _LINEAR
        a, b = take(config, module, parts, *names)
        expect(config, module, names[0], a, (None, None))
        expect(config, module, names[1], b, (None, a.shape[0]))
        factors = LowRank(a, b, 1.0)
        if names is _EMBEDDING:
            factors = factors.transposed()
        deltas[f"{module}.weight"] = FunctionDelta(factors.shape, partial(_multiply, factors))
    return deltas


def _multiply(factors: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    delta: Float64Array = w * factors.compute(w, rows)
    return delta
