"""A single GGUF file, opened read-only and checked. A split model consists of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from gguflora.errors import GgufError
from gguflora.files.gguf_header import Cursor, Header, Metadata
from gguflora.files.gguf_tensors import align, place_tensors, read_listed
from gguflora.files.lfs import check_fetched
from gguflora.system.descriptors import open_file, read_some

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_ALIGNMENT: Final = 1 << 20


_MOST_AFTER: Final = 64 << 20
"""Bytes that a file may have after its last tensor; writers only pad it."""


class GgufShard:
    """A single GGUF file.

    Args:
        path: path of the file.

    Attributes:
        path: path of the file.
        version: version of the format, 2 or 3.
        metadata: the key-value pairs.
        tensors: the tensors by name, in the order of the file's tensor list.
        tensor_list: the encoded tensor list.
        data_start: offset of the tensor data from the start of the file.
        alignment: alignment of the tensors' data in bytes.
        size: size of the file in bytes.

    Raises:
        GgufError: if the file is missing, damaged, big-endian or of an unknown version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = open_file(path)
        except (OSError, ValueError) as error:
            raise GgufError(f"{path}: cannot be opened: {getattr(error, 'strerror', error)}") from error
        try:
            self._stat = os.fstat(self._handle)
            self.size = self._stat.st_size
            self._parse(Cursor(Header(path, self._handle, self.size)))
        except BaseException:
            self.close()
            raise

    def _parse(self, cursor: Cursor) -> None:
        cursor.header.fill(min(4, self.size), "the magic")
        magic = bytes(cursor.header.content[:4])
        if magic != MAGIC:
            check_fetched(self.path)
            raise GgufError(f"{self.path}: not a GGUF file (expected it to begin with {MAGIC!r}, found {magic!r})")
        cursor.skip(4, "the magic")
        self.version = cursor.number("<I", "the version")
        self._check_version()
        n_tensors = cursor.number("<Q", "the number of tensors")
        n_metadata = cursor.number("<Q", "the number of metadata entries")
        # a tensor takes at least 32 bytes of header, a metadata entry 13
        if n_tensors * 32 + n_metadata * 13 > self.size:
            raise cursor.fail(f"claims {n_tensors} tensors and {n_metadata} metadata entries, more than fit into it")
        self.metadata = Metadata(cursor, n_metadata)
        self.alignment = self._read_alignment()
        start = cursor.at
        listed = [read_listed(cursor) for _ in range(n_tensors)]
        self.tensor_list = bytes(cursor.header.content[start : cursor.at])
        del cursor.header.content[cursor.at :]
        self.data_start = align(cursor.at, self.alignment)
        self.tensors = place_tensors(self.path, listed, self.data_start, self.alignment, self.size)
        end = max((tensor.offset + tensor.nbytes for tensor in self.tensors.values()), default=self.data_start)
        if self.size - end > _MOST_AFTER:  # a hole of a terabyte takes no room in an archive, and hours to hash
            raise GgufError(
                f"{self.path}: has {self.size - end} bytes after its last tensor, where writers only pad; this is "
                "not one GGUF file"
            )

    def _check_version(self) -> None:
        if self.version in {2, 3}:
            return
        if self.version and self.version & 0xFFFF == 0:
            raise GgufError(f"{self.path}: is big-endian; convert it with gguf-convert-endian first")
        raise GgufError(f"{self.path}: has GGUF version {self.version}; versions 2 and 3 can be read")

    def _read_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_number = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not is_number or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise GgufError(
                f"{self.path}: general.alignment is {alignment!r:.80}, expected a power of two up to {MAX_ALIGNMENT}"
            )
        return int(alignment)

    def fileno(self) -> int:
        """Return the read-only file descriptor."""
        return self._handle

    def read_into(self, target: memoryview, offset: int, content: str) -> None:
        """Fill ``target`` with the bytes at ``offset``.

        The bytes are read, not mapped, so that merging a large model takes little resident
        memory.

        Args:
            target: buffer to fill.
            offset: offset of the first byte in the file.
            content: description of the bytes, for messages.

        Raises:
            GgufError: if the bytes cannot be read.
        """
        while target:
            try:
                count = read_some(self._handle, target, offset)
            except OSError as error:
                raise GgufError(f"{self.path}: {content} cannot be read: {error.strerror}") from error
            if count == 0:
                raise GgufError(f"{self.path}: ends within {content}; was it changed while being read?")
            target, offset = target[count:], offset + count

    def check_unchanged(self) -> None:
        """Raise ``GgufError`` if the size or modification time of the file changed since it was opened."""
        now = os.fstat(self._handle)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise GgufError(f"{self.path}: was changed while being read; try again when nothing writes to it")

    def close(self) -> None:
        """Close the file. Metadata and tensor entries remain available; rows can no longer be read."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
