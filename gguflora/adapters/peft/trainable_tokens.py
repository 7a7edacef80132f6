"""TRAINABLE_TOKENS: some rows of an embedding, trained (PEFT: tuners/trainable_tokens).

A module has ``trainable_tokens_delta`` (n, width), which despite its name holds the new rows, not their differences.
The configuration has their numbers in ``token_indices``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.adapters.peft.modules_to_save import replaced_rows
from gguflora.files.safetensors import Array

_ROWS: Final = "trainable_tokens_delta"


def _without_tied(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors without duplicates: PEFT also saves the rows of a tied embedding under the output's name."""
    heads = [key for key in tensors if ".lm_head." in key]
    others = {key: tensor for key, tensor in tensors.items() if key not in heads}
    kept = {key: tensors[key] for key in heads if not any(np.array_equal(tensors[key], o) for o in others.values())}
    return others | kept


def read_trainable_tokens(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """Read the replaced rows of every adapted embedding."""
    ids = config.fields.get("token_indices")
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, _without_tied(tensors), [_ROWS]).items():
        (values,) = take(config, module, parts, _ROWS)
        expect(config, module, _ROWS, values, (None, None))
        deltas[f"{module}.weight"] = replaced_rows(config, module, ids, values)
    return deltas
