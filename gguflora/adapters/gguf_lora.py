"""Read GGUF LoRA files, with the same meaning as in llama.cpp's ``llama_adapter_lora_init``.

In numpy's order, ``<tensor>.lora_a`` is (rank, n_in) and ``<tensor>.lora_b`` (n_out, rank). For ``token_embd.weight``,
which llama.cpp multiplies the other way round, they are (rows, rank) and (width, rank). For a stack of experts they are
(n_experts, rank, n_in) and (n_experts, n_out, rank), and the delta of expert e is named ``<tensor>.<e>``. The scaling
is alpha / rank, or 1 if alpha is 0 or absent. A vector ``<..>_norm.weight``, which llama.cpp's converter keeps of an
adapter with norms, replaces the base's; llama.cpp loads such a file, but ignores the vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguflora import quants
from gguflora.adapters.deltas import LowRank, Replace
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.files.safetensors import Array

ALPHA_KEY: Final = "adapter.lora.alpha"
INVOCATION_KEY: Final = "adapter.alora.invocation_tokens"

_SUFFIXES: Final = (".lora_a", ".lora_b")


@dataclass(frozen=True, slots=True)
class GgufLora:
    """The contents of a GGUF LoRA file.

    Attributes:
        architecture: architecture of the base.
        deltas: the delta of each tensor, by its GGUF name.
        invocation_tokens: the tokens that activate an activated LoRA; empty for other LoRAs.
        warnings: what was left out.
    """

    architecture: str
    deltas: dict[str, LowRank | Replace]
    invocation_tokens: tuple[int, ...]
    warnings: tuple[str, ...] = ()


_TABLES: Final = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tables of the base that llama.cpp's convert_lora_to_gguf.py wrote into LoRA files in August 2024 (issue 9114)."""


def read_gguf_lora(path: Path) -> GgufLora:
    """Read a GGUF LoRA file.

    Raises:
        GgufError: if the file is damaged.
        AdapterError: if the file is not a GGUF LoRA, or a tensor has only one of its two factors.
    """
    with GgufFile(path) as file:
        kind, adapter_type = file.metadata.get("general.type"), file.metadata.get("adapter.type")
        if kind != "adapter" or adapter_type != "lora":
            raise AdapterError(
                f"{path}: general.type is {kind!r} and adapter.type {adapter_type!r}, expected 'adapter' and 'lora': "
                "this GGUF file is not a LoRA adapter"
            )
        alpha = file.metadata.get(ALPHA_KEY, 0.0)
        if not isinstance(alpha, float) or not math.isfinite(alpha):
            raise AdapterError(f"{path}: {ALPHA_KEY} is {alpha!r}, expected a finite number")
        deltas: dict[str, LowRank | Replace] = {
            name: Replace(_values(file, tensor).reshape(-1, 1))
            for name, tensor in file.tensors.items()
            if is_norm(tensor)
        }
        tables = sorted(_TABLES & file.tensors.keys())
        factors = {name: tensor for name, tensor in file.tensors.items() if name not in _TABLES}
        for name, (a, b) in _pair_up(path, factors).items():
            deltas |= _read_pair(file, name, a, b, alpha)
        told = f"left out {', '.join(tables)}: a table of the base's, with which llama.cpp does not load the file"
        return GgufLora(file.architecture, deltas, _invocation_tokens(file), (told,) if tables else ())


def _invocation_tokens(file: GgufFile) -> tuple[int, ...]:
    tokens = file.metadata.get(INVOCATION_KEY) or []
    if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in tokens):
        raise AdapterError(f"{file.path}: {INVOCATION_KEY} is {tokens!r:.100}, expected an array of tokens")
    return tuple(tokens)


def is_norm(tensor: TensorEntry) -> bool:
    """Whether a tensor of a GGUF LoRA file is a norm, complete, instead of a factor."""
    return tensor.name.endswith("_norm.weight") and len(tensor.shape) == 1


def _pair_up(path: Path, tensors: dict[str, TensorEntry]) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    factors = [name for name, tensor in tensors.items() if not is_norm(tensor)]
    unknown = [name for name in factors if not name.endswith(_SUFFIXES)]
    if unknown:
        raise AdapterError(f"{path}: tensor {unknown[0]!r} is neither .lora_a nor .lora_b, nor a norm")
    pairs = {}
    for name in dict.fromkeys(name[: -len(".lora_a")] for name in factors):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            raise AdapterError(f"{path}: {name!r} has only one of .lora_a and .lora_b; the adapter is incomplete")
        if len(a.shape) != len(b.shape) or len(a.shape) not in {2, 3} or a.shape[:-2] != b.shape[:-2]:
            raise UnsupportedAdapterError(
                f"{path}: {name!r} has factors {a.shape} and {b.shape}, expected two matrices, or two stacks with a "
                "matrix for each expert"
            )
        pairs[name] = (a, b)
    return pairs


def _read_pair(file: GgufFile, name: str, a: TensorEntry, b: TensorEntry, alpha: float) -> dict[str, LowRank]:
    left, right = _values(file, b), _values(file, a)
    rank = left.shape[-1]
    if name == TOKEN_EMBEDDING:
        left, right = right, left.T
    if left.shape[-1] != right.shape[-2]:
        raise AdapterError(f"{file.path}: {name!r} has factors {a.shape} and {b.shape}, which do not share a rank")
    scaling = alpha / rank if alpha else 1.0
    if right.ndim == 2:
        return {name: LowRank(right, left, scaling)}
    return {f"{name}.{expert}": LowRank(right[expert], left[expert], scaling) for expert in range(len(right))}


def _values(file: GgufFile, tensor: TensorEntry) -> Array:
    return quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type.id).reshape(tensor.shape)
