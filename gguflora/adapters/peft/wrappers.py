"""Remove from the names of an adapter's tensors what training wrapped around the model.

torch.compile, FSDP, DeepSpeed and activation checkpointing put components of their own into names, a raw state dict
repeats PEFT's prefix or the adapter's name, and Tinker has its own name for the output. What is removed here is never
the name of a module of a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.peft.keys import PREFIX
from gguflora.errors import AdapterError, listed
from gguflora.files.safetensors import Array

_WRAPPERS: Final = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module)(?:\.|$)"
)
_PARALLEL: Final = re.compile(rf"^({re.escape(PREFIX)})?(?:module\.)+")
_DOUBLED_PREFIX: Final = re.compile(rf"^(?:{re.escape(PREFIX)}){{2,}}")
_DOUBLED_NAME: Final = re.compile(r"\.((?:lora_|modules_to_save)\w*)\.([^.]+)\.\2(?=\.|$)")
_UNEMBEDDING: Final = re.compile(r"(^|\.)(?:model\.)?unembed_tokens\.")

_BUFFER: Final = re.compile(r"(?:^|.*\.)(?:rotary_emb\.inv_freq|masked_bias)")
_PACKED: Final = re.compile(r"(?P<weight>.*\.base_layer\.weight)\.(?:absmax|quant_map|nested_\w+|quant_state\..+)")
"""What bitsandbytes saves beside a packed weight."""


def without_frozen(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Return the tensors without what raw dumps of a whole model add to them, and a warning that names it.

    That is buffers of old versions of transformers, and weights of the base that bitsandbytes has packed.
    """
    packed = {match["weight"] for match in map(_PACKED.fullmatch, tensors) if match}
    left_out = [key for key in tensors if _BUFFER.fullmatch(key) or _PACKED.fullmatch(key) or key in packed]
    told = f"left out buffers and packed weights of the base, which training does not change: {listed(left_out, 3)}"
    return {key: tensors[key] for key in tensors if key not in set(left_out)}, (told,) if left_out else ()


def unwrapped(key: str) -> str:
    """Return the name of a tensor without the components that training wraps around the model."""
    bare = _PARALLEL.sub(lambda match: match[1] or "", _WRAPPERS.sub("", key))
    bare = _PARALLEL.sub(lambda match: match[1] or "", _DOUBLED_PREFIX.sub(PREFIX, bare))
    return _UNEMBEDDING.sub(r"\1lm_head.", _DOUBLED_NAME.sub(r".\1.\2", bare))


def without_wrappers(path: Path, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors by `unwrapped` name.

    Raises:
        AdapterError: if two different tensors get one name.
    """
    result: dict[str, Array] = {}
    origins: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = unwrapped(key)
        if name in result and not (result[name].dtype == tensor.dtype and np.array_equal(result[name], tensor)):
            raise AdapterError(
                f"{path}: {origins[name]!r} and {key!r} are two different tensors for {name!r}; keep the trained one"
            )
        result[name], origins[name] = tensor, key
    return result
