"""The tensor list of a GGUF file: names, shapes, types and offsets, checked.

GGUF lists dimensions with the fastest-varying first. This module, and no other, converts them to numpy's order.
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
    """A tensor of a GGUF file.

    Attributes:
        name: name of the tensor.
        shape: dimensions in numpy's order: (.., rows, n_in).
        type: type of the values.
        offset: offset of the first byte from the start of the file; in a split model, as if its files were
            concatenated.
        nbytes: size of the data in bytes.
    """

    name: str
    shape: Shape
    type: GgmlType
    offset: int
    nbytes: int

    @property
    def n_in(self) -> int:
        """Number of weights in a row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows, over all leading dimensions."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """An entry of the tensor list, not yet checked.

    Attributes:
        name: name of the tensor.
        shape: dimensions in numpy's order.
        type: ggml's number of the type.
        offset: offset of the first byte from the start of the tensor data.
    """

    name: str
    shape: Shape
    type: int
    offset: int


def read_listed(cursor: Cursor) -> ListedTensor:
    """Read the next entry of the tensor list."""
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
    """Check that the listed tensors lie in the file and do not overlap.

    Args:
        path: path of the file, for messages.
        listed: the entries of the tensor list.
        data_start: offset of the tensor data from the start of the file.
        alignment: alignment of the tensors' data in bytes.
        size: size of the file in bytes.

    Returns:
        The tensors by name, in the order of the list.

    Raises:
        GgufError: if an entry is invalid, or two tensors have one name or overlap.
    """
    tensors: dict[str, TensorEntry] = {}
    for tensor in listed:
        if tensor.name in tensors:
            raise GgufError(f"{path}: two tensors are named {tensor.name!r:.100}")
        tensors[tensor.name] = _check(path, tensor, data_start, alignment, size)
    stop, previous = data_start, ""
    for entry in sorted(tensors.values(), key=lambda entry: entry.offset):
        if entry.offset < stop:
            raise GgufError(f"{path}: tensors {previous!r:.100} and {entry.name!r:.100} overlap")
        stop, previous = entry.offset + entry.nbytes, entry.name
    return tensors


def _check(path: Path, tensor: ListedTensor, data_start: int, alignment: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {tensor.name!r:.100}"
    kind = _type_numbered(tensor.type) or foreign_type(tensor.type)
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
    start = data_start + tensor.offset
    if start + nbytes > size:
        raise GgufError(
            f"{where} needs bytes {start} to {start + nbytes}, but the file has only {size}; it is damaged or "
            "incomplete"
        )
    return TensorEntry(tensor.name, tensor.shape, kind, start, nbytes)


def _type_numbered(kind: int) -> GgmlType | None:
    """Return the type with a ggml number, or None. Types without kernels here (integers) come from the gguf package."""
    if kind in TYPES:
        return TYPES[kind]
    import gguf  # noqa: PLC0415  (slow to import)

    try:
        listed = gguf.GGMLQuantizationType(kind)
        sizes = gguf.GGML_QUANT_SIZES[listed]
    except (ValueError, KeyError):
        return None
    return GgmlType(kind, listed.name, *sizes)


_PACKED: Final = "llama.cpp of 2024, which packed weights for one kind of processor"
_FOREIGN_TYPES: Final = {
    **dict.fromkeys((4, 5), "llama.cpp before June 2023"),
    **dict.fromkeys((31, 32, 33, 37, 38), _PACKED),
    36: "bitnet.cpp and ik_llama.cpp, or IQ4_NL_4_4 of " + _PACKED,
}
_FOREIGN_NAMES: Final = {
    **{4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S", 37: "IQ4_NL_4_8"},
    **{38: "IQ4_NL_8_8", 97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN"},
    **{136: "Q8_K64", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS"},
    **{145: "IQ2_KS", 146: "IQ4_KSS", 147: "Q8_K16", 148: "Q8_K32", 149: "Q8_KR8", 150: "Q8_K128", 151: "Q8_KV"},
    **{152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
    **{202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4"},
    **{213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4"},
    **{220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16"},
    **{233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4"},
    **{344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 397: "Q8_K_R16", 398: "Q8_KV_R8", 399: "Q8_K_R8"},
}
"""Names of types by number. Source: ggml/include/ggml.h and gguf-py/gguf/constants.py of ik_llama.cpp."""

_IK_LLAMA: Final = range(97, 400)
_MAX_TYPE: Final = 512
"""Above the number of any type; a larger number means that the file is damaged."""


def foreign_type(kind: int) -> GgmlType | None:
    """Return a type that another program writes, by its number: its name is known, the size of its blocks is not."""
    if kind not in _FOREIGN_TYPES and kind not in _IK_LLAMA:
        named = f"type {kind} of a newer llama.cpp or of another program"
        return GgmlType(kind, named, 1, 0) if kind < _MAX_TYPE else None
    maker = _FOREIGN_TYPES.get(kind, "ik_llama.cpp")
    return GgmlType(kind, f"{_FOREIGN_NAMES.get(kind, f'type {kind}')} of {maker}", 1, 0)


def check_readable(path: Path, tensors: Iterable[TensorEntry]) -> None:
    """Raise ``GgufError`` if a tensor has a type whose blocks are not known here."""
    for tensor in tensors:
        if not tensor.type.block_bytes:
            raise GgufError(
                f"{path}: tensor {tensor.name!r:.100} is {tensor.type.name}, whose values cannot be read here: use a "
                "base of llama.cpp's own types for this; `gguflora convert` needs only its shapes"
            )


def n_bytes(shape: Shape, kind: GgmlType) -> int:
    """Return the size of a tensor's data in bytes.

    Raises:
        QuantizationError: if a row is not a whole number of blocks.
    """
    return math.prod(shape[:-1]) * kind.row_bytes(shape[-1])


def align(offset: int, alignment: int) -> int:
    """Round an offset up to a multiple of the alignment."""
    return -(-offset // alignment) * alignment


def encode_tensor(name: str, shape: Shape, kind: GgmlType, offset: int) -> bytes:
    """Encode an entry of the tensor list; ``offset`` counts from the start of the tensor data."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return encode_string(name) + dims + struct.pack("<IQ", kind.id, offset)


def layer_of(tensor_name: str) -> int | None:
    """Return the layer number in a tensor's name (``blk.7.attn_q.weight``, ``dec.blk.7.attn_q.weight``), or None."""
    match = re.match(r"(?:enc\.|dec\.)?blk\.(\d{1,6})\.", tensor_name)
    return int(match[1]) if match else None
