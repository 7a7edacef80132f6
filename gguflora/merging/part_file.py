"""Read merge part files and check them. `gguflora.merging.parts` documents their layout and writes them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from gguflora.errors import FormatError
from gguflora.files.remote import is_remote, redacted
from gguflora.merging.sinks import Block, FileSink
from gguflora.placement.target import ChangedTensor

TRAILER: Final = struct.Struct("<Q8s")
"""Length of the JSON before it, and `MAGIC`."""
MAGIC: Final = b"GFLPART1"


@dataclass(frozen=True, slots=True)
class MergePart:
    """An open part file, whose rows have not been read yet.

    Attributes:
        path: path or URL of the file.
        file: the open file.
        plan: hash of the merge that the part belongs to.
        seconds: time that it took to make the part.
        tensors: offset, sums and blocks of each tensor, by name.
    """

    path: str
    file: IO[bytes]
    plan: str
    seconds: float
    tensors: dict[str, dict[str, Any]]

    def put(self, sink: FileSink, targets: Mapping[str, ChangedTensor]) -> None:
        """Write the rows to a sink and check the CRC-32 of each block."""
        for name, tensor in self.tensors.items():
            target = targets[name]
            row_bytes = target.type.row_bytes(target.shape[-1])
            for start, n_rows, checksum in tensor["blocks"]:
                with part_errors(self.path):
                    self.file.seek(tensor["offset"] + start * row_bytes)
                    content = self.file.read(n_rows * row_bytes)
                if len(content) != n_rows * row_bytes or zlib.crc32(content) != checksum:
                    raise FormatError(f"{redacted(self.path)}: is damaged: {name!r}, rows {start} to {start + n_rows}")
                new = np.frombuffer(content, np.uint8).reshape(n_rows, row_bytes)
                sink.put(Block(target, start, new[:0], new))


def open_part(path: str, opened: ExitStack) -> MergePart:
    """Open a local or remote part file and read its index.

    Raises:
        FormatError: if it is not a part of a merge, or is damaged.
    """
    with part_errors(path):
        file = opened.enter_context(_open(path))
        trailer = file.seek(-TRAILER.size, os.SEEK_END)
        length, magic = TRAILER.unpack(file.read())
        if magic != MAGIC or length > trailer:
            raise ValueError(magic)
        file.seek(trailer - length)
        index = json.loads(file.read(length))
        return MergePart(path, file, str(index["plan"]), float(index["seconds"]), dict(index["tensors"]))


def _open(path: str) -> IO[bytes]:
    if not is_remote(path):
        return Path(path).open("rb")
    from gguflora.files.remote.stores import open_store, store_errors  # noqa: PLC0415  (needs fsspec)

    with store_errors(path):
        store, name = open_store(path)
        file: IO[bytes] = store.open(name, "rb")
    return file


@contextmanager
def part_errors(path: str) -> Iterator[None]:
    """Turn errors while reading a part file into ``FormatError``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FormatError(f"{redacted(path)}: does not exist; all parts are needed") from error
    except OSError as error:
        raise FormatError(f"{redacted(path)}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{redacted(path)}: is not a part of a merge, or is truncated") from error


def check_rows(part: MergePart, n_rows: Mapping[str, int]) -> None:
    """Raise ``ValueError`` unless each tensor's blocks hold all of its rows in order."""
    for name, tensor in part.tensors.items():
        row = 0
        for start, count, _ in tensor["blocks"]:
            if start != row:
                raise ValueError(start)
            row += count
        if row != n_rows[name] or tensor["offset"] < 0:
            raise ValueError(row)
