"""Encode the difference between two ranges of bytes that hold quantized weights.

A merge changes most codes not at all and the others mostly by one step. Bytes are therefore subtracted field by field,
where a field is as wide as a code, and the differences are sorted by position in the block, so that those of the
scales, which rarely change, are adjacent. If less than half of the bytes differ, the distances between changed bytes
and their differences are stored, else all differences. Huffman coding compresses them; Lempel-Ziv matching is off,
because the changes are random and it makes the result longer. The size is within 6 % of the entropy of the differences
for each position; an exclusive or compressed with zstd takes up to twice as much.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from gguflora.errors import PatchError
from gguflora.quants.arrays import Bytes
from gguflora.quants.types import GgmlType

_FLOATS: Final = {"F16": 16, "BF16": 16, "F32": 32}
_CODE_BITS: Final = {"Q2": 2, "Q3": 2, "TQ": 2, "Q4": 4, "Q5": 4, "Q6": 4, "IQ4": 4, "MXFP4": 4, "NVFP4": 4}
"""Bits of a code within a byte; Q3, Q5 and Q6 store further bits elsewhere in the block."""
_TOP_BITS: Final = {2: 0xAA, 4: 0x88}
_COUNT: Final = struct.Struct("<I")
_RUN_CONTINUES: Final = 255
WIDTHS: Final = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Grain:
    """The structure of bytes: blocks of ``block`` bytes, made of fields of ``width`` bits."""

    block: int
    width: int

    @classmethod
    def from_type(cls, type: GgmlType) -> Grain:
        """Return the grain of a quant type."""
        prefix, _, _ = type.name.partition("_")
        width = _FLOATS.get(type.name) or next((bits for key, bits in _CODE_BITS.items() if prefix.startswith(key)), 8)
        return cls(type.block_bytes, width)

    def fits(self, length: int) -> bool:
        """Whether a range of this length can have this grain."""
        return self.width in WIDTHS and self.block > 0 and length % self.block == 0 and self.block * 8 % self.width == 0


PLAIN: Final = Grain(1, 8)


def encode(old: Bytes, new: Bytes, grain: Grain) -> bytes:
    """Encode the difference from ``old`` to ``new``, which are flat and of equal length."""
    places = np.ascontiguousarray(_subtract(new, old, grain.width).reshape(-1, grain.block).T).reshape(-1)
    changed = np.flatnonzero(places)
    parts = _sparse(places, changed) if 2 * len(changed) < len(places) else [places]
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_HUFFMAN_ONLY)
    chunks = [deflate.compress(part.data) + deflate.flush(zlib.Z_FULL_FLUSH) for part in parts]
    return b"".join([_COUNT.pack(len(changed)), *chunks, deflate.flush()])


def forward(payload: bytes, old: Bytes, grain: Grain) -> Bytes:
    """Return the new bytes, given the old ones and the output of `encode`.

    Raises:
        PatchError: if the payload is damaged.
    """
    return _add(old, _decode(payload, len(old), grain), grain.width)


def backward(payload: bytes, new: Bytes, grain: Grain) -> Bytes:
    """Return the old bytes, given the new ones and the output of `encode`.

    Raises:
        PatchError: if the payload is damaged.
    """
    return _subtract(new, _decode(payload, len(new), grain), grain.width)


def _sparse(places: Bytes, changed: np.ndarray[tuple[int], np.dtype[np.intp]]) -> list[Bytes]:
    """Return run lengths of unchanged bytes (255 means that the run continues), and the changed bytes."""
    distances = np.diff(changed, prepend=-1) - 1
    ends = np.cumsum(distances // _RUN_CONTINUES + 1) - 1
    steps = np.full(int(ends[-1]) + 1 if len(ends) else 0, _RUN_CONTINUES, np.uint8)
    steps[ends] = distances % _RUN_CONTINUES
    return [steps, places[changed]]


def _decode(payload: bytes, length: int, grain: Grain) -> Bytes:
    """Decode the differences, in the order of the file."""
    if len(payload) < _COUNT.size:
        raise _damage_error("it is too short")
    (n_changed,) = _COUNT.unpack_from(payload)
    if n_changed > length:
        raise _damage_error(f"it claims {n_changed} changed bytes of {length}")
    if 2 * n_changed < length:
        stream = _inflate(payload[_COUNT.size :], 2 * n_changed + length // _RUN_CONTINUES)
        places = _from_sparse(stream, n_changed, length)
    else:
        places = _inflate(payload[_COUNT.size :], length)
        if len(places) != length:
            raise _damage_error(f"it holds {len(places)} bytes, expected {length}")
    return np.ascontiguousarray(places.reshape(grain.block, -1).T).reshape(-1)


def _from_sparse(stream: Bytes, n_changed: int, length: int) -> Bytes:
    split = len(stream) - n_changed
    steps, values = stream[: max(split, 0)], stream[max(split, 0) :]
    ends = steps != _RUN_CONTINUES
    changed = np.cumsum(steps.astype(np.int64) + ends)[ends] - 1
    if split < 0 or len(changed) != n_changed or (n_changed and changed[-1] >= length):
        raise _damage_error(f"its {len(stream)} bytes do not place {n_changed} changed ones of {length}")
    places = np.zeros(length, np.uint8)
    places[changed] = values
    return places


def _inflate(payload: bytes, limit: int) -> Bytes:
    """Decompress to at most ``limit`` bytes."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(payload, limit + 1)
    except zlib.error as error:
        raise _damage_error(str(error)) from error
    if len(content) > limit or not inflate.eof or inflate.unused_data:
        raise _damage_error("it does not end where it should")
    return np.frombuffer(content, np.uint8)


def _damage_error(problem: str) -> PatchError:
    return PatchError(f"a record is damaged: {problem}")


def _subtract(a: Bytes, b: Bytes, width: int) -> Bytes:
    """Return ``a - b`` for every field, without borrowing from its neighbour (Hacker's Delight, 2-18)."""
    difference: Bytes
    if width >= 8:
        wide = np.dtype(f"<u{width // 8}")
        difference = np.subtract(a.view(wide), b.view(wide)).view(np.uint8)
    else:
        top = np.uint8(_TOP_BITS[width])
        difference = ((a | top) - (b & ~top)) ^ ((a ^ ~b) & top)
    return difference


def _add(a: Bytes, b: Bytes, width: int) -> Bytes:
    """Return ``a + b`` for every field, without carrying into its neighbour."""
    total: Bytes
    if width >= 8:
        wide = np.dtype(f"<u{width // 8}")
        total = np.add(a.view(wide), b.view(wide)).view(np.uint8)
    else:
        top = np.uint8(_TOP_BITS[width])
        total = ((a & ~top) + (b & ~top)) ^ ((a ^ b) & top)
    return total
