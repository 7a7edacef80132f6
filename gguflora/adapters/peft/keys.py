"""Parse the names of an adapter's tensors: ``base_model.model.<module>.<part>[.<adapter>][.weight|.bias]``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import numpy as np

from gguflora.adapters.peft.config import PeftConfig
from gguflora.errors import AdapterError, UnsupportedAdapterError, listed
from gguflora.files.safetensors import Array, is_float

PREFIX: Final = "base_model.model."
SHARED_PREFIX: Final = "base_model."
_MEGATRON: Final = re.compile(
    r"\.linear_(?:qkv|proj|fc[12]|q|kv\w*)\.(?:adapter|lora)\b|\.adapter\.linear_(?:in|out)\b"
)
"""Names of the adapters of Megatron-Bridge and NeMo."""

Parts = dict[str, Array]


def by_module(config: PeftConfig, tensors: Mapping[str, Array], parts: Collection[str]) -> dict[str, Parts]:
    """Group the tensors of a method by module and part.

    Args:
        config: configuration of the adapter, for messages.
        tensors: the tensors by name; each must be a part of a module.
        parts: names of the method's parts, such as ``lora_A``.

    Returns:
        The parts of each module by name. The bias of a part is named ``<part>.bias``.

    Raises:
        UnsupportedAdapterError: if a tensor is not one of the parts.
        AdapterError: if a module has a part twice with different values (the file holds two adapters).
    """
    names = "|".join(sorted(map(re.escape, parts), key=len, reverse=True))
    key_pattern = re.compile(
        rf"(?:{re.escape(PREFIX)})?(?P<module>.+?)\.(?P<part>{names})(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
    )
    modules: dict[str, Parts] = {}
    unknown_keys = []
    for key, tensor in tensors.items():
        match = key_pattern.fullmatch(key)
        if match is None:
            unknown_keys.append(key)
            continue
        part = f"{match['part']}.bias" if match["kind"] == "bias" else match["part"]
        earlier = modules.setdefault(match["module"], {}).get(part)
        if earlier is not None and not np.array_equal(earlier, tensor):
            raise AdapterError(
                f"{config.path.parent}: module {match['module']!r} has more than one {part}, with different values; "
                "the file holds two adapters, so save one of them with save_pretrained(selected_adapters=[NAME])"
            )
        modules[match["module"]][part] = tensor
    if unknown_keys:
        raise UnsupportedAdapterError(
            f"{config.path.parent}: cannot place {len(unknown_keys)} of {len(tensors)} tensors of a {config.peft_type} "
            f"adapter: {listed(unknown_keys)}{_foreign_names(unknown_keys)}"
        )
    return modules


def _foreign_names(keys: Iterable[str]) -> str:
    """Return what to do about names of another trainer; an empty string if they are unknown."""
    if any(_MEGATRON.search(key) for key in keys):
        return (
            ". These are Megatron's names, whose fused weights lie in another order: export the adapter to PEFT's "
            "format first, for example with Megatron-Bridge's AutoBridge.export_adapter_ckpt"
        )
    if any(".v_head." in f".{key}" for key in keys):
        return ". v_head is the value head of reinforcement learning, which generates no text: take it out of the file"
    return ""


def split_shared(
    config: PeftConfig, tensors: Mapping[str, Array], names: Collection[str]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Split off the tensors that all modules share, ``base_model.<name>[.<adapter>]``.

    Returns:
        The shared tensors by ``<name>``, and the other tensors by their key.

    Raises:
        AdapterError: if a shared tensor occurs twice (the file holds two adapters).
    """
    key_pattern = re.compile(rf"(?:{re.escape(SHARED_PREFIX)})?({'|'.join(map(re.escape, names))})(?:\.[^.]+)?")
    shared: dict[str, Array] = {}
    others = {}
    for key, tensor in tensors.items():
        match = key_pattern.fullmatch(key)
        if match is None:
            others[key] = tensor
        elif match[1] in shared:
            raise AdapterError(f"{config.path.parent}: has more than one {match[1]}")
        else:
            shared[match[1]] = tensor
    return shared, others


def take(config: PeftConfig, module: str, parts: Parts, *names: str) -> list[Array]:
    """Return the named parts of a module, and check that it has no others.

    Raises:
        AdapterError: if a part is missing, or there are other parts.
    """
    where = f"{config.path.parent}: module {module!r}"
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"{where} has no {missing[0]} (it has {listed(list(parts))}); the adapter is incomplete")
    others = [name for name in parts if name not in names]
    if others:
        raise UnsupportedAdapterError(f"{where} has {listed(others)}, expected only {', '.join(names)}")
    return [parts[name] for name in names]


def expect(config: PeftConfig, module: str, name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """Check that an array holds floats and has a shape, and return it. None in the shape stands for any size.

    Raises:
        AdapterError: if it does not.
    """
    fits = len(array.shape) == len(shape) and all(
        expected in {None, size} for expected, size in zip(shape, array.shape, strict=True)
    )
    if not fits or not is_float(array):
        sizes = ", ".join("n" if size is None else str(size) for size in shape)
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: {name} has shape {array.shape} and type {array.dtype}, "
            f"expected floating-point numbers of shape ({sizes})"
        )
    return array
