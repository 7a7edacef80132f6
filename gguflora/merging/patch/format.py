"""A patch file: from the bytes of one GGUF file to those of another.

::

    magic, version, lengths of what follows, SHA-256 of the next three     PREAMBLE
    JSON: base and result (name, size, SHA-256), adapters, rounding        Facts
    ranges of the base that are copied                                     COPY each
    what is made of the base's bytes by a difference, or anew              RECORD each
    the records' payloads, one after the other                             see `gguflora.merging.patch.coding`

All numbers are little-endian. Copies and records are in the order of the result and fill it without gaps. Every byte of
the file is under a checksum, every length is checked before it is used, and nothing decompresses to more than its
record says.
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
from gguflora.merging.patch.coding import Grain
from gguflora.quants.arrays import Bytes

MAGIC: Final = b"gguflora"
VERSION: Final = 1
MAX_JSON: Final = 1 << 20
MAX_LENGTH: Final = 4 << 20
"""Most bytes that one record makes."""

_PREAMBLE: Final = struct.Struct("<8sIIQQ32s")
_NOTHING: Final = 2**64 - 1
_COPY: Final = np.dtype([("first", "<u8"), ("last", "<u8"), ("to", "<u8")])
_RECORD: Final = np.dtype(
    [
        ("to", "<u8"), ("source", "<u8"), ("length", "<u4"), ("size", "<u4"), ("block", "<u2"), ("width", "<u2"),
        ("crc", "<u4"), ("old", "<u8"), ("new", "<u8"),
    ]
)  # fmt: skip

Range = tuple[int, int, int]
"""First and last (exclusive) byte in the base, and where they go."""


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of the result that are not copied.

    Attributes:
        to: where they go.
        source: where the base's bytes lie that they are made of; None where they are made of zeros.
        length: number of them.
        grain: of the difference.
        at: where the payload lies in its file.
        size: of the payload.
        crc: CRC-32 of the payload.
        old: `checksum` of the base's bytes.
        new: `checksum` of the result's.
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
    """Where a patch leads from and to, and what it merges.

    Attributes:
        base_name: name of the base file, or of the first file of a split base.
        base_size: its size in bytes, of all files.
        base_sha256: its SHA-256, of all files one after the other.
        merged_sizes: sizes of the result's files in bytes.
        merged_sha256: its SHA-256, as the base's.
        adapters: name, SHA-256 and scale of each adapter.
        rounding: ``adaptive`` or ``nearest``.
        seed: of the adaptive rounding.
        version: of the gguflora that made the patch.
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
        """What is merged, for people."""
        return ", ".join(f"{name} x {scale:g}" for name, _, scale in self.adapters)


@dataclass(frozen=True, slots=True)
class Patch:
    """Copies and records in the order of the result; payloads are read from ``handle`` when needed."""

    path: Path
    handle: int
    facts: Facts
    copies: Sequence[Range]
    records: Sequence[Record]

    def payload(self, record: Record) -> bytes:
        """The payload of a record.

        Raises:
            PatchError: if it is damaged.
        """
        content = os.pread(self.handle, record.size, record.at)
        if len(content) != record.size or zlib.crc32(content) != record.crc:
            raise PatchError(f"{self.path}: the {record.size} bytes at {record.at} are damaged; get the file again")
        return content


def checksum(content: Bytes) -> int:
    """64 bits that tell stretches of bytes apart."""
    return int.from_bytes(hashlib.sha256(content.data).digest()[:8], "little")


@contextmanager
def open_patch(path: Path) -> Iterator[Patch]:
    """A patch file, checked but for the payloads, which are checked as they are read.

    Raises:
        PatchError: if the file is missing, damaged or no patch.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
    except (OSError, ValueError) as error:
        raise PatchError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}") from error
    try:
        yield _read(path, handle)
    except OSError as error:
        raise PatchError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)


def write_patch_file(output: IO[bytes], patch: Patch) -> None:
    """Write a patch, whose payloads may lie elsewhere in any order, as a file."""
    text = json.dumps(asdict(patch.facts), sort_keys=True).encode()
    copies = np.array([tuple(copied) for copied in patch.copies], _COPY)
    records = np.array([_packed(record) for record in patch.records], _RECORD)
    tables = text + copies.tobytes() + records.tobytes()
    digest = hashlib.sha256(tables).digest()
    output.write(_PREAMBLE.pack(MAGIC, VERSION, len(text), len(copies), len(records), digest))
    output.write(tables)
    for record in patch.records:
        output.write(patch.payload(record))


def _packed(record: Record) -> tuple[int, ...]:
    source = _NOTHING if record.source is None else record.source
    block, width = record.grain.block, record.grain.width
    return record.to, source, record.length, record.size, block, width, record.crc, record.old, record.new


def _read(path: Path, handle: int) -> Patch:
    size = os.fstat(handle).st_size
    start = os.pread(handle, _PREAMBLE.size, 0)
    if len(start) < _PREAMBLE.size or start[: len(MAGIC)] != MAGIC:
        raise PatchError(f"{path}: is not a patch of gguflora (expected it to begin with {MAGIC!r})")
    _, version, n_text, n_copies, n_records, digest = _PREAMBLE.unpack(start)
    if version != VERSION:
        raise PatchError(f"{path}: has version {version} of the format, expected {VERSION}; use a newer gguflora")
    n_tables = n_text + n_copies * _COPY.itemsize + n_records * _RECORD.itemsize
    if n_text > MAX_JSON or _PREAMBLE.size + n_tables > size:
        raise _damaged(path, f"claims {n_copies} copies and {n_records} records, more than it has room for")
    tables = os.pread(handle, n_tables, _PREAMBLE.size)
    if hashlib.sha256(tables).digest() != digest:
        raise _damaged(path, "the checksum of its tables is wrong")
    facts = _facts(path, tables[:n_text])
    copies = np.frombuffer(tables, _COPY, n_copies, n_text)
    records = np.frombuffer(tables, _RECORD, n_records, n_text + copies.nbytes)
    patch = Patch(path, handle, facts, copies.tolist(), _unpacked(records, _PREAMBLE.size + n_tables))
    _check(patch, size, _PREAMBLE.size + n_tables)
    return patch


def _unpacked(table: NDArray[np.void], at: int) -> list[Record]:
    records = []
    for to, source, length, size, block, width, crc, old, new in table.tolist():
        known = None if source == _NOTHING else source
        records.append(Record(to, known, length, Grain(block, width), at, size, crc, old, new))
        at += size
    return records


def _facts(path: Path, text: bytes) -> Facts:
    try:
        given = json.loads(text)
        adapters = tuple((str(name), str(sha256), float(scale)) for name, sha256, scale in given.pop("adapters"))
        sizes = tuple(int(size) for size in given.pop("merged_sizes"))
        facts = Facts(**given, adapters=adapters, merged_sizes=sizes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its facts are not as expected ({error})") from error
    for field in fields(Facts):
        kind = type(getattr(facts, field.name)).__name__
        if not field.type.startswith(kind):
            raise _damaged(path, f"its {field.name} is of type {kind}")
    return facts


def _check(patch: Patch, size: int, n_before: int) -> None:
    """Raise unless the result is filled without gaps, out of the base, by payloads that fill the file."""
    facts = patch.facts
    places = [(to, last - first, last) for first, last, to in patch.copies]
    places += [(r.to, r.length, 0 if r.source is None else r.source + r.length) for r in patch.records]
    end = 0
    for to, length, source_end in sorted(places):
        if to != end or length <= 0 or source_end > facts.base_size:
            raise _damaged(patch.path, f"what it has for byte {to} of the result does not fit")
        end = to + length
    if end != facts.merged_size or min(facts.merged_sizes) <= 0:
        raise _damaged(patch.path, f"makes {end} bytes, but states {facts.merged_size}")
    for record in patch.records:
        if record.length > MAX_LENGTH or not record.grain.fits(record.length):
            raise _damaged(patch.path, f"a record makes {record.length} bytes in a way that cannot be")
    if n_before + sum(record.size for record in patch.records) != size:
        raise _damaged(patch.path, f"its size is {size}, which is not what its records say")


def _damaged(path: Path, what: str) -> PatchError:
    return PatchError(f"{path}: {what}; the file is damaged or incomplete")
