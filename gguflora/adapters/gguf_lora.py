"""GGUF LoRA files, as llama.cpp's ``llama_adapter_lora_init`` reads them.

``<tensor>.lora_a`` is (rank, n_in) and ``<tensor>.lora_b`` (n_out, rank) in numpy's order; of ``token_embd.weight``,
whose product llama.cpp takes the other way round, (rows, rank) and (width, rank). The factor is alpha / rank, or 1
where alpha is 0 or absent.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from gguflora import quants
from gguflora.deltas import LowRank
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.files.safetensors import Array

ALPHA_KEY: Final = "adapter.lora.alpha"

_SUFFIXES: Final = (".lora_a", ".lora_b")


def read_gguf_lora(path: Path) -> tuple[str, dict[str, LowRank]]:
    """Read a GGUF LoRA file: the base's architecture, and the change of each tensor by its GGUF name.

    Raises:
        GgufError: if the file is damaged.
        AdapterError: if it is no GGUF LoRA, or its tensors do not pair up.
    """
    with GgufFile(path) as file:
        kind, adapter_type = file.metadata.get("general.type"), file.metadata.get("adapter.type")
        if kind != "adapter" or adapter_type != "lora":
            raise AdapterError(
                f"{path}: general.type is {kind!r} and adapter.type {adapter_type!r}, expected 'adapter' and 'lora': "
                "this GGUF file is not a LoRA adapter"
            )
        if file.metadata.get("adapter.alora.invocation_tokens"):
            raise UnsupportedAdapterError(
                f"{path}: is an activated LoRA, which begins at its invocation tokens; load it at run time"
            )
        alpha = file.metadata.get(ALPHA_KEY, 0.0)
        if not isinstance(alpha, float) or not math.isfinite(alpha):
            raise AdapterError(f"{path}: {ALPHA_KEY} is {alpha!r}, expected a finite number")
        pairs = _pair_up(path, file.tensors)
        return file.architecture, {name: _read_pair(file, name, a, b, alpha) for name, (a, b) in pairs.items()}


def _pair_up(path: Path, tensors: dict[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    strangers = [name for name in tensors if not name.endswith(_SUFFIXES)]
    if strangers:
        raise AdapterError(f"{path}: tensor {strangers[0]!r} is neither .lora_a nor .lora_b")
    pairs = {}
    for name in dict.fromkeys(name[: -len(".lora_a")] for name in tensors):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            raise AdapterError(f"{path}: {name!r} has only one of .lora_a and .lora_b; the adapter is incomplete")
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise UnsupportedAdapterError(f"{path}: {name!r} has factors {a.shape} and {b.shape}, expected matrices")
        pairs[name] = (a, b)
    return pairs


def _read_pair(file: GgufFile, name: str, a: TensorEntry, b: TensorEntry, alpha: float) -> LowRank:
    left, right = _values(file, b), _values(file, a)
    rank = left.shape[1]
    if name == TOKEN_EMBEDDING:
        left, right = right, left.T
    if left.shape[1] != right.shape[0]:
        raise AdapterError(f"{file.path}: {name!r} has factors {a.shape} and {b.shape}, which do not share a rank")
    return LowRank(right, left, alpha / rank if alpha else 1.0)


def _values(file: GgufFile, tensor: TensorEntry) -> Array:
    return quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type.id).reshape(tensor.shape)
