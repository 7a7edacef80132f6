"""Checked, read-only access to GGUF files, and "the same file but for these tensors".

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every count, length
and offset is held against the size of the file before it is used, so a damaged file costs one ``GgufError`` and no more
memory than the file has bytes. GGUF stores dimensions fastest first; here, and only here, they are turned into numpy's
order.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora._native import TYPES, GgmlType
from gguflora.errors import GgufError, QuantizationError

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4
MAX_NESTING: Final = 4
MAX_ALIGNMENT: Final = 1 << 20

TOKEN_EMBEDDING: Final = "token_embd.weight"  # noqa: S105  (not a password)
OUTPUT: Final = "output.weight"

Shape = tuple[int, ...]
_Forms = Mapping[str, tuple[Shape, GgmlType]]
_Arrangement = tuple[bytes, dict[str, int], list[tuple[int, int, int]], int]
"""Encoded list of tensors, offsets of the changed ones, copied ranges, end; all from the start of the data."""

_STRING, _ARRAY = 8, 9
_SCALARS: Final[dict[int, str]] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_UINT32, _INT32, _FLOAT32 = 4, 5, 6


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a GGUF file.

    Attributes:
        shape: in numpy's order, rows last but one, ``n_in`` last.
        offset: of the first byte, from the start of the file.
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
class Layout:
    """Where everything lies in a file that is another one with changes.

    Attributes:
        header: everything before the tensor data.
        copies: ranges of the other file's bytes that stay: first, last (exclusive), and where they go.
        offsets: of the changed and added tensors, from the start of the file.
        size: of the file.
    """

    header: bytes
    copies: tuple[tuple[int, int, int], ...]
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a metadata entry lies: ``start`` of its key, ``value`` (after the type), ``end``."""

    start: int
    value: int
    end: int
    type: int


class _Cursor:
    """Reads forward through the header; running out of bytes is a ``GgufError``."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0

    def fail(self, what: str) -> GgufError:
        return GgufError(f"{self.path}: {what} (at byte {self.at} of {self.size}); the file is damaged or incomplete")

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over ``n_bytes``; returns where they began."""
        start = self.at
        if n_bytes > self.size - start:
            raise self.fail(f"{what} needs {n_bytes} bytes, but the file ends {self.size - start} bytes further on")
        self.at = start + n_bytes
        return start

    def number(self, code: str, what: str) -> int:
        start = self.skip(struct.calcsize(code), what)
        value: int = struct.unpack_from(code, self.buffer, start)[0]
        return value

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        start = self.skip(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def skip_value(self, kind: int, key: str, depth: int = 0) -> None:
        if kind in _SCALARS:
            self.skip(np.dtype(_SCALARS[kind]).itemsize, f"the value of {key!r}")
        elif kind == _STRING:
            self.skip(self.number("<Q", f"the length of {key!r}"), f"the value of {key!r}")
        elif kind == _ARRAY and depth < MAX_NESTING:
            self._skip_array(key, depth)
        elif kind == _ARRAY:
            raise self.fail(f"the value of {key!r} nests arrays more than {MAX_NESTING} deep")
        else:
            raise self.fail(f"the value of {key!r} has unknown type {kind}")

    def _skip_array(self, key: str, depth: int) -> None:
        kind = self.number("<I", f"the element type of {key!r}")
        length = self.number("<Q", f"the number of elements of {key!r}")
        if kind in _SCALARS:
            self.skip(length * np.dtype(_SCALARS[kind]).itemsize, f"the array {key!r}")
            return
        smallest = 8 if kind == _STRING else 12
        if length * smallest > self.size - self.at:
            raise self.fail(f"the array {key!r} claims {length} elements, more than the file has room for")
        if kind == _STRING:
            self._skip_strings(length, key)
            return
        for _ in range(length):
            self.skip_value(kind, key, depth + 1)

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over many strings; a vocabulary has a few hundred thousand."""
        at, last, unpack = self.at, self.size - 8, struct.Struct("<Q").unpack_from
        buffer = self.buffer
        for _ in range(count):
            if at > last:
                break
            at += 8 + unpack(buffer, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise self.fail(f"a string of the array {key!r} reaches past the end of the file")


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file, decoded when asked for.

    Numbers, booleans and strings come as Python values, arrays as lists.
    """

    def __init__(self, cursor: _Cursor, count: int) -> None:
        self._cursor = cursor
        self._entries: dict[str, _Value] = {}
        for index in range(count):
            start = cursor.at
            key = cursor.string(f"the key of metadata entry {index}")
            kind = cursor.number("<I", f"the type of {key!r}")
            value = cursor.at
            cursor.skip_value(kind, key)
            if key in self._entries:
                raise cursor.fail(f"the metadata key {key!r} occurs twice")
            self._entries[key] = _Value(start, value, cursor.at, kind)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401  (a metadata value has any type)
        entry = self._entries[key]
        reader = _Cursor(self._cursor.path, self._cursor.buffer)
        reader.at = entry.value
        return self._decode(reader, entry.type)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def raw(self, key: str) -> bytes:
        """The whole entry as it lies in the file: key, type, value."""
        entry = self._entries[key]
        return self._cursor.buffer[entry.start : entry.end]

    def _decode(self, reader: _Cursor, kind: int) -> Any:  # noqa: ANN401
        if kind == _STRING:
            length = reader.number("<Q", "a string")
            start = reader.skip(length, "a string")
            return reader.buffer[start : start + length].decode("utf-8", errors="replace")
        if kind == _ARRAY:
            element, length = reader.number("<I", "an array"), reader.number("<Q", "an array")
            if element in _SCALARS:
                dtype = np.dtype(_SCALARS[element])
                start = reader.skip(length * dtype.itemsize, "an array")
                return np.frombuffer(reader.buffer, dtype, length, start).tolist()
            return [self._decode(reader, element) for _ in range(length)]
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(reader.buffer, dtype, 1, reader.skip(dtype.itemsize, "a value"))[0].item()


class GgufFile:
    """A GGUF file, opened read-only and checked.

    Args:
        path: the file.

    Attributes:
        metadata: the key-value pairs.
        tensors: the tensors by name, in the order of the file's tensor list.
        data_start: offset of the tensor data from the start of the file.
        alignment: of tensor data, in bytes.
        size: of the file, in bytes.

    Raises:
        GgufError: if the file is missing, damaged, big-endian or of an unknown version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not block
        except OSError as error:
            raise GgufError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self._stat = os.fstat(self._fd)
            self.size = self._stat.st_size
            self._parse(_Cursor(self.path, self._map()))
        except BaseException:
            self.close()
            raise

    def _map(self) -> mmap.mmap | bytes:
        try:
            return mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if self.size else b""
        except (OSError, ValueError) as error:
            raise GgufError(f"{self.path}: cannot be read: {error}") from error

    def _parse(self, cursor: _Cursor) -> None:
        magic = cursor.buffer[:4]
        if magic != MAGIC:
            raise GgufError(f"{self.path}: not a GGUF file (expected it to begin with {MAGIC!r}, found {magic!r})")
        cursor.skip(4, "the magic")
        self.version = cursor.number("<I", "the version")
        if self.version not in {2, 3}:
            if self.version and self.version & 0xFFFF == 0:
                raise GgufError(f"{self.path}: is big-endian; convert it with gguf-convert-endian first")
            raise GgufError(f"{self.path}: has GGUF version {self.version}; versions 2 and 3 can be read")
        n_tensors = cursor.number("<Q", "the number of tensors")
        n_metadata = cursor.number("<Q", "the number of metadata entries")
        # a tensor takes at least 24 bytes of header, a metadata entry 13
        if n_tensors * 24 + n_metadata * 13 > self.size:
            raise cursor.fail(f"claims {n_tensors} tensors and {n_metadata} metadata entries, more than fit into it")
        self._metadata_start = cursor.at
        self.metadata: Metadata = Metadata(cursor, n_metadata)
        self.alignment = self._read_alignment()
        self._tensors_start = cursor.at
        listed = [self._read_tensor(cursor) for _ in range(n_tensors)]
        self._tensors_end = cursor.at
        self.data_start = _align(cursor.at, self.alignment)
        self.tensors = self._place(listed)

    def _read_alignment(self) -> int:
        alignment: int = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        allowed = isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT and not alignment & (alignment - 1)
        if not allowed:
            raise GgufError(
                f"{self.path}: general.alignment is {alignment!r:.80}, expected a power of two up to {MAX_ALIGNMENT}"
            )
        return alignment

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string("the name of a tensor")
        n_dims = cursor.number("<I", f"the number of dimensions of {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        fastest_first = [cursor.number("<Q", f"a dimension of {name!r}") for _ in range(n_dims)]
        kind = cursor.number("<I", f"the type of {name!r}")
        offset = cursor.number("<Q", f"the offset of {name!r}")
        return name, tuple(reversed(fastest_first)), kind, offset

    def _place(self, listed: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, TensorEntry]:
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in listed:
            if name in tensors:
                raise GgufError(f"{self.path}: two tensors are named {name!r}")
            tensors[name] = self._check_tensor(name, shape, kind, offset)
        end = self.data_start
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset < end and tensor.nbytes:
                raise GgufError(f"{self.path}: tensor {tensor.name!r} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
        return tensors

    def _check_tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        where = f"{self.path}: tensor {name!r}"
        type_ = _type_numbered(kind)
        if type_ is None:
            raise GgufError(f"{where} has unknown type {kind}; the file is damaged or newer than this gguflora")
        if min(shape) < 1:
            raise GgufError(f"{where} has shape {shape}, expected positive dimensions")
        if offset % self.alignment:
            raise GgufError(f"{where} begins at offset {offset}, expected a multiple of the alignment {self.alignment}")
        try:
            nbytes = _n_bytes(shape, type_)
        except QuantizationError as error:
            raise GgufError(f"{where}: {error}") from error
        if self.data_start + offset + nbytes > self.size:
            raise GgufError(
                f"{where} needs bytes {self.data_start + offset} to {self.data_start + offset + nbytes}, "
                f"but the file has only {self.size}; it is damaged or incomplete"
            )
        return TensorEntry(name, shape, type_, self.data_start + offset, nbytes)

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise GgufError(f"{self.path}: has no general.architecture; it is not a language model or adapter")
        return value

    def fileno(self) -> int:
        """The file descriptor, for reading only."""
        return self._fd

    def read_rows(self, tensor: TensorEntry, first: int, last: int) -> NDArray[np.uint8]:
        """Bytes of the rows ``first`` to ``last`` (exclusive): a fresh uint8 array (last - first, row_bytes).

        Read with ``pread``, not through a mapping, so that a merge of any model runs in little resident memory.
        """
        row_bytes = tensor.type.row_bytes(tensor.n_in)
        rows = np.empty((last - first, row_bytes), np.uint8)
        view, offset = memoryview(rows.data).cast("B"), tensor.offset + first * row_bytes
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise GgufError(f"{self.path}: tensor {tensor.name!r} cannot be read: {error.strerror}") from error
            if count == 0:
                raise GgufError(f"{self.path}: ends within tensor {tensor.name!r}; was it changed while being read?")
            view, offset = view[count:], offset + count
        return rows

    def check_unchanged(self) -> None:
        """Raise ``GgufError`` if the file was written to since it was opened (by size and time)."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise GgufError(f"{self.path}: was changed while being read; try again when nothing writes to it")

    def close(self) -> None:
        """Close the file; the entries stay readable, the rows do not."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def layout(self, entries: Mapping[str, bytes], changed: Mapping[str, tuple[Shape, GgmlType]]) -> Layout:
        """The layout of this file with metadata and tensors changed or added; new tensors come last.

        Everything else stays byte for byte; while no tensor changes its size, its place after the header too.

        Args:
            entries: metadata by key, see `encode_entry`.
            changed: shape and type of each tensor whose data is not copied.
        """
        added = {name: form for name, form in changed.items() if name not in self.tensors}
        if all(name in added or _n_bytes(*form) == self.tensors[name].nbytes for name, form in changed.items()):
            tensor_list, offsets, copies, end = self._in_place(changed, added)
        else:
            tensor_list, offsets, copies, end = self._moved(changed)
        kept = [self.metadata.raw(key) for key in self.metadata if key not in entries]
        counts = struct.pack("<IQQ", self.version, len({*self.tensors, *changed}), len(kept) + len(entries))
        header = b"".join([MAGIC, counts, *kept, *entries.values(), tensor_list])
        header += bytes(_align(len(header), self.alignment) - len(header))
        return Layout(
            header,
            tuple((first, last, len(header) + to) for first, last, to in copies),
            {name: len(header) + offset for name, offset in offsets.items()},
            len(header) + end,
        )

    def _in_place(self, changed: _Forms, added: _Forms) -> _Arrangement:
        """Tensors keep their offsets; what lies between the changed ones is copied, padding included."""
        tensor_list = self.metadata._cursor.buffer[self._tensors_start : self._tensors_end]
        replaced = sorted((self.tensors[name] for name in changed if name in self.tensors), key=lambda t: t.offset)
        offsets = {tensor.name: tensor.offset - self.data_start for tensor in replaced}
        used = max((tensor.offset + tensor.nbytes for tensor in self.tensors.values()), default=self.data_start)
        kept = used if added else self.size
        edges = [self.data_start, *(edge for t in replaced for edge in (t.offset, t.offset + t.nbytes)), kept]
        ranges = zip(edges[::2], edges[1::2], strict=True)
        copies = [(first, last, first - self.data_start) for first, last in ranges if first < last]
        end = kept - self.data_start
        for name, (shape, kind) in added.items():
            offsets[name] = _align(end, self.alignment)
            end = _align(offsets[name] + _n_bytes(shape, kind), self.alignment)
            tensor_list += _encode_tensor(name, shape, kind, offsets[name])
        return tensor_list, offsets, copies, end

    def _moved(self, changed: _Forms) -> _Arrangement:
        """Tensors follow each other in the order of the file's list."""
        tensor_list, offsets, copies, end = b"", {}, [], 0
        for name, (shape, kind) in {**{t.name: (t.shape, t.type) for t in self.tensors.values()}, **changed}.items():
            tensor_list += _encode_tensor(name, shape, kind, end)
            if name in changed:
                offsets[name] = end
            else:
                copies.append((self.tensors[name].offset, self.tensors[name].offset + self.tensors[name].nbytes, end))
            end = _align(end + _n_bytes(shape, kind), self.alignment)
        return tensor_list, offsets, copies, end


def _type_numbered(kind: int) -> GgmlType | None:
    """A type by ggml's number: gguflora's own, else the size that the gguf package lists (integers, for example)."""
    if kind in TYPES:
        return TYPES[kind]
    import gguf  # noqa: PLC0415  (slow to import)

    try:
        listed = gguf.GGMLQuantizationType(kind)
    except ValueError:
        return None
    return GgmlType(kind, listed.name, *gguf.GGML_QUANT_SIZES[listed])


def _n_bytes(shape: Shape, kind: GgmlType) -> int:
    return math.prod(shape[:-1]) * kind.row_bytes(shape[-1])


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def encode_entry(key: str, value: str | int | list[str] | list[float] | list[int]) -> bytes:
    """A metadata entry in GGUF's encoding: a string, a uint32, or an array of strings, of int32 or of float32."""
    if isinstance(value, str):
        return _encode_string(key) + struct.pack("<I", _STRING) + _encode_string(value)
    if isinstance(value, int):
        return _encode_string(key) + struct.pack("<II", _UINT32, value)
    head = _encode_string(key) + struct.pack("<I", _ARRAY)
    if all(isinstance(item, str) for item in value):
        items = b"".join(_encode_string(str(item)) for item in value)
        return head + struct.pack("<IQ", _STRING, len(value)) + items
    kind, dtype = (_INT32, "<i4") if all(isinstance(item, int) for item in value) else (_FLOAT32, "<f4")
    return head + struct.pack("<IQ", kind, len(value)) + np.array(value, dtype).tobytes()


def _encode_tensor(name: str, shape: Shape, kind: GgmlType, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _encode_string(name) + dims + struct.pack("<IQ", kind.id, offset)


def _encode_string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def layer_of(tensor_name: str) -> int | None:
    """The layer number in a tensor's name (``blk.7.attn_q.weight``, ``dec.blk.7.attn_q.weight``), or None."""
    found = re.match(r"(?:enc\.|dec\.)?blk\.(\d{1,6})\.", tensor_name)
    return int(found[1]) if found else None
