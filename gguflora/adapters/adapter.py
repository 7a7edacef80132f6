"""Read an adapter (a PEFT or mlx-lm directory, or a GGUF LoRA file) into deltas of weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, LowRank, Replace, ReplaceRows, ShapeDependentDelta, with_rows
from gguflora.adapters.gguf_lora import read_gguf_lora
from gguflora.adapters.mlx import scale_warnings
from gguflora.adapters.peft.config import MLX, PeftConfig, read_config
from gguflora.adapters.peft.modules_to_save import split_modules_to_save
from gguflora.adapters.peft.pooler import pooler_warnings
from gguflora.adapters.peft.unsupported import REFUSED
from gguflora.adapters.peft.wrappers import without_frozen, without_wrappers
from gguflora.adapters.wrong_folder import is_image_lora
from gguflora.errors import AdapterError, UnsupportedAdapterError, listed
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import remote_inputs
from gguflora.files.safetensors import Array, as_float32, read_header, read_weights, weight_files

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read but not yet fitted to a base model.

    Attributes:
        name: name of its directory, or of its file without the suffix.
        path: path of the file with the weights; for shards, of their index.
        sha256: SHA-256 of the files with the weights, in hexadecimal.
        deltas: the deltas of each weight, which are added up. Keys are names in the Hugging Face model, or in GGUF if
            ``architecture`` is set. Deltas that depend on shapes of the base are missing here, see `deltas_of`.
        method: ``peft_type`` of a PEFT adapter, "MLX", or "GGUF LoRA".
        architecture: architecture of the base for which a GGUF LoRA was made; None for other adapters.
        warnings: messages for the user.
        ensure_weight_tying: whether all deltas of the token embedding also apply to an output weight tied to it.
        invocation_tokens: the tokens that activate an activated LoRA; empty for other adapters.
        from_base_shapes: function that returns the remaining deltas, given the shapes of the base's weights; None if
            there are none.
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
        """Former name of `deltas`; the next release will remove it."""
        return self.deltas

    def deltas_of(self, base: BaseShapes) -> dict[str, tuple[Delta | ShapeDependentDelta, ...]]:
        """Return all deltas, including those that depend on shapes of the base's weights.

        Args:
            base: the shapes of the base's weights.

        Raises:
            MismatchError: if the base does not have a weight of the adapter.
        """
        deltas = dict(self.deltas)
        if self.from_base_shapes:
            _add(deltas, self.from_base_shapes(base))
        return deltas


@remote_inputs(path="adapter")
def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a PEFT or mlx-lm directory or a GGUF LoRA file.

    Args:
        path: path or remote location of the directory or file.

    Raises:
        AdapterError: if the adapter is missing or invalid.
        UnsupportedAdapterError: if its method or one of its options is not supported.
        FormatError: if its weights are damaged.
    """
    location = Path(path)
    if not location.exists():
        raise AdapterError(
            f"{location}: no such file or directory; expected a PEFT adapter directory or a GGUF LoRA file"
        )
    adapter = _read_peft(location) if location.is_dir() else _read_gguf(location)
    if adapter.deltas and not adapter.from_base_shapes and all(map(_is_zero, adapter.deltas.values())):
        text = "all of its changes are zero, as before the first step of training: it changes nothing"
        adapter = replace(adapter, warnings=(*adapter.warnings, text))
    _LOG.debug("read %s: %s, %d weights", location, adapter.method, len(adapter.deltas))
    return adapter


def _read_gguf(location: Path) -> Adapter:
    if location.suffix == ".safetensors" and is_image_lora(list(read_header(location)[0])):
        raise UnsupportedAdapterError(
            f"{location}: is an image model's LoRA (kohya or diffusers), which no language model can use"
        )
    if location.suffix in {".safetensors", ".bin", ".json", ".npz"}:
        raise AdapterError(f"{location}: is one file of an adapter; give its directory instead")
    lora = read_gguf_lora(location)
    return Adapter(
        location.stem,
        location,
        sha256_of(location),
        {name: (delta,) for name, delta in lora.deltas.items()},
        "GGUF LoRA",
        lora.architecture,
        warnings=lora.warnings,
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
    if is_image_lora(list(tensors)):
        raise UnsupportedAdapterError(
            f"{weights}: is an image model's LoRA (kohya or diffusers), which no language model can use"
        )
    tensors, left_out = without_frozen(without_wrappers(weights, tensors))
    _check_finite(weights, tensors)
    saved, method_tensors = split_modules_to_save(config, tensors)
    deltas: dict[str, tuple[Delta | ShapeDependentDelta, ...]] = {name: (delta,) for name, delta in saved.items()}
    from_base_shapes = None
    if config.peft_type in READERS:
        _add(deltas, READERS[config.peft_type](config, method_tensors))
    elif method_tensors:
        from_base_shapes = partial(SHAPED_READERS[config.peft_type], config, method_tensors)
    if not deltas and not from_base_shapes:
        raise AdapterError(f"{weights}: holds no tensor of an adapter; save it again")
    ambiguous = config.ambiguous_alphas(name.removesuffix(".weight") for name in deltas)
    return Adapter(
        folder.resolve().name,
        weights,
        sha256_of(*weight_files(weights)),
        deltas,
        config.peft_type,
        warnings=(
            *left_out,
            *pooler_warnings(tensors),
            *_alpha_warnings(ambiguous),
            *(scale_warnings(config) if config.peft_type == MLX else ()),
        ),
        ensure_weight_tying=config.flag("ensure_weight_tying") or config.peft_type == MLX,
        invocation_tokens=_invocation_tokens(config),
        from_base_shapes=from_base_shapes,
    )


def _invocation_tokens(config: PeftConfig) -> tuple[int, ...]:
    """Return the tokens from which on an aLoRA (https://arxiv.org/abs/2504.12397) is active; empty for other LoRAs."""
    tokens = config.fields.get("alora_invocation_tokens") or []
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in tokens):
        raise config.error("alora_invocation_tokens", "a list of tokens", tokens)
    return tuple(tokens)


def _alpha_warnings(modules: list[str]) -> tuple[str, ...]:
    if not modules:
        return ()
    return (
        f"several patterns of alpha_pattern match {listed(modules, 3)}: the first one is used, as in PEFT. PEFT sorts "
        "the patterns when it writes the file, so another may have applied in training; if so, keep only that one",
    )


def _add(
    deltas: dict[str, tuple[Delta | ShapeDependentDelta, ...]], added: Mapping[str, Delta | ShapeDependentDelta]
) -> None:
    for name, delta in added.items():
        present = deltas.get(name, ())
        if isinstance(delta, ReplaceRows) and len(present) == 1 and isinstance(present[0], Replace):
            deltas[name] = (with_rows(present[0], delta),)
        else:
            deltas[name] = (*present, delta)


def _is_zero(deltas: tuple[Delta | ShapeDependentDelta, ...]) -> bool:
    return all(
        isinstance(delta, LowRank)
        and (delta.scaling == 0 or not as_float32(delta.b).any() or not as_float32(delta.a).any())
        for delta in deltas
    )


def _check_finite(path: Path, tensors: Mapping[str, Array]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind in "fu" and not np.isfinite(as_float32(tensor)).all():
            raise AdapterError(f"{path}: tensor {name!r} holds NaN or infinity; its training has diverged")
