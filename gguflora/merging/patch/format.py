"""The patch file format, which turns one GGUF file into another.

::

    magic, version, lengths of the following sections, SHA-256 of the next three   PREAMBLE
    JSON: base and result (name, size, SHA-256), adapters, rounding                Facts
    ranges that are copied from the base                                           COPY each
    ranges that are encoded as a difference from the base, or from zeros           RECORD each
    the records' payloads, one after the other                                     see `gguflora.merging.patch.coding`

All numbers are little-endian. Copies and records are sorted by their offset in the result and fill it without gaps.
Every byte of the file is covered by a checksum, every length is checked before use, and no payload decompresses to more
than its record says.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from gguflora._version import __version__
from gguflora.errors import PatchError
from gguflora.files.strict_json import to_json
from gguflora.merging.patch.coding import Grain
from gguflora.quants.arrays import Bytes
from gguflora.system.descriptors import open_file, read_at

MAGIC: Final = b"gguflora"
VERSION: Final = 1
MAX_JSON: Final = 1 << 20
MAX_LENGTH: Final = 4 << 20
"""Highest number of bytes of the result in one record."""

_PREAMBLE: Final = struct.Struct("<8sIIQQ32s")
_NO_SOURCE: Final = 2**64 - 1
_COPY: Final = np.dtype([("first", "<u8"), ("last", "<u8"), ("to", "<u8")])
_RECORD: Final = np.dtype(
    [
        ("to", "<u8"), ("source", "<u8"), ("length", "<u4"), ("size", "<u4"), ("block", "<u2"), ("width", "<u2"),
        ("crc", "<u4"), ("old", "<u8"), ("new", "<u8"),
    ]
)  # fmt: skip

Range = tuple[int, int, int]
"""Start and stop in the base, and the offset in the result."""


@dataclass(frozen=True, slots=True)
class Record:
    """A range of the result that is encoded as a difference.

    Attributes:
        to: offset in the result.
        source: offset of the base's bytes; None if the difference is from zeros.
        length: number of bytes in the result.
        grain: structure of the bytes.
        at: offset of the payload in its file.
        size: bytes of the payload.
        crc: CRC-32 of the payload.
        old: `checksum` of the base's bytes.
        new: `checksum` of the result's bytes.
    """

    to: int
    source: int | None
    length: int
    grain: Grain
    at: int
    size: int
    crc: int
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Metadata of a patch: its base, its result, and what was merged.

    Attributes:
        base_name: name of the base file; for a split base, of its first file.
        base_size: size of the base in bytes; for a split base, of all its files.
        base_sha256: SHA-256 of the base; for a split base, of all its files concatenated.
        merged_sizes: sizes of the result's files in bytes.
        merged_sha256: SHA-256 of the result; for a split model, of all its files concatenated.
        adapters: name, SHA-256 and scale of each adapter.
        rounding: ``adaptive`` (stochastic rounding) or ``nearest``.
        seed: seed of the stochastic rounding.
        version: version of gguflora that made the patch.
    """

    base_name: str
    base_size: int
    base_sha256: str
    merged_sizes: tuple[int, ...]
    merged_sha256: str
    adapters: tuple[tuple[str, str, float], ...]
    rounding: str
    seed: int
    version: str = __version__

    @property
    def merged_size(self) -> int:
        """Size of all files of the result in bytes."""
        return sum(self.merged_sizes)

    @property
    def merged(self) -> str:
        """The adapters and their scales, as text for messages."""
        return ", ".join(f"{name} x {scale:g}" for name, _, scale in self.adapters)


@dataclass(frozen=True, slots=True)
class Patch:
    """A patch: copies and records in the order of the result. Payloads are read from ``handle`` when needed."""

    path: Path
    handle: int
    facts: Facts
    copies: Sequence[Range]
    records: Sequence[Record]

    def payload(self, record: Record) -> bytes:
        """Read the payload of a record.

        Raises:
            PatchError: if the payload is damaged.
        """
        content = read_at(self.handle, record.size, record.at)
        if len(content) != record.size or zlib.crc32(content) != record.crc:
            raise PatchError(f"{self.path}: the {record.size} bytes at {record.at} are damaged; get the file again")
        return content


def checksum(content: Bytes) -> int:
    """Return the first 64 bits of the SHA-256 of bytes."""
    return int.from_bytes(hashlib.sha256(content.data).digest()[:8], "little")


@contextmanager
def open_patch(path: Path) -> Iterator[Patch]:
    """Open and check a patch file. Payloads are checked when they are read.

    Raises:
        PatchError: if the file is missing or damaged, or is not a patch.
    """
    try:
        handle = open_file(path)
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}") from error
    try:
        yield _read(path, handle)
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)


def write_patch_file(output: IO[bytes], patch: Patch) -> None:
    """Write a patch file. The payloads are read from the patch's handle, in any order."""
    text = to_json(asdict(patch.facts), sort_keys=True).encode()
    copies = np.array([tuple(copied) for copied in patch.copies], _COPY)
    records = np.array([_to_row(record) for record in patch.records], _RECORD)
    tables = text + copies.tobytes() + records.tobytes()
    digest = hashlib.sha256(tables).digest()
    output.write(_PREAMBLE.pack(MAGIC, VERSION, len(text), len(copies), len(records), digest))
    output.write(tables)
    for record in patch.records:
        output.write(patch.payload(record))


def _to_row(record: Record) -> tuple[int, ...]:
    source = _NO_SOURCE if record.source is None else record.source
    block, width = record.grain.block, record.grain.width
    return record.to, source, record.length, record.size, block, width, record.crc, record.old, record.new


def _read(path: Path, handle: int) -> Patch:
    size = os.fstat(handle).st_size
    start = read_at(handle, _PREAMBLE.size, 0)
    if len(start) < _PREAMBLE.size or start[: len(MAGIC)] != MAGIC:
        raise PatchError(f"{path}: is not a patch of gguflora (expected it to begin with {MAGIC!r})")
    _, version, n_text, n_copies, n_records, digest = _PREAMBLE.unpack(start)
    if version != VERSION:
        raise PatchError(f"{path}: has version {version} of the format, expected {VERSION}; use a newer gguflora")
    n_tables = n_text + n_copies * _COPY.itemsize + n_records * _RECORD.itemsize
    if n_text > MAX_JSON or _PREAMBLE.size + n_tables > size:
        raise _damage_error(path, f"claims {n_copies} copies and {n_records} records, which its size cannot hold")
    tables = read_at(handle, n_tables, _PREAMBLE.size)
    if hashlib.sha256(tables).digest() != digest:
        raise _damage_error(path, "the checksum of its tables is wrong")
    facts = _parse_facts(path, tables[:n_text])
    copies = np.frombuffer(tables, _COPY, n_copies, n_text)
    records = np.frombuffer(tables, _RECORD, n_records, n_text + copies.nbytes)
    patch = Patch(path, handle, facts, copies.tolist(), _from_table(records, _PREAMBLE.size + n_tables))
    _check(patch, size, _PREAMBLE.size + n_tables)
    return patch


def _from_table(table: NDArray[np.void], at: int) -> list[Record]:
    records = []
    for to, source, length, size, block, width, crc, old, new in table.tolist():
        known = None if source == _NO_SOURCE else source
        records.append(Record(to, known, length, Grain(block, width), at, size, crc, old, new))
        at += size
    return records


def _parse_facts(path: Path, text: bytes) -> Facts:
    try:
        given = json.loads(text)
        adapters = tuple((str(name), str(sha256), float(scale)) for name, sha256, scale in given.pop("adapters"))
        sizes = tuple(int(size) for size in given.pop("merged_sizes"))
        facts = Facts(**given, adapters=adapters, merged_sizes=sizes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damage_error(path, f"its metadata is not as expected ({error})") from error
    for field in fields(Facts):
        kind = type(getattr(facts, field.name)).__name__
        if not field.type.startswith(kind):
            raise _damage_error(path, f"its {field.name} is of type {kind}")
    return facts


def _check(patch: Patch, size: int, n_before: int) -> None:
    """Raise ``PatchError`` unless copies and records fill the result without gaps and payloads fill the file."""
    facts = patch.facts
    places = [(to, last - first, last) for first, last, to in patch.copies]
    places += [(r.to, r.length, 0 if r.source is None else r.source + r.length) for r in patch.records]
    end = 0
    for to, length, source_end in sorted(places):
        if to != end or length <= 0 or source_end > facts.base_size:
            raise _damage_error(patch.path, f"its copies and records leave a gap or overlap at byte {to} of the result")
        end = to + length
    if end != facts.merged_size or min(facts.merged_sizes) <= 0:
        raise _damage_error(patch.path, f"its copies and records make {end} bytes, expected {facts.merged_size}")
    for record in patch.records:
        if record.length > MAX_LENGTH or not record.grain.fits(record.length):
            raise _damage_error(patch.path, f"a record of {record.length} bytes does not consist of whole blocks")
    if n_before + sum(record.size for record in patch.records) != size:
        raise _damage_error(patch.path, f"its size is {size}, which does not match its records")


def _damage_error(path: Path, problem: str) -> PatchError:
    return PatchError(f"{path}: {problem}; the file is damaged or incomplete")
