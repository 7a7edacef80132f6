"""Sinks for merged rows: a file, a patch, or a merge part."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from gguflora.files.gguf import GgufFile, Layout
from gguflora.placement.target import ChangedTensor
from gguflora.quants.arrays import Bytes
from gguflora.system.descriptors import write_at

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a changed tensor.

    Attributes:
        target: the tensor.
        start: index of the first row.
        old: the base's bytes of the rows; fewer rows than ``new`` if the tensor grows.
        new: the output's bytes of the rows.
    """

    target: ChangedTensor
    start: int
    old: Bytes
    new: Bytes


class RowSink(Protocol):
    """Receives the output of a merge. Its methods are called from several threads."""

    def put(self, block: Block) -> None:
        """Accept new rows of a changed tensor."""

    def copy(self, start: int, stop: int, to: int) -> None:
        """Accept the base's bytes ``start`` to ``stop`` for offset ``to`` of the output."""


class FileSink:
    """Writes a GGUF file, or the files of a split model."""

    def __init__(self, outputs: Sequence[IO[bytes]], base: GgufFile, layout: Layout) -> None:
        self._handles, self._base, self._layout = [output.fileno() for output in outputs], base, layout
        for handle, part in zip(self._handles, layout.parts, strict=True):
            os.ftruncate(handle, part.size)
            write_at(handle, part.header, 0)

    def put(self, block: Block) -> None:
        """Write rows at their offset."""
        index, offset = self._layout.locate(self._layout.offsets[block.target.name])
        write_at(self._handles[index], block.new.data, offset + block.start * block.new.shape[1])

    def copy(self, start: int, stop: int, to: int) -> None:
        """Copy bytes of the base; the operating system does the copy."""
        index, offset = self._layout.locate(to)
        self._base.copy(start, stop, self._handles[index], offset)
