"""KaSA: the smallest singular triplets of the weight replaced by a low-rank matrix (https://arxiv.org/abs/2412.06071).

LORA with ``kasa_config``: in addition to LoRA's factors a module has ``lora_diag`` (r,). ``W' = (W without its r
smallest singular triplets) + scaling * B diag(lora_diag) A`` (``peft.tuners.lora.variants``, ``KasaLinearVariant``).
"""

from __future__ import annotations

from functools import partial

from gguflora.adapters.deltas import FunctionDelta, LowRank, as_float64
from gguflora.adapters.numerics.spectrum import CAUTION, smallest
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import expect
from gguflora.files.safetensors import Array
from gguflora.quants.arrays import Float64Array, Indices


def with_diagonal(config: PeftConfig, module: str, delta: LowRank, diagonal: Array) -> FunctionDelta:
    """Return the delta of a weight with KaSA.

    Args:
        config: configuration of the adapter, for messages.
        module: name of the module, for messages.
        delta: ``scaling * B A``.
        diagonal: diagonal of the matrix between B and A, (r,).
    """
    expect(config, module, "lora_diag", diagonal, (delta.rank,))
    scaled = LowRank(delta.a, as_float64(delta.b) * as_float64(diagonal), delta.scaling)
    return FunctionDelta(delta.shape, partial(_replace, scaled), whole=True, caution=CAUTION)


def _replace(delta: LowRank, w: Float64Array, rows: Indices) -> Float64Array:
    return delta.compute(w, rows) - smallest(w, delta.rank)
