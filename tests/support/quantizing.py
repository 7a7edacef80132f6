"""gguflora's kernels beside ggml's: the same bytes, or where they differ."""

import numpy as np

from gguflora.quants import kernels
from gguflora.quants._lib import isa_names
from gguflora.quants.types import GgmlType

ISAS = isa_names()


def by_name(value: object) -> str | None:
    return value.name if isinstance(value, GgmlType) else None


def quantized(x: np.ndarray, kind: GgmlType, isa: str, imatrix: np.ndarray | None = None) -> np.ndarray:
    out = np.full((len(x), kind.row_bytes(x.shape[1])), 0xAA, np.uint8)
    kernels.quantize_rows(x, kind, out, imatrix=imatrix, isa=isa)
    return out


def assert_same_bytes(x: np.ndarray, kind: GgmlType, isa: str, imatrix: np.ndarray | None = None) -> None:
    from support.oracles import libggml  # here, so that the rest can be used without it

    expected = libggml.quantize(x, kind.id, imatrix)
    found = quantized(x, kind, isa, imatrix)
    if (found != expected).any():
        row, byte = np.argwhere(found != expected)[0]
        block = byte // kind.block_bytes
        start = block * kind.block_weights
        raise AssertionError(
            f"{kind.name} on {isa}: {(found != expected).sum()} bytes differ, first in row {row}, block {block}, "
            f"byte {byte % kind.block_bytes}: {found[row, byte]} for {expected[row, byte]}; "
            f"weights {x[row, start : start + kind.block_weights].tolist()}"
        )
