"""Read an adapter: a PEFT or mlx-lm directory or a GGUF LoRA file, into deltas of weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, ShapeDependentDelta
from gguflora.adapters.gguf_lora import read_gguf_lora
from gguflora.adapters.peft.config import MLX, PeftConfig, read_config
from gguflora.adapters.peft.modules_to_save import split_modules_to_save
from gguflora.adapters.peft.pooler import about_pooler
from gguflora.adapters.peft.unsupported import REFUSED
from gguflora.errors import AdapterError, UnsupportedAdapterError, listed
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import Array, as_float32, read_weights, weight_files

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read but not yet fitted to a base model.

    Attributes:
        name: of its directory, or its file without the suffix.
        path: of the file with the weights, or of the index of several such files.
        sha256: of the weights' files, in hexadecimal.
        changes: of each weight, to be added, by the weight's name in the Hugging Face model or, with ``architecture``
            set, in GGUF; but for those that only `deltas_of` knows.
        method: ``peft_type`` of a PEFT adapter, "MLX", or "GGUF LoRA".
        architecture: of the base it was made for, where it is a GGUF LoRA; None for a PEFT directory.
        warnings: what the user should know.
        ties: whether any change of the token embedding holds for an output weight that is tied to it, too.
        invocation_tokens: the tokens after which an activated LoRA begins; none of any other adapter.
        shaped: reads the other changes, given the shapes of the base's weights.
    """

    name: str
    path: Path
    sha256: str
    deltas: Mapping[str, tuple[Delta | ShapeDependentDelta, ...]]
    method: str
    architecture: str | None = None
    warnings: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    invocation_tokens: tuple[int, ...] = ()
    from_base_shapes: Callable[[BaseShapes], Mapping[str, Delta]] | None = field(default=None, repr=False)

    @property
    def changes(self) -> Mapping[str, tuple[Delta | ShapeDependentDelta, ...]]:
        """`deltas` under their former name, which goes with the next release."""
        return self.deltas

    def deltas_of(self, base: BaseShapes) -> dict[str, tuple[Delta | ShapeDependentDelta, ...]]:
        """All changes, those of methods that depend on the shapes of several weights included.

        Raises:
            MismatchError: if the base does not have a weight of the adapter.
        """
        deltas = dict(self.deltas)
        if self.from_base_shapes:
            _add(deltas, self.from_base_shapes(base))
        return deltas


@remote_inputs(path="adapter")
def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT directory or a GGUF LoRA file.

    Raises:
        AdapterError: if it is missing or makes no sense.
        UnsupportedAdapterError: if its method or an option of it is not supported.
        FormatError: if its weights are damaged.
    """
    location = Path(path)
    if not location.exists():
        raise AdapterError(
            f"{location}: no such file or directory; expected a PEFT adapter directory or a GGUF LoRA file"
        )
    adapter = _read_peft(location) if location.is_dir() else _read_gguf(location)
    _LOG.debug("read %s: %s, %d changes", location, adapter.method, len(adapter.deltas))
    return adapter


def _read_gguf(location: Path) -> Adapter:
    if location.suffix in {".safetensors", ".bin", ".json"}:
        raise AdapterError(f"{location}: is one file of an adapter; give the directory it lies in")
    lora = read_gguf_lora(location)
    return Adapter(
        location.stem,
        location,
        sha256_of(location),
        {name: (delta,) for name, delta in lora.deltas.items()},
        "GGUF LoRA",
        lora.architecture,
        invocation_tokens=lora.invocation_tokens,
    )


def _read_peft(folder: Path) -> Adapter:
    from gguflora.adapters.peft.registry import READERS, SHAPED_READERS  # noqa: PLC0415  (some fifty modules)

    config = read_config(folder)
    if config.peft_type in REFUSED:
        raise UnsupportedAdapterError(f"{config.path}: {config.peft_type}: {REFUSED[config.peft_type]}")
    if config.peft_type not in READERS and config.peft_type not in SHAPED_READERS:
        raise UnsupportedAdapterError(
            f"{config.path}: peft_type {config.peft_type} is not supported; supported: "
            + ", ".join(sorted([*READERS, *SHAPED_READERS]))
        )
    weights, tensors = read_weights(folder, "adapters" if config.peft_type == MLX else "adapter_model")
    _check_finite(weights, tensors)
    saved, own = split_modules_to_save(config, tensors)
    deltas: dict[str, tuple[Delta | ShapeDependentDelta, ...]] = {name: (delta,) for name, delta in saved.items()}
    from_base_shapes = None
    if config.peft_type in READERS:
        _add(deltas, READERS[config.peft_type](config, own))
    elif own:
        from_base_shapes = partial(SHAPED_READERS[config.peft_type], config, own)
    if not deltas and not from_base_shapes:
        raise AdapterError(f"{weights}: holds no tensor of an adapter; save it again")
    unclear = config.unclear_alphas(name.removesuffix(".weight") for name in deltas)
    return Adapter(
        folder.resolve().name,
        weights,
        sha256_of(*weight_files(weights)),
        deltas,
        config.peft_type,
        warnings=(*about_pooler(tensors), *_about_alphas(unclear)),
        ensure_weight_tying=config.flag("ensure_weight_tying") or config.peft_type == MLX,
        invocation_tokens=_invocation_tokens(config),
        from_base_shapes=from_base_shapes,
    )


def _invocation_tokens(config: PeftConfig) -> tuple[int, ...]:
    """Of aLoRA (https://arxiv.org/abs/2504.12397), a LoRA that leaves what precedes these tokens to the base."""
    tokens = config.fields.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in tokens):
        raise config.error("alora_invocation_tokens", "a list of tokens", tokens)
    return tuple(tokens)


def _about_alphas(modules: list[str]) -> tuple[str, ...]:
    if not modules:
        return ()
    return (
        f"several patterns of alpha_pattern match {listed(modules, 3)}: the first is taken, as PEFT does when it loads "
        "the file, but PEFT has sorted them when it wrote it; if another held in training, leave only that one",
    )


def _add(
    deltas: dict[str, tuple[Delta | ShapeDependentDelta, ...]], others: Mapping[str, Delta | ShapeDependentDelta]
) -> None:
    for name, delta in others.items():
        deltas[name] = (*deltas.get(name, ()), delta)


def _check_finite(path: Path, tensors: Mapping[str, Array]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind in "fu" and not np.isfinite(as_float32(tensor)).all():
            raise AdapterError(f"{path}: tensor {name!r} holds NaN or infinity; its training has diverged")
