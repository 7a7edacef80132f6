"""Write a safetensors file tensor by tensor, so that a large file needs no memory of its size."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from gguflora.files.safetensors import Array
from gguflora.files.strict_json import to_json
from gguflora.system.storage import copy_range

_KINDS: Final = {"<f4": "F32", "<f2": "F16", "<u2": "BF16"}
_ENTRY: Final = 160
"""More bytes than an entry of the header has beside its name: dtype, some sizes, two offsets."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    kind: str
    shape: tuple[int, ...]
    size: int


class SafetensorsWriter:
    """Writes each tensor when it is added, and the header, which comes first in the file, at the end.

    The format allows no gaps, and readers that map the file need float32 values aligned. So 16-bit tensors wait in an
    unnamed file and follow last. The header gets as much room as it can need, and spaces fill what it leaves.

    Args:
        path: the file.
        room: upper bound of the header's size, from `header_room`.
        metadata: texts for the header.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str]) -> None:
        self._path, self._metadata = path, dict(sorted(metadata.items()))
        room += len(to_json(self._metadata)) + _ENTRY
        self._room = room + -room % 8
        self._entries: dict[int, list[_Entry]] = {4: [], 2: []}
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._resources.enter_context(self._path.open("wb"))
        self._narrow = self._resources.enter_context(tempfile.TemporaryFile(dir=self._path.parent))
        self._file.seek(8 + self._room)
        return self

    def add(self, name: str, values: Array) -> None:
        """Write one tensor: float32, float16, or uint16 for the bits of bfloat16."""
        entry = _Entry(name, _KINDS[values.dtype.str], values.shape, values.nbytes)
        self._entries[values.dtype.itemsize].append(entry)
        file = self._file if values.dtype.itemsize == 4 else self._narrow
        file.write(np.ascontiguousarray(values).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        self._narrow.flush()
        self._file.flush()
        size = sum(entry.size for entry in self._entries[2])
        copy_range(self._narrow.fileno(), 0, self._file.fileno(), self._file.tell(), size)
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for entry in self._entries[4] + self._entries[2]:
            header[entry.name] = {
                "dtype": entry.kind,
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.size],
            }
            offset += entry.size
        text = to_json(header, separators=(",", ":"), ensure_ascii=False).encode()
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))


def header_room(names: list[str]) -> int:
    """Return an upper bound of the bytes that tensors of these names need in a header."""
    return sum(len(to_json(name)) + _ENTRY for name in names)
