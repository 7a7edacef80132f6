"""Find the rows of a GGUF tensor that hold a matrix: all of them, or those of one part of a fused tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)(\.weight|\.bias)")
_QKV: Final = ("attn_q", "attn_k", "attn_v")
_GATE_UP: Final = ("ffn_gate_exps", "ffn_up_exps")


@dataclass(frozen=True, slots=True)
class Region:
    """Rows of a tensor that hold one matrix, or one matrix of each expert.

    Attributes:
        tensor: name of the tensor.
        start: first row of the matrix, or of the first expert's matrix.
        n_rows: number of rows of the matrix.
        stride: number of rows from one expert's matrix to the next.
    """

    tensor: str
    start: int
    n_rows: int
    stride: int

    @property
    def all_rows(self) -> Indices | None:
        """The row numbers of the matrix, which a slice needs if the matrix is only a part of the tensor; else None."""
        return None if self.n_rows == self.stride else np.arange(self.n_rows)


def region_of(base: BaseModel, tensor: str) -> Region | None:
    """Return the rows that hold the matrix with the GGUF name ``tensor``; None if the base does not have it.

    Converters may fuse q, k and v into ``attn_qkv``, and the experts' gate and up into ``ffn_gate_up_exps``.

    Raises:
        MismatchError: if the rows of a fused tensor cannot be divided among its parts.
    """
    if tensor in base.shapes:
        shape = base.shapes[tensor]
        n_rows = shape[0] if len(shape) == 1 else shape[-2]
        return Region(tensor, 0, n_rows, n_rows)
    match = _BLOCK.fullmatch(tensor)
    if match and match[2] in _QKV:
        return _in_qkv(base, int(match[1]), _QKV.index(match[2]), f"blk.{match[1]}.attn_qkv{match[3]}")
    if match and match[2] in _GATE_UP:
        fused = f"blk.{match[1]}.ffn_gate_up_exps{match[3]}"
        if fused in base.shapes:
            stride = base.shapes[fused][-2]
            return Region(fused, stride // 2 * _GATE_UP.index(match[2]), stride // 2, stride)
    return None


def _in_qkv(base: BaseModel, layer: int, index: int, fused: str) -> Region | None:
    if fused not in base.shapes or layer >= min(len(base.n_head), len(base.n_head_kv)):
        return None
    heads = (base.n_head[layer], base.n_head_kv[layer], base.n_head_kv[layer])
    stride = base.shapes[fused][0]
    if sum(heads) < 1 or stride % sum(heads):
        raise MismatchError(
            f"{base.path}: {fused!r} has {stride} rows, which cannot be divided into {sum(heads)} heads"
        )
    width = stride // sum(heads)
    return Region(fused, sum(heads[:index]) * width, heads[index] * width, stride)


def rows_of(base: BaseModel, tensor: str) -> int:
    """Return the number of rows of the matrix with the GGUF name ``tensor``.

    Raises:
        MismatchError: if the base does not have it.
    """
    region = region_of(base, tensor)
    if region is None:
        raise MismatchError(
            f"{base.path} has no tensor {tensor!r}, as {base.architecture} should; is it the right base?"
        )
    return region.n_rows
