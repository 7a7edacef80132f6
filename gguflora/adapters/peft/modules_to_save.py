"""Weights saved whole beside an adapter of any method: they replace the base's.

``modules_to_save`` and resized embeddings: ``<module>.weight`` and ``.bias``, or whatever else the parameters of the
modules below are called (``experts.gate_up_proj``, ``self_attn.sinks``, ``mixer.A_log``); trained biases (``bias``:
"all" or "lora_only") and embeddings that are adapted too: ``<module>.base_layer.bias`` and ``.weight``. Trained tokens
(``trainable_token_indices``): ``<embedding>.token_adapter.trainable_tokens_delta``, which in spite of its name holds
the new rows themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, Replace, ReplaceRows
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import PREFIX
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array

_TOKENS: Final = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_WHOLE: Final = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?|\.original_module)?\.(?P<kind>weight|bias)"
)
_WRAPPER: Final = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")

# modules of PEFT's own methods; every other module belongs to the model
_METHOD: Final = re.compile(
    r"\.(?:lora_|hada_|lokr_|vera_|pvera_|randlora_|fourierft_|waveft_|vblora_|hra_|oft_|boft_|psoft_|ia3_|ln_tuning_|"
    r"beft_|miss_|bone_|hira_|shira_|c3a_|road_|osf_|delora_|gralora_|glora_|frod_|supertuning_|deft_|tinylora_|unilora_|"
    r"adamss_|peanut_|trainable_tokens_|prompt_|internal_xlora_|lily_|shadow_|poly_|adaption_)"
)


def split_modules_to_save(
    config: PeftConfig, tensors: Mapping[str, Array]
) -> tuple[dict[str, Delta], dict[str, Array]]:
    """Weights that were saved whole, by their name in the Hugging Face model, and the method's own tensors."""
    saved: dict[str, Delta] = {}
    left = {}
    for key, tensor in tensors.items():
        if tokens := _TOKENS.fullmatch(key):
            saved[f"{tokens['module']}.weight"] = _read_tokens(config, tokens["module"], tensor)
        elif _METHOD.search(key):
            left[key] = tensor
        elif whole := _WHOLE.fullmatch(key):
            is_base_copy = whole["kind"] == "weight" and not _is_trained(config, whole["module"])
            saved |= _whole(config, f"{whole['module']}.{whole['kind']}", tensor, is_base_copy=is_base_copy)
        elif _is_trained(config, name := _WRAPPER.sub("", key.removeprefix(PREFIX))):
            saved |= _whole(config, name, tensor, is_base_copy=False)
        else:
            left[key] = tensor
    return saved, left


def _is_trained(config: PeftConfig, path: str) -> bool:
    """Whether a weight was saved because it was trained, and not with the embeddings (save_embedding_layers)."""
    names = config.fields.get("modules_to_save") or []
    return isinstance(names, list) and any(f".{name}." in f".{path}." for name in names)


def _whole(config: PeftConfig, name: str, tensor: Array, *, is_base_copy: bool) -> dict[str, Delta]:
    """A weight as it is; of a stack of experts (n_experts, .., ..) each one's."""
    if tensor.ndim in {1, 2} or (tensor.ndim == 3 and "conv" in name):
        return {name: Replace(tensor.reshape(tensor.shape[0], -1), is_base_copy)}
    if tensor.ndim == 3:
        return {f"{name}.{expert}": Replace(values, is_base_copy) for expert, values in enumerate(tensor)}
    raise AdapterError(
        f"{config.path.parent}: {name!r} has shape {tensor.shape}, expected a vector, a matrix or a stack of matrices"
    )


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
