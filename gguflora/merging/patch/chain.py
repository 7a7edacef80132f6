"""Address the files of a split model as one continuous range of bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from gguflora.files.gguf import GgufFile
from gguflora.merging.file_io import read_into
from gguflora.quants.arrays import Bytes
from gguflora.system.descriptors import write_at
from gguflora.system.storage import sync_file


class Chain:
    """Concatenated files. Only the last one may be read or written beyond its size.

    Args:
        handles: file descriptors.
        sizes: sizes of the files in bytes.

    Attributes:
        size: size of all files in bytes.
    """

    def __init__(self, handles: Sequence[int], sizes: Sequence[int]) -> None:
        self._handles = tuple(handles)
        self._starts = [0, *accumulate(sizes)]
        self.size = self._starts.pop()

    @classmethod
    def from_model(cls, model: GgufFile) -> Chain:
        """Chain the files of a model for reading."""
        return cls([part.fileno() for part in model.parts], [part.size for part in model.parts])

    def read(self, offset: int, length: int) -> Bytes:
        """Read bytes, which may span several files.

        Raises:
            PatchError: if a file is too short.
        """
        content = np.empty(length, np.uint8)
        for handle, view, place in self._spans(memoryview(content.data), offset):
            read_into(handle, view, place)
        return content

    def write(self, content: Bytes, offset: int) -> None:
        """Write bytes, which may span several files."""
        for handle, view, place in self._spans(memoryview(content.data), offset):
            write_at(handle, view, place)

    def sync(self) -> None:
        """Flush all files to disk."""
        for handle in self._handles:
            sync_file(handle)

    def _spans(self, view: memoryview, offset: int) -> Iterator[tuple[int, memoryview, int]]:
        """Split a buffer by file: yield file descriptor, part of the buffer, and offset in the file."""
        while view:
            index = bisect_right(self._starts, offset) - 1
            is_last = index + 1 == len(self._starts)
            count = len(view) if is_last else min(len(view), self._starts[index + 1] - offset)
            yield self._handles[index], view[:count], offset - self._starts[index]
            view, offset = view[count:], offset + count


def read(handle: int, offset: int, length: int) -> Bytes:
    """Read bytes of a file.

    Raises:
        PatchError: if the file is too short.
    """
    return Chain([handle], [0]).read(offset, length)


def write(handle: int, content: Bytes, offset: int) -> None:
    """Write bytes at an offset of a file."""
    Chain([handle], [0]).write(content, offset)
