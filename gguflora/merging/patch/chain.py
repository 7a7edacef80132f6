"""Files as if they were one after the other: a model, or all files of a split one."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from gguflora.errors import PatchError
from gguflora.files.gguf import GgufFile
from gguflora.quants.arrays import Bytes


class Chain:
    """Files laid end to end; only the last may be read or written behind its end.

    Args:
        handles: file descriptors.
        sizes: of the files, in bytes.

    Attributes:
        size: of all files, in bytes.
    """

    def __init__(self, handles: Sequence[int], sizes: Sequence[int]) -> None:
        self._handles = tuple(handles)
        self._starts = [0, *accumulate(sizes)]
        self.size = self._starts.pop()

    @classmethod
    def from_model(cls, model: GgufFile) -> Chain:
        """The files of a model, for reading."""
        return cls([part.fileno() for part in model.parts], [part.size for part in model.parts])

    def read(self, offset: int, length: int) -> Bytes:
        """Bytes, which may lie in several files.

        Raises:
            PatchError: if a file ends before.
        """
        content = np.empty(length, np.uint8)
        for handle, view, place in self._spans(memoryview(content.data), offset):
            _read_into(handle, view, place)
        return content

    def write(self, content: Bytes, offset: int) -> None:
        """Write bytes to their place."""
        for handle, view, place in self._spans(memoryview(content.data), offset):
            _write_all(handle, view, place)

    def sync(self) -> None:
        """Make what was written last."""
        for handle in self._handles:
            os.fsync(handle)

    def _spans(self, view: memoryview, offset: int) -> Iterator[tuple[int, memoryview, int]]:
        """Each file's share of some bytes, and where in the file it lies."""
        while view:
            index = bisect_right(self._starts, offset) - 1
            is_last = index + 1 == len(self._starts)
            count = len(view) if is_last else min(len(view), self._starts[index + 1] - offset)
            yield self._handles[index], view[:count], offset - self._starts[index]
            view, offset = view[count:], offset + count


def read(handle: int, offset: int, length: int) -> Bytes:
    """Bytes of a file.

    Raises:
        PatchError: if it ends before.
    """
    return Chain([handle], [0]).read(offset, length)


def write(handle: int, content: Bytes, offset: int) -> None:
    """Write bytes to their place in a file."""
    Chain([handle], [0]).write(content, offset)


def _read_into(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(handle, [view], offset)
        if count == 0:
            raise PatchError(f"the file ends at byte {offset}, {len(view)} bytes before it should; was it changed?")
        view, offset = view[count:], offset + count


def _write_all(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
