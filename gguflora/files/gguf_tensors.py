"""The tensor list of a GGUF file: names, shapes, types and places, checked.

GGUF stores dimensions fastest first; here, and only here, they are turned into numpy's order.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gguflora.errors import GgufError, QuantizationError
from gguflora.files.gguf_header import Cursor, encode_string
from gguflora.quants.types import TYPES, GgmlType

MAX_DIMS: Final = 4
TOKEN_EMBEDDING: Final = "token_embd.weight"  # noqa: S105  (not a password)
OUTPUT: Final = "output.weight"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a GGUF file.

    Attributes:
        shape: in numpy's order, rows last but one, ``n_in`` last.
        offset: of the first byte, from the start of the file; of a split model's, from the start of the first of its
            files, as if they were one after the other.
    """

    name: str
    shape: Shape
    type: GgmlType
    offset: int
    nbytes: int

    @property
    def n_in(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A tensor as the list states it; ``offset`` is from the start of the tensor data, ``type`` ggml's number."""

    name: str
    shape: Shape
    type: int
    offset: int


def read_listed(cursor: Cursor) -> ListedTensor:
    """The next tensor of the list."""
    name = cursor.string("the name of a tensor")
    n_dims = cursor.number("<I", f"the number of dimensions of {name!r:.100}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r:.100} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
    fastest_first = [cursor.number("<Q", f"a dimension of {name!r:.100}") for _ in range(n_dims)]
    kind = cursor.number("<I", f"the type of {name!r:.100}")
    return ListedTensor(name, tuple(reversed(fastest_first)), kind, cursor.number("<Q", f"the offset of {name!r:.100}"))


def place_tensors(
    path: Path, listed: Iterable[ListedTensor], data_start: int, alignment: int, size: int
) -> dict[str, TensorEntry]:
    """The tensors by name, in the order of the list, each checked to lie in the file and apart from the others."""
    tensors: dict[str, TensorEntry] = {}
    for tensor in listed:
        if tensor.name in tensors:
            raise GgufError(f"{path}: two tensors are named {tensor.name!r:.100}")
        tensors[tensor.name] = _check(path, tensor, data_start, alignment, size)
    end, before = data_start, ""
    for entry in sorted(tensors.values(), key=lambda entry: entry.offset):
        if entry.offset < end:
            raise GgufError(f"{path}: tensors {before!r:.100} and {entry.name!r:.100} overlap")
        end, before = entry.offset + entry.nbytes, entry.name
    return tensors


def _check(path: Path, tensor: ListedTensor, data_start: int, alignment: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {tensor.name!r:.100}"
    kind = _type_numbered(tensor.type)
    if kind is None:
        raise GgufError(f"{where} has unknown type {tensor.type}; the file is damaged or newer than this gguflora")
    if min(tensor.shape) < 1:
        raise GgufError(f"{where} has shape {tensor.shape}, expected positive dimensions")
    if tensor.offset % alignment:
        raise GgufError(f"{where} begins at offset {tensor.offset}, expected a multiple of the alignment {alignment}")
    try:
        nbytes = n_bytes(tensor.shape, kind)
    except QuantizationError as error:
        raise GgufError(f"{where}: {error}") from error
    first = data_start + tensor.offset
    if first + nbytes > size:
        raise GgufError(
            f"{where} needs bytes {first} to {first + nbytes}, but the file has only {size}; it is damaged or "
            "incomplete"
        )
    return TensorEntry(tensor.name, tensor.shape, kind, first, nbytes)


def _type_numbered(kind: int) -> GgmlType | None:
    """A type by ggml's number: gguflora's own, else the size that the gguf package lists (integers, for example)."""
    if kind in TYPES:
        return TYPES[kind]
    import gguf  # noqa: PLC0415  (slow to import)

    try:
        listed = gguf.GGMLQuantizationType(kind)
        sizes = gguf.GGML_QUANT_SIZES[listed]
    except (ValueError, KeyError):
        return None
    return GgmlType(kind, listed.name, *sizes)


def n_bytes(shape: Shape, kind: GgmlType) -> int:
    """Size of a tensor's data.

    Raises:
        QuantizationError: if a row is not a whole number of blocks.
    """
    return math.prod(shape[:-1]) * kind.row_bytes(shape[-1])


def align(offset: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-offset // alignment) * alignment


def encode_tensor(name: str, shape: Shape, kind: GgmlType, offset: int) -> bytes:
    """An entry of the tensor list."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return encode_string(name) + dims + struct.pack("<IQ", kind.id, offset)


def layer_of(tensor_name: str) -> int | None:
    """The layer number in a tensor's name (``blk.7.attn_q.weight``, ``dec.blk.7.attn_q.weight``), or None."""
    found = re.match(r"(?:enc\.|dec\.)?blk\.(\d{1,6})\.", tensor_name)
    return int(found[1]) if found else None
