"""Weights saved whole beside an adapter of any method: they replace the base's.

``modules_to_save`` and resized embeddings: ``<module>.weight`` and ``.bias``; trained biases (``bias``: "all" or
"lora_only") and embeddings that are adapted too: ``<module>.base_layer.bias`` and ``.weight``. Trained tokens
(``trainable_token_indices``): ``<embedding>.token_adapter.trainable_tokens_delta``, which in spite of its name holds
the new rows themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.config import PeftConfig
from gguflora.adapters.keys import PREFIX
from gguflora.deltas import Change, Replace, ReplaceRows
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array

_TOKENS: Final = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_WHOLE: Final = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?|\.original_module)?\.(?P<kind>weight|bias)"
)


# modules of PEFT's own methods; every other module belongs to the model
_METHOD: Final = re.compile(
    r"\.(?:lora_|hada_|lokr_|vera_|pvera_|randlora_|fourierft_|waveft_|vblora_|hra_|oft_|boft_|psoft_|ia3_|ln_tuning_|"
    r"beft_|miss_|bone_|hira_|shira_|c3a_|road_|osf_|delora_|gralora_|glora_|frod_|supertuning_|deft_|tinylora_|unilora_|"
    r"adamss_|peanut_|trainable_tokens_|prompt_|internal_xlora_|lily_|shadow_|poly_|adaption_)"
)


def split_saved(config: PeftConfig, tensors: Mapping[str, Array]) -> tuple[dict[str, Change], dict[str, Array]]:
    """Weights that were saved whole, by their name in the Hugging Face model, and the method's own tensors."""
    saved: dict[str, Change] = {}
    left = {}
    for key, tensor in tensors.items():
        if tokens := _TOKENS.fullmatch(key):
            saved[f"{tokens['module']}.weight"] = _read_tokens(config, tokens["module"], tensor)
        elif (whole := _WHOLE.fullmatch(key)) and not _METHOD.search(key):
            frozen = whole["kind"] == "weight" and not _is_trained(config, whole["module"])
            saved[f"{whole['module']}.{whole['kind']}"] = Replace(_as_matrix(config, key, tensor), frozen)
        else:
            left[key] = tensor
    return saved, left


def _is_trained(config: PeftConfig, module: str) -> bool:
    """Whether a weight was saved because it was trained, and not with the embeddings (save_embedding_layers)."""
    names = config.fields.get("modules_to_save") or []
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)


def _as_matrix(config: PeftConfig, key: str, tensor: Array) -> Array:
    if tensor.ndim not in {1, 2}:
        raise AdapterError(f"{config.path.parent}: {key!r} has shape {tensor.shape}, expected a vector or a matrix")
    return tensor.reshape(tensor.shape[0], -1)


def _read_tokens(config: PeftConfig, module: str, values: Array) -> ReplaceRows:
    """The rows of an embedding; which ones, the configuration says: a list, or an object of lists by module name."""
    given = config.fields.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), None)
    return replaced_rows(config, module, given, values)


def replaced_rows(config: PeftConfig, module: str, ids: object, values: Array) -> ReplaceRows:
    """Rows ``ids`` of a module's weight replaced by ``values``."""
    where = f"{config.path.parent}: trained tokens of {module!r}"
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids):
        raise AdapterError(f"{where}: their indices are {ids!r:.80}, expected a list of row numbers")
    if values.ndim != 2 or values.shape[0] != len(ids) or len(set(ids)) != len(ids):
        raise AdapterError(f"{where}: {len(ids)} indices and values of shape {values.shape} do not fit together")
    return ReplaceRows(np.array(ids, np.intp), values, 1 + max(ids, default=-1))
