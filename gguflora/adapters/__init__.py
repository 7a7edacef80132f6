"""Adapters: a PEFT directory or a GGUF LoRA file, read into deltas."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.config import PeftConfig, read_config
from gguflora.adapters.gguf_lora import read_gguf_lora
from gguflora.adapters.lora import read_lora
from gguflora.deltas import LowRank
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array, as_float32, read_weights

Reader = Callable[[PeftConfig, Mapping[str, Array]], dict[str, LowRank]]

READERS: Final[dict[str, Reader]] = {
    "LORA": read_lora,
}
"""The PEFT methods gguflora reads, by the ``peft_type`` of their configuration."""


_COPY: Final = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")
"""PEFT's save_embedding_layers: beside the factors of an embedding or head it saves the weight that they change."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read but not yet fitted to a base model.

    Attributes:
        name: of its directory, or its file without the suffix.
        path: of the file with the weights.
        sha256: of that file, in hexadecimal.
        changes: the change of each weight, by the module's path in the Hugging Face model or, with ``architecture``
            set, by the tensor's name in GGUF.
        architecture: of the base it was made for, where it is a GGUF LoRA; None for a PEFT directory.
        copies: weights of the base that PEFT saved along with an adapted embedding or head, by the module's path.
    """

    name: str
    path: Path
    sha256: str
    changes: Mapping[str, LowRank]
    architecture: str | None = None
    copies: Mapping[str, Array] = field(default_factory=dict)


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
    if not location.is_dir():
        if location.suffix in {".safetensors", ".bin", ".json"}:
            raise AdapterError(f"{location}: is one file of an adapter; give the directory it lies in")
        architecture, changes = read_gguf_lora(location)
        adapter = Adapter(location.stem, location, _sha256(location), changes, architecture)
    else:
        config = read_config(location)
        reader = READERS.get(config.peft_type)
        if reader is None:
            raise UnsupportedAdapterError(
                f"{config.path}: peft_type {config.peft_type} is not supported; supported: {', '.join(READERS)}"
            )
        weights, tensors = read_weights(location, "adapter_model")
        copies = {found["module"]: key for key in tensors if (found := _COPY.fullmatch(key))}
        own = {key: tensor for key, tensor in tensors.items() if key not in copies.values()}
        adapter = Adapter(
            location.resolve().name,
            weights,
            _sha256(weights),
            reader(config, own),
            copies={module: tensors[key] for module, key in copies.items()},
        )
    if not adapter.changes:
        raise AdapterError(f"{adapter.path}: holds no tensor of an adapter; save it again")
    _check_finite(adapter)
    return adapter


def _check_finite(adapter: Adapter) -> None:
    for target, change in adapter.changes.items():
        for part, array in (("A", change.a), ("B", change.b)):
            if not np.isfinite(as_float32(array)).all():
                raise AdapterError(
                    f"{adapter.path}: {part} of {target!r} holds NaN or infinity; its training has diverged"
                )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
