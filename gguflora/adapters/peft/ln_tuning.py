"""LN tuning: trained norms replace the base's (https://arxiv.org/abs/2312.11420; ``peft.tuners.ln_tuning``).

Tensors of a module: ``ln_tuning_layers.weight`` and ``.bias``, (n,) each.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguflora.adapters.deltas import Replace
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect
from gguflora.files.safetensors import Array

_PART = "ln_tuning_layers"


def read_ln_tuning(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Replace]:
    """Read the new values of every trained norm."""
    deltas = {}
    for module, parts in by_module(config, tensors, [_PART]).items():
        for part, values in parts.items():
            kind = "bias" if part.endswith(".bias") else "weight"
            column = expect(config, module, part, values, (None,)).reshape(-1, 1)
            deltas[f"{module}.{kind}"] = Replace(column)
    return deltas
