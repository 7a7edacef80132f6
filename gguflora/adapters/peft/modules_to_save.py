"""Read complete weights that are saved with an adapter of any method, and replace the base's.

``modules_to_save`` and resized embeddings have ``<module>.weight`` and ``.bias``, or other parameters of a module
(``experts.gate_up_proj``, ``self_attn.sinks``, ``mixer.A_log``). Trained biases (``bias``: "all" or "lora_only") and
embeddings that are also adapted have ``<module>.base_layer.bias`` and ``.weight``, or, if tokens were added before some
were trained, ``<module>.token_adapter.base_layer.weight``. Trained tokens
(``trainable_token_indices``) have ``<embedding>.token_adapter.trainable_tokens_delta``, which despite its name holds
the new rows, not their differences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, Replace, ReplaceRows, with_rows
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import PREFIX
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array

_TOKENS: Final = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_WHOLE: Final = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)(?:(?:\.token_adapter)?\.base_layer|(?:\.modules_to_save(?:\.[^.]+)?)+|\.original_module)?\.(?P<kind>weight|bias)"
)
_WRAPPER: Final = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")

# tensors of PEFT's methods; all others belong to the model
_METHOD: Final = re.compile(
    r"\.(?:lora_|hada_|lokr_|vera_|pvera_|randlora_|fourierft_|waveft_|vblora_|hra_|oft_|boft_|psoft_|ia3_|ln_tuning_|"
    r"beft_|miss_|bone_|hira_|shira_|c3a_|road_|osf_|delora_|gralora_|glora_|frod_|supertuning_|deft_|tinylora_|unilora_|"
    r"adamss_|peanut_|trainable_tokens_|prompt_|internal_xlora_|lily_|shadow_|poly_|adaption_)"
)


def split_modules_to_save(
    config: PeftConfig, tensors: Mapping[str, Array]
) -> tuple[dict[str, Delta], dict[str, Array]]:
    """Split tensors into complete weights, by their name in the Hugging Face model, and tensors of the method."""
    saved: dict[str, Delta] = {}
    trained: dict[str, ReplaceRows] = {}
    method_tensors = {}
    _check_collisions(config, tensors)
    for key, tensor in tensors.items():
        if _is_superseded(key, tensors):
            continue
        if tokens := _TOKENS.fullmatch(key):
            trained[f"{tokens['module']}.weight"] = _read_tokens(config, tokens["module"], tensor)
        elif _METHOD.search(key):
            method_tensors[key] = tensor
        elif whole := _WHOLE.fullmatch(key):
            is_base_copy = whole["kind"] == "weight" and not _is_trained(config, whole["module"])
            saved |= _whole(config, f"{whole['module']}.{whole['kind']}", tensor, is_base_copy=is_base_copy)
        elif _is_trained(config, name := _WRAPPER.sub("", key.removeprefix(PREFIX))):
            saved |= _whole(config, name, tensor, is_base_copy=False)
        else:
            method_tensors[key] = tensor
    for name, rows in trained.items():
        whole_weight = saved.get(name)
        saved[name] = with_rows(whole_weight, rows) if isinstance(whole_weight, Replace) else rows
    return saved, method_tensors


_ORIGINAL: Final = re.compile(r"\.original_module(?=\.)")


def _is_superseded(key: str, tensors: Mapping[str, Array]) -> bool:
    """Whether a key is the untrained ``original_module`` of a module that is also saved as trained."""
    if not _ORIGINAL.search(key):
        return False
    name = _bare(key)
    return any(_bare(other) == name for other in tensors if not _ORIGINAL.search(other))


def _bare(key: str) -> str:
    """Return the name of a tensor without what PEFT wraps around a module that it saves."""
    return _WRAPPER.sub("", _ORIGINAL.sub("", key))


def _check_collisions(config: PeftConfig, tensors: Mapping[str, Array]) -> None:
    """Raise unless each complete weight has one key, apart from ``original_module``, which the trained one replaces."""
    keys: dict[str, str] = {}
    for key in tensors:
        whole = None if _METHOD.search(key) or _is_superseded(key, tensors) else _WHOLE.fullmatch(key)
        if whole is None:
            continue
        weight = f"{whole['module']}.{whole['kind']}"
        first = keys.setdefault(weight, key)
        if first != key and not np.array_equal(tensors[first], tensors[key]):
            raise AdapterError(
                f"{config.path.parent}: {first!r} and {key!r} both hold {weight!r}, with different values; remove the "
                "one that was not trained, or save the adapter with save_pretrained"
            )


def _is_trained(config: PeftConfig, path: str) -> bool:
    """Whether a weight was saved because it was trained, not only because of ``save_embedding_layers``.

    PEFT saves every module whose path ends with a name (``peft.utils.other._set_trainable``): ``norm`` stands for
    ``input_layernorm``, too.
    """
    names = config.fields.get("modules_to_save") or []
    return isinstance(names, list) and any(f"{name}." in f"{path}." for name in names)


def _whole(config: PeftConfig, name: str, tensor: Array, *, is_base_copy: bool) -> dict[str, Delta]:
    """Return the delta that replaces a weight, or for a stack (n_experts, .., ..) one for each expert."""
    if tensor.ndim in {1, 2} or (tensor.ndim == 3 and "conv" in name):
        return {name: Replace(tensor.reshape(tensor.shape[0], -1), is_base_copy)}
    if tensor.ndim == 3:
        return {f"{name}.{expert}": Replace(values, is_base_copy) for expert, values in enumerate(tensor)}
    raise AdapterError(
        f"{config.path.parent}: {name!r} has shape {tensor.shape}, expected a vector, a matrix or a stack of matrices"
    )


def _read_tokens(config: PeftConfig, module: str, values: Array) -> ReplaceRows:
    """Return the replaced rows of an embedding. The configuration has their numbers in a list, or in one per module."""
    given = config.fields.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), None)
    return replaced_rows(config, module, given, values)


def replaced_rows(config: PeftConfig, module: str, ids: object, values: Array) -> ReplaceRows:
    """Return the delta that replaces the rows ``ids`` of a module's weight by ``values``.

    Raises:
        AdapterError: if ``ids`` is not a list of distinct row numbers, one for each row of ``values``.
    """
    where = f"{config.path.parent}: trained tokens of {module!r}"
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids):
        raise AdapterError(f"{where}: their indices are {ids!r:.80}, expected a list of row numbers")
    if values.ndim != 2 or values.shape[0] != len(ids) or len(set(ids)) != len(ids):
        raise AdapterError(f"{where}: {len(ids)} indices and values of shape {values.shape} do not fit together")
    return ReplaceRows(np.array(ids, np.intp), values, 1 + max(ids, default=-1))
