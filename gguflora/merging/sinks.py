"""Where merged blocks of rows go: a file, a patch, a part."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from gguflora.files.gguf import GgufFile, Layout
from gguflora.placement.target import ChangedTensor
from gguflora.quants.arrays import Bytes

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a changed tensor.

    Attributes:
        target: the tensor.
        start: number of its first row.
        old: the base's bytes of the rows, as far as it has them.
        new: bytes of the output.
    """

    target: ChangedTensor
    start: int
    old: Bytes
    new: Bytes


class RowSink(Protocol):
    """Where the output goes; called from several threads."""

    def put(self, block: Block) -> None:
        """Take new rows of a changed tensor."""

    def copy(self, start: int, stop: int, to: int) -> None:
        """Take a range of the base's bytes."""


class FileSink:
    """A GGUF file, or the files of a split model."""

    def __init__(self, outputs: Sequence[IO[bytes]], base: GgufFile, layout: Layout) -> None:
        self._handles, self._base, self._layout = [output.fileno() for output in outputs], base, layout
        for handle, part in zip(self._handles, layout.parts, strict=True):
            os.truncate(handle, part.size)
            _write_at(handle, part.header, 0)

    def put(self, block: Block) -> None:
        """Write rows to their place."""
        index, offset = self._layout.locate(self._layout.offsets[block.target.name])
        _write_at(self._handles[index], block.new.data, offset + block.start * block.new.shape[1])

    def copy(self, start: int, stop: int, to: int) -> None:
        """Copy bytes of the base, in the kernel."""
        index, offset = self._layout.locate(to)
        self._base.copy(start, stop, self._handles[index], offset)


def _write_at(handle: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content).cast("B")
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
