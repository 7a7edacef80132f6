"""The header of a GGUF file: a checked reader, and the key-value pairs.

The header is read, not mapped: a file that is truncated meanwhile then raises an error, where a mapping would kill the
process with SIGBUS. Every count and length is checked against the size of the file before anything is read or allocated
for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.errors import GgufError
from gguflora.system.descriptors import read_at

MAX_NESTING: Final = 4
MAX_BYTES: Final = 1 << 27
"""Maximum size of a header: a million tokens and merges need half of it, and a sparse file can claim any size."""
MAX_ARRAYS: Final = 1 << 20
"""Maximum number of arrays in one array."""

_CHUNK: Final = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS: Final[dict[int, str]] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_SIZES: Final = {kind: np.dtype(code).itemsize for kind, code in _SCALARS.items()}
_UINT32, _INT32, _FLOAT32 = 4, 5, 6


class Header:
    """The first bytes of a file, read on demand.

    Attributes:
        path: path of the file, for messages.
        size: size of the file in bytes.
        content: the bytes read so far.
    """

    def __init__(self, path: Path, handle: int, size: int) -> None:
        self.path = path
        self.size = size
        self.content = bytearray()
        self._handle = handle

    def fill(self, stop: int, field: str) -> None:
        """Read the file up to the byte ``stop``, unless that was done before.

        Args:
            stop: number of bytes that must be in ``content``.
            field: description of what is read, for messages.

        Raises:
            GgufError: if the file is shorter, or ``stop`` is more than `MAX_BYTES`.
        """
        if stop > self.size:
            raise self.error(len(self.content), f"{field} reaches to byte {stop}, past the end of the file")
        if stop > MAX_BYTES:
            raise self.error(len(self.content), f"{field} reaches to byte {stop}; headers are read up to {MAX_BYTES}")
        target = min(max(stop, len(self.content) + _CHUNK), self.size)
        while len(self.content) < target:
            try:
                chunk = read_at(self._handle, target - len(self.content), len(self.content))
            except OSError as error:
                raise GgufError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not chunk:
                raise GgufError(f"{self.path}: became shorter while it was being read")
            self.content += chunk

    def error(self, at: int, problem: str) -> GgufError:
        """Return an error about the byte at offset ``at``."""
        return GgufError(f"{self.path}: {problem} (at byte {at} of {self.size}); the file is damaged or incomplete")


class Cursor:
    """Reads a header from front to back. All methods raise ``GgufError`` when the bytes run out.

    Attributes:
        header: the header.
        at: offset of the next byte to read.
    """

    def __init__(self, header: Header, at: int = 0) -> None:
        self.header = header
        self.at = at

    def fail(self, problem: str) -> GgufError:
        """Return an error about the cursor's position."""
        return self.header.error(self.at, problem)

    def skip(self, n_bytes: int, field: str) -> int:
        """Skip ``n_bytes`` and return the offset of the first one."""
        start, stop = self.at, self.at + n_bytes
        if stop > len(self.header.content):
            self.header.fill(stop, field)
        self.at = stop
        return start

    def number(self, code: str, field: str) -> int:
        """Read a number with a `struct` format."""
        start = self.skip(struct.calcsize(code), field)
        value: int = struct.unpack_from(code, self.header.content, start)[0]
        return value

    def string(self, field: str) -> str:
        """Read a UTF-8 string."""
        length = self.number("<Q", f"the length of {field}")
        start = self.skip(length, field)
        try:
            return self.header.content[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{field} is not UTF-8") from error

    def skip_value(self, kind: int, key: str, depth: int = 0) -> None:
        """Skip a metadata value.

        Args:
            kind: GGUF's number of the value type.
            key: key of the entry, for messages.
            depth: number of arrays around the value.
        """
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
        """Skip strings in a tight loop: a vocabulary has a few hundred thousand."""
        field, unpack = f"a string of the array {key!r:.100}", struct.Struct("<Q").unpack_from
        header, at, n_read = self.header, self.at, len(self.header.content)
        for _ in range(count):
            if at + 8 > n_read:
                header.fill(at + 8, field)
                n_read = len(header.content)
            at += 8 + unpack(header.content, at)[0]
        if at > n_read:
            header.fill(at, field)
        self.at = at


@dataclass(frozen=True, slots=True)
class _Value:
    """The place of a metadata entry.

    Attributes:
        start: offset of the key.
        value: offset of the value, which follows the type.
        stop: offset after the value.
        type: GGUF's number of the value type.
    """

    start: int
    value: int
    stop: int
    type: int


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file, decoded on access.

    Numbers, booleans and strings are Python values, arrays are lists.
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
        """Return the encoded entry: key, type and value."""
        entry = self._entries[key]
        return bytes(self._header.content[entry.start : entry.stop])


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
        if element == _STRING:
            return _decode_strings(cursor, length)
        return [_decode(cursor, element) for _ in range(length)]
    start = cursor.skip(_SIZES[kind], "a value")
    return np.frombuffer(cursor.header.content, _SCALARS[kind], 1, start)[0].item()


def _decode_strings(cursor: Cursor, count: int) -> list[str]:
    """Strings one after another, whose bytes are there since the entry was skipped: a vocabulary has 262 144."""
    content, at, length_at, strings = cursor.header.content, cursor.at, struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        start = at + 8
        at = start + length_at(content, at)[0]
        strings.append(content[start:at].decode("utf-8", errors="replace"))
    cursor.at = at
    return strings


def encode_entry(key: str, value: str | int | list[str] | list[float] | list[int]) -> bytes:
    """Encode a metadata entry: a string, a uint32, or an array of strings, int32 or float32."""
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
    """Encode a metadata entry with an int32 value."""
    return encode_string(key) + struct.pack("<Ii", _INT32, value)


def valid_text(text: str) -> str:
    """Return a text in which U+FFFD stands for bytes that are no UTF-8, such as those of a file's name."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def encode_string(text: str) -> bytes:
    """Encode a string: its length in bytes as uint64, then UTF-8."""
    encoded = valid_text(text).encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded
