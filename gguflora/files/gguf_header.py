"""The header of a GGUF file: a checked reader, and its key-value pairs.

The header is read, not mapped, so that a file that becomes shorter costs an error and not the process. Every count and
length is held against the size of the file before anything is read or allocated for it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.errors import GgufError

MAX_NESTING: Final = 4
MAX_BYTES: Final = 1 << 27
"""Longest header that is read: a million tokens and merges take half of it; a sparse file may claim any size."""
MAX_ARRAYS: Final = 1 << 20
"""Most arrays in one array."""

_CHUNK: Final = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS: Final[dict[int, str]] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_SIZES: Final = {kind: np.dtype(code).itemsize for kind, code in _SCALARS.items()}
_UINT32, _INT32, _FLOAT32 = 4, 5, 6


class Header:
    """The first bytes of a file, as far as they have been asked for.

    Attributes:
        path: of the file, for messages.
        size: of the file, in bytes.
        content: what has been read so far.
    """

    def __init__(self, path: Path, handle: int, size: int) -> None:
        self.path = path
        self.size = size
        self.content = bytearray()
        self._handle = handle

    def fill(self, end: int, what: str) -> None:
        """Make sure that the first ``end`` bytes are read."""
        if end > self.size:
            raise self.error(len(self.content), f"{what} reaches to byte {end}, past the end of the file")
        if end > MAX_BYTES:
            raise self.error(len(self.content), f"{what} reaches to byte {end}; headers are read up to {MAX_BYTES}")
        wanted = min(max(end, len(self.content) + _CHUNK), self.size)
        while len(self.content) < wanted:
            try:
                chunk = os.pread(self._handle, wanted - len(self.content), len(self.content))
            except OSError as error:
                raise GgufError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not chunk:
                raise GgufError(f"{self.path}: became shorter while it was being read")
            self.content += chunk

    def error(self, at: int, what: str) -> GgufError:
        """An error about the bytes at ``at``."""
        return GgufError(f"{self.path}: {what} (at byte {at} of {self.size}); the file is damaged or incomplete")


class Cursor:
    """Reads forward through a header; running out of bytes is a ``GgufError``."""

    def __init__(self, header: Header, at: int = 0) -> None:
        self.header = header
        self.at = at

    def fail(self, what: str) -> GgufError:
        """An error about where the cursor is."""
        return self.header.error(self.at, what)

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over ``n_bytes``; returns where they began."""
        start, end = self.at, self.at + n_bytes
        if end > len(self.header.content):
            self.header.fill(end, what)
        self.at = end
        return start

    def number(self, code: str, what: str) -> int:
        """A number of a `struct` code."""
        start = self.skip(struct.calcsize(code), what)
        value: int = struct.unpack_from(code, self.header.content, start)[0]
        return value

    def string(self, what: str) -> str:
        """A string, which must be UTF-8."""
        length = self.number("<Q", f"the length of {what}")
        start = self.skip(length, what)
        try:
            return self.header.content[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def skip_value(self, kind: int, key: str, depth: int = 0) -> None:
        """Step over a metadata value."""
        if kind in _SCALARS:
            self.skip(_SIZES[kind], f"the value of {key!r:.100}")
        elif kind == _STRING:
            self.skip(self.number("<Q", f"the length of {key!r:.100}"), f"the value of {key!r:.100}")
        elif kind == _ARRAY and depth < MAX_NESTING:
            self._skip_array(key, depth)
        elif kind == _ARRAY:
            raise self.fail(f"the value of {key!r:.100} nests arrays more than {MAX_NESTING} deep")
        else:
            raise self.fail(f"the value of {key!r:.100} has unknown type {kind}")

    def _skip_array(self, key: str, depth: int) -> None:
        kind = self.number("<I", f"the element type of {key!r:.100}")
        length = self.number("<Q", f"the number of elements of {key!r:.100}")
        if kind in _SCALARS:
            self.skip(length * _SIZES[kind], f"the array {key!r:.100}")
            return
        smallest = 8 if kind == _STRING else 12
        if length * smallest > self.header.size - self.at or (kind == _ARRAY and length > MAX_ARRAYS):
            raise self.fail(f"the array {key!r:.100} claims {length} elements, more than the file has room for")
        if kind == _STRING:
            self._skip_strings(length, key)
            return
        for _ in range(length):
            self.skip_value(kind, key, depth + 1)

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over many strings; a vocabulary has a few hundred thousand."""
        what, unpack = f"a string of the array {key!r:.100}", struct.Struct("<Q").unpack_from
        header, at, known = self.header, self.at, len(self.header.content)
        for _ in range(count):
            if at + 8 > known:
                header.fill(at + 8, what)
                known = len(header.content)
            at += 8 + unpack(header.content, at)[0]
        if at > known:
            header.fill(at, what)
        self.at = at


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a metadata entry lies: ``start`` of its key, ``value`` (after the type), ``end``."""

    start: int
    value: int
    end: int
    type: int


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file, decoded when asked for.

    Numbers, booleans and strings come as Python values, arrays as lists.
    """

    def __init__(self, cursor: Cursor, count: int) -> None:
        self._header = cursor.header
        self._entries: dict[str, _Value] = {}
        for index in range(count):
            start = cursor.at
            key = cursor.string(f"the key of metadata entry {index}")
            kind = cursor.number("<I", f"the type of {key!r:.100}")
            value = cursor.at
            cursor.skip_value(kind, key)
            if key in self._entries:
                raise cursor.fail(f"the metadata key {key!r:.100} occurs twice")
            self._entries[key] = _Value(start, value, cursor.at, kind)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401  (a metadata value has any type)
        entry = self._entries[key]
        return _decode(Cursor(self._header, entry.value), entry.type)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def raw(self, key: str) -> bytes:
        """The whole entry as it lies in the file: key, type, value."""
        entry = self._entries[key]
        return bytes(self._header.content[entry.start : entry.end])


def _decode(cursor: Cursor, kind: int) -> Any:  # noqa: ANN401
    if kind == _STRING:
        length = cursor.number("<Q", "a string")
        start = cursor.skip(length, "a string")
        return cursor.header.content[start : start + length].decode("utf-8", errors="replace")
    if kind == _ARRAY:
        element, length = cursor.number("<I", "an array"), cursor.number("<Q", "an array")
        if element in _SCALARS:
            start = cursor.skip(length * _SIZES[element], "an array")
            return np.frombuffer(cursor.header.content, _SCALARS[element], length, start).tolist()
        return [_decode(cursor, element) for _ in range(length)]
    start = cursor.skip(_SIZES[kind], "a value")
    return np.frombuffer(cursor.header.content, _SCALARS[kind], 1, start)[0].item()


def encode_entry(key: str, value: str | int | list[str] | list[float] | list[int]) -> bytes:
    """A metadata entry in GGUF's encoding: a string, a uint32, or an array of strings, of int32 or of float32."""
    if isinstance(value, str):
        return encode_string(key) + struct.pack("<I", _STRING) + encode_string(value)
    if isinstance(value, int):
        return encode_string(key) + struct.pack("<II", _UINT32, value)
    head = encode_string(key) + struct.pack("<I", _ARRAY)
    if all(isinstance(item, str) for item in value):
        items = b"".join(encode_string(str(item)) for item in value)
        return head + struct.pack("<IQ", _STRING, len(value)) + items
    kind, dtype = (_INT32, "<i4") if all(isinstance(item, int) for item in value) else (_FLOAT32, "<f4")
    return head + struct.pack("<IQ", kind, len(value)) + np.array(value, dtype).tobytes()


def encode_int32(key: str, value: int) -> bytes:
    """A metadata entry that is an int32."""
    return encode_string(key) + struct.pack("<Ii", _INT32, value)


def encode_string(text: str) -> bytes:
    """A string in GGUF's encoding: its length, then UTF-8."""
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
