"""Where a Hugging Face weight lies in a GGUF file, and in which order its rows lie there.

Names come from gguf's ``TensorNameMap``; what llama.cpp's converter does beyond renaming is stated here, a rule a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from gguflora.base_model import BaseModel
from gguflora.deltas import Indices
from gguflora.errors import ArchitectureError, MismatchError


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a Hugging Face weight W and its place in a GGUF tensor.

    ``T[first : first + n] = W[rows][:, columns] + shift``, transposed before it is stored if ``transposed``. T's
    leading dimensions are flattened: expert e of (E, n_out, n_in) begins at row ``e * n_out``.

    Attributes:
        tensor: name of the GGUF tensor.
        first: row of the tensor with which the piece begins.
        rows: which rows of W, in the order in which GGUF stores them; None for all as they are.
        columns: the same for columns.
        transposed: whether GGUF stores the piece transposed.
        shift: what GGUF adds to the values (Gemma's norms are stored as 1 + w).
    """

    tensor: str
    first: int = 0
    rows: Indices | None = None
    columns: Indices | None = None
    transposed: bool = False
    shift: float = 0.0


RowOrder = Callable[[BaseModel, str, int], Indices]
"""From a base, a tensor and its layer to the order in which GGUF stores the tensor's rows."""


def _rotary_q(base: BaseModel, tensor: str, layer: int) -> Indices:
    return _interleaved(base, tensor, base.n_head[layer : layer + 1])


def _rotary_k(base: BaseModel, tensor: str, layer: int) -> Indices:
    return _interleaved(base, tensor, base.n_head_kv[layer : layer + 1])


def _interleaved(base: BaseModel, tensor: str, n_heads: tuple[int, ...]) -> Indices:
    """Within each head: row 0 of the first half, row 0 of the second, row 1 of the first, ...

    Hugging Face rotates row i with row i + head_dim / 2; ggml's plain rotary embedding rotates neighbours.
    """
    heads, rows = n_heads[0] if n_heads else 0, base.shapes[tensor][0]
    if heads < 1 or rows % (2 * heads):
        raise MismatchError(f"{base.path}: {tensor!r} has {rows} rows, which {heads} attention heads cannot share")
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


ROW_ORDERS: Final[dict[str, dict[str, RowOrder]]] = {
    "llama": {"attn_q": _rotary_q, "attn_k": _rotary_k},  # mistral too
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
}
"""The architectures gguflora knows, each with the tensors whose rows GGUF stores in another order."""

_NORMS_PLUS_ONE: Final = {"gemma2", "gemma3"}


def pieces_of(base: BaseModel, weight: str) -> list[Piece]:
    """Where a Hugging Face weight lies in the base: its pieces, none if it has no place there.

    Args:
        base: the base model.
        weight: the weight's name, for example ``model.layers.0.self_attn.q_proj.weight``.
    """
    tensor = _renamed(base, weight)
    if tensor is None:
        return []
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(?:weight|bias)", tensor)
    order = ROW_ORDERS[base.architecture].get(found[2]) if found and tensor in base.shapes else None
    rows = order(base, tensor, int(found[1])) if found and order else None
    shift = 1.0 if base.architecture in _NORMS_PLUS_ONE and tensor.endswith("norm.weight") else 0.0
    return [Piece(tensor, rows=rows, shift=shift)]


def check_known(base: BaseModel) -> None:
    """Raise ``ArchitectureError`` if gguflora does not know the base's architecture."""
    if base.architecture not in ROW_ORDERS:
        raise ArchitectureError(
            f"{base.path}: architecture {base.architecture!r} is not supported; supported: {', '.join(ROW_ORDERS)}"
        )


def _renamed(base: BaseModel, weight: str) -> str | None:
    """The GGUF name of a Hugging Face weight, or None.

    Multimodal models hold the language model one level deeper, bare models (``AutoModel``) one level higher.
    """
    names, path = _tensor_names(base.architecture, base.n_layers), weight.replace("language_model.", "")
    suffixes = (".weight", ".bias")
    name: str | None = names.get_name(path, suffixes) or names.get_name(f"model.{path}", suffixes)
    return name if name and name.endswith(suffixes) else None


@lru_cache(maxsize=4)
def _tensor_names(architecture: str, n_layers: int) -> Any:  # noqa: ANN401  (gguf.TensorNameMap)
    import gguf  # noqa: PLC0415  (slow to import)

    known = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], n_layers)
