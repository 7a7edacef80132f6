"""Checked, read-only access to GGUF models, and the layout of a copy in which some tensors are changed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian, in one file or split
into several by llama.cpp (``name-00001-of-00003.gguf``). Every count, length and offset is checked against the size of
the file before it is used, so a damaged file raises ``GgufError`` and never takes more memory than its size.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import GgufError
from gguflora.files.gguf_header import Metadata, encode_entry, encode_int32
from gguflora.files.gguf_layout import Forms, Layout, ShardLayout, join, part_layout
from gguflora.files.gguf_shard import MAGIC, GgufShard
from gguflora.files.gguf_tensors import OUTPUT, TOKEN_EMBEDDING, Shape, TensorEntry, check_readable, layer_of
from gguflora.files.shard_names import PART_NAME, part_paths
from gguflora.files.sidecars import check_finished
from gguflora.system.storage import copy_range

__all__ = [
    "MAGIC",
    "OUTPUT",
    "TOKEN_EMBEDDING",
    "GgufFile",
    "Layout",
    "Metadata",
    "Shape",
    "ShardLayout",
    "TensorEntry",
    "encode_entry",
    "layer_of",
    "part_paths",
]

_COUNT, _NUMBER, _N_TENSORS = "split.count", "split.no", "split.tensors.count"


class GgufFile:
    """A GGUF model, opened read-only and checked: one file, or all files of a split model.

    Args:
        path: path of the file; for a split model, of any of its files.

    Attributes:
        path: path of the file; for a split model, of its first file.
        paths: paths of all files.
        parts: the open files.
        metadata: the key-value pairs of the first file.
        tensors: the tensors by name, in the order of the files' tensor lists.
        size: total size of all files in bytes.

    Raises:
        GgufError: if a file is missing, damaged, big-endian, of an unknown version, left half merged by a merge in
            place, or from another model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._parts: list[GgufShard] = []
        try:
            self._parts.append(GgufShard(Path(path)))
            count = self._parts[0].metadata.get(_COUNT)
            if isinstance(count, int) and count > 1:
                self._open_all(count)
            check_finished(self._parts[0].path)
        except BaseException:
            self.close()
            raise
        self.parts = tuple(self._parts)
        self.paths = tuple(part.path for part in self.parts)
        self.path = self.paths[0]
        self.metadata: Metadata = self._parts[0].metadata
        self._starts = [0, *accumulate(part.size for part in self._parts)]
        self.size = self._starts.pop()
        self.tensors: dict[str, TensorEntry] = {}
        for start, part in zip(self._starts, self._parts, strict=True):
            self.tensors |= {t.name: replace(t, offset=t.offset + start) for t in part.tensors.values()}

    def _open_all(self, count: int) -> None:
        """Open the other files of a split model, and sort all by their number."""
        given = self._parts[0]
        number = given.metadata.get(_NUMBER)
        match = PART_NAME.fullmatch(given.path.name)
        if not isinstance(number, int) or not match or (int(match[2]), int(match[3])) != (number + 1, count):
            expected = f"-{number + 1:05}-of-{count:05}.gguf" if isinstance(number, int) else f"-of-{count:05}.gguf"
            raise GgufError(
                f"{given.path}: is one of {count} files of a split model (split.no is {number!r:.40}), so its name "
                f"should end in {expected!r}"
            )
        for index, path in enumerate(part_paths(given.path.with_name(f"{match[1]}.gguf"), count)):
            self._parts.append(given if index == number else _open_part(path, count))
            _check_part(self._parts[-1], index, count)
        del self._parts[0]  # the given file, which the loop has added again at its place
        _check_together(self._parts)

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str):
            raise GgufError(f"{self.path}: has no general.architecture; expected a language model or an adapter")
        return value

    def read_rows(self, tensor: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
        """Read the rows ``start`` to ``stop`` of a tensor as a new uint8 array (stop - start, row_bytes)."""
        check_readable(self.path, [tensor])
        row_bytes = tensor.type.row_bytes(tensor.n_in)
        rows = np.empty((stop - start, row_bytes), np.uint8)
        part, offset = self._locate(tensor.offset)
        part.read_into(memoryview(rows.data).cast("B"), offset + start * row_bytes, f"tensor {tensor.name!r:.100}")
        return rows

    def copy(self, start: int, stop: int, target: int, target_offset: int) -> None:
        """Copy a range of bytes to another file.

        Args:
            start: offset of the first byte, counted as if the files were concatenated.
            stop: offset after the last byte; must lie in the same file.
            target: file descriptor to write to.
            target_offset: offset in the target at which to write.

        Raises:
            GgufError: if the file became shorter.
        """
        part, offset = self._locate(start)
        try:
            copy_range(part.fileno(), offset, target, target_offset, stop - start)
        except EOFError as error:
            raise GgufError(f"{part.path}: became shorter while it was being copied") from error

    def _locate(self, offset: int) -> tuple[GgufShard, int]:
        """Return the file that holds a byte and its offset there, given its offset in the concatenated files."""
        index = bisect_right(self._starts, offset) - 1
        return self._parts[index], offset - self._starts[index]

    def layout(self, entries: Mapping[str, bytes], changed: Forms) -> Layout:
        """Return the layout of this model with metadata and tensors changed or added; added tensors come last.

        All other bytes of a file stay the same. As long as no tensor of a file changes its size, its offsets stay the
        same, too.

        Args:
            entries: encoded metadata by key, see `encode_entry`.
            changed: shape and type of each tensor whose data is not copied.
        """
        check_readable(self.path, self.tensors.values())
        n_tensors = len({*self.tensors, *changed})
        added = {name: form for name, form in changed.items() if name not in self.tensors}
        layouts = []
        for part in self._parts:
            part_changed = {name: form for name, form in changed.items() if name in part.tensors}
            part_changed |= added if part is self._parts[-1] else {}
            part_entries = entries if part is self._parts[0] else {}
            if added and _N_TENSORS in part.metadata:
                part_entries = {**part_entries, _N_TENSORS: encode_int32(_N_TENSORS, n_tensors)}
            layouts.append(part_layout(part, part_entries, part_changed))
        return join(layouts, [part.size for part in self._parts])

    def check_unchanged(self) -> None:
        """Raise ``GgufError`` if the size or modification time of a file changed since it was opened."""
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        """Close the files. Metadata and tensor entries remain available; rows can no longer be read."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_part(path: Path, count: int) -> GgufShard:
    if not path.exists():
        raise GgufError(
            f"{path}: does not exist; the model is split into {count} files, which must be in one directory"
        )
    return GgufShard(path)


def _check_part(part: GgufShard, index: int, count: int) -> None:
    found_number, found_count = part.metadata.get(_NUMBER), part.metadata.get(_COUNT)
    if (found_number, found_count) != (index, count):
        raise GgufError(
            f"{part.path}: split.no is {found_number!r:.40} and split.count {found_count!r:.40}, expected {index} and "
            f"{count}; the name does not fit the file's place in the split model"
        )


def _check_together(parts: list[GgufShard]) -> None:
    """Raise unless the files belong to one model and hold all of its tensors."""
    owners: dict[str, Path] = {}
    n_tensors = sum(len(part.tensors) for part in parts)
    for part in parts:
        for name in part.tensors:
            if name in owners:
                raise GgufError(
                    f"{part.path}: holds {name!r:.100}, as {owners[name]} does; are they parts of one model?"
                )
            owners[name] = part.path
        for key in ("general.architecture", "general.name"):
            if part.metadata.get(key, parts[0].metadata.get(key)) != parts[0].metadata.get(key):
                raise GgufError(f"{part.path}: has another {key} than {parts[0].path}; it belongs to another model")
        claimed = part.metadata.get(_N_TENSORS, n_tensors)
        if claimed != n_tensors:
            raise GgufError(
                f"{part.path}: split.tensors.count is {claimed!r:.40}, but the {len(parts)} files hold {n_tensors} "
                "tensors; they are not parts of one model"
            )
