"""The names of an adapter's tensors: ``base_model.model.<module>.<part>[.<adapter>][.weight|.bias]``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from gguflora.adapters.peft.config import PeftConfig
from gguflora.errors import AdapterError, UnsupportedAdapterError, listed
from gguflora.files.safetensors import Array, is_float

PREFIX: Final = "base_model.model."
SHARED_PREFIX: Final = "base_model."

Parts = dict[str, Array]


def by_module(config: PeftConfig, tensors: Mapping[str, Array], parts: Collection[str]) -> dict[str, Parts]:
    """A method's tensors by module and part.

    Args:
        config: of the adapter, for messages.
        tensors: all of them must be parts of modules.
        parts: names of the method's parts, such as ``lora_A``. A part's bias is listed as ``<part>.bias``.

    Raises:
        UnsupportedAdapterError: if a tensor is none of the parts.
        AdapterError: if a module has a part twice (the file holds two adapters).
    """
    names = "|".join(sorted(map(re.escape, parts), key=len, reverse=True))
    key_pattern = re.compile(
        rf"(?:{re.escape(PREFIX)})?(?P<module>.+?)\.(?P<part>{names})(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"
    )
    modules: dict[str, Parts] = {}
    strangers = []
    for key, tensor in tensors.items():
        found = key_pattern.fullmatch(key)
        if found is None:
            strangers.append(key)
            continue
        part = f"{found['part']}.bias" if found["kind"] == "bias" else found["part"]
        if part in modules.setdefault(found["module"], {}):
            raise AdapterError(f"{config.path.parent}: module {found['module']!r} has more than one {part}")
        modules[found["module"]][part] = tensor
    if strangers:
        raise UnsupportedAdapterError(
            f"{config.path.parent}: cannot place {len(strangers)} of {len(tensors)} tensors of a {config.peft_type} "
            f"adapter: {listed(strangers)}"
        )
    return modules


def split_shared(
    config: PeftConfig, tensors: Mapping[str, Array], names: Collection[str]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The tensors that all modules share, ``base_model.<name>[.<adapter>]``, by name; and the others.

    Raises:
        AdapterError: if one is there twice (the file holds two adapters).
    """
    key_pattern = re.compile(rf"(?:{re.escape(SHARED_PREFIX)})?({'|'.join(map(re.escape, names))})(?:\.[^.]+)?")
    shared: dict[str, Array] = {}
    others = {}
    for key, tensor in tensors.items():
        found = key_pattern.fullmatch(key)
        if found is None:
            others[key] = tensor
        elif found[1] in shared:
            raise AdapterError(f"{config.path.parent}: has more than one {found[1]}")
        else:
            shared[found[1]] = tensor
    return shared, others


def take(config: PeftConfig, module: str, parts: Parts, *names: str) -> list[Array]:
    """The named parts of a module, which must be all it has.

    Raises:
        AdapterError: if one is missing, or there are others.
    """
    where = f"{config.path.parent}: module {module!r}"
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"{where} has no {missing[0]} (it has {listed(list(parts))}); the adapter is incomplete")
    others = [name for name in parts if name not in names]
    if others:
        raise UnsupportedAdapterError(f"{where} has {listed(others)} besides {', '.join(names)}")
    return [parts[name] for name in names]


def expect(config: PeftConfig, module: str, name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """The array itself, if it holds floating-point numbers and has the shape; None stands for any size.

    Raises:
        AdapterError: if not.
    """
    fits = len(array.shape) == len(shape) and all(
        size in {None, found} for size, found in zip(shape, array.shape, strict=True)
    )
    if not fits or not is_float(array):
        sizes = ", ".join("n" if size is None else str(size) for size in shape)
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: {name} has shape {array.shape} and type {array.dtype}, "
            f"expected floating-point numbers of shape ({sizes})"
        )
    return array
