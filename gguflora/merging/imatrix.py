"""Importance matrices of llama.cpp: how much each column of a weight matters when it is quantized.

Two formats, told apart by their first bytes, and turned into the weights that ``llama-quantize`` hands to ggml (facts
from llama.cpp's ``common/imatrix-loader.cpp`` and ``tools/quantize/quantize.cpp``):

* GGUF: ``<tensor>.in_sum2`` holds sums of squared inputs, (n_in,) or (n_experts, n_in), and ``<tensor>.counts`` over
  how many inputs; the weights are sums / count, or 1 for an expert that saw no input.
* ``.dat``: int32 number of entries; each has int32 length and bytes of the tensor's name, int32 number of calls, int32
  number of values, float32 values; the weights are values / calls. After them, optionally, what it was computed from.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from gguflora.errors import FormatError, GgufError, MismatchError
from gguflora.files.gguf import MAGIC, TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.quants.arrays import Float32Array

_SUMS, _COUNTS = ".in_sum2", ".counts"
_SMALLEST_ENTRY: Final = 3 * 4 + 1 + 4
"""Bytes of an entry of a ``.dat`` file with a name of one letter and one value."""
_MAX_COUNT: Final = 2.0**53


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Float32Array]:
    """The weights of the columns, float32 (n_in,) or (n_experts, n_in), by GGUF tensor.

    ``.dat`` files do not say how many experts there are: theirs are (n_experts * n_in,). See `importance_of`.

    Raises:
        FormatError: if the file is missing, damaged, no importance matrix, or holds values that no sum of squares has.
    """
    location = Path(path)
    with _open(location) as file:
        imatrix = None if file.read(4) == MAGIC else _read_dat(location, file)
    if imatrix is None:
        imatrix = _read_gguf(location)
    for name, weights in imatrix.items():
        _check_weights(f"{location}: the importance of {name!r}", weights)
    return imatrix


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file, which is read, not mapped, so that one that becomes shorter costs an error and not the process."""
    if not path.is_file():  # a named pipe would block
        raise FormatError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def importance_of(imatrix: Mapping[str, Float32Array], tensor: str, shape: Shape) -> Float32Array | None:
    """The weights of a tensor's columns, float32 (n_matrices, n_in); None if the matrix does not have it.

    Args:
        imatrix: by `read_imatrix`.
        tensor: its name.
        shape: its shape in numpy's order; leading dimensions are those of a stack of experts.

    Raises:
        MismatchError: if it was made for a tensor of another size.
    """
    found = imatrix.get(tensor)
    if found is None:
        return None
    matrices = math.prod(shape[:-2])
    if found.size == matrices * shape[-1]:
        return found.reshape(matrices, shape[-1])
    if tensor == TOKEN_EMBEDDING:  # llama-quantize goes on without: tied to the output it may have any size
        return None
    raise MismatchError(
        f"the importance matrix has {found.size} values for {tensor!r}, expected {matrices} x {shape[-1]}; was it made "
        "for another model?"
    )


def _read_gguf(path: Path) -> dict[str, Float32Array]:
    with GgufFile(path) as file:
        names = {
            name.removesuffix(end): None for name in file.tensors for end in (_SUMS, _COUNTS) if name.endswith(end)
        }
        if not names:
            raise GgufError(f"{path}: is a GGUF file but no importance matrix: no tensor's name ends in {_SUMS!r}")
        return {name: _mean_squares(file, name) for name in names}


def _mean_squares(file: GgufFile, name: str) -> Float32Array:
    entries = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
    if entries[0] is None or entries[1] is None:
        raise GgufError(f"{file.path}: has only one of {name + _SUMS!r} and {name + _COUNTS!r}; it is incomplete")
    sums, counts = (_floats(file, entry) for entry in entries if entry)
    if len(sums) % len(counts):
        raise GgufError(f"{file.path}: {name!r} has {len(sums)} sums for {len(counts)} counts, expected a multiple")
    if not (np.abs(counts) < _MAX_COUNT).all():
        raise GgufError(f"{file.path}: {name + _COUNTS!r} holds {counts.max()}, which is no count")
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]  # halves away from 0, as lround
    rows = sums.reshape(len(counts), -1)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no finite number is refused later
        weights = np.divide(rows, whole, out=np.ones_like(rows), where=whole > 0)
    return weights if len(counts) > 1 else weights[0]


def _floats(file: GgufFile, tensor: TensorEntry) -> Float32Array:
    if tensor.type.name != "F32":
        raise GgufError(f"{file.path}: tensor {tensor.name!r} is {tensor.type.name}, expected F32")
    return file.read_rows(tensor, 0, tensor.n_rows).reshape(-1).view(np.float32)


def _read_dat(path: Path, file: BinaryIO) -> dict[str, Float32Array]:
    reader = _Reader(path, file)
    count = reader.integer("the number of entries")
    if not 1 <= count <= reader.size // _SMALLEST_ENTRY:
        raise FormatError(f"{path}: claims {count} entries in {reader.size} bytes; it is no importance matrix")
    entries: dict[str, Float32Array] = {}
    for number in range(count):
        length = reader.integer(f"the length of name {number}")
        raw = reader.take(length, f"name {number}").split(b"\0")[0]
        name = raw.decode("utf-8", errors="replace")
        if not raw or name in entries:
            raise FormatError(f"{path}: entry {number} has {'the name of another' if raw else 'no name'}: {name!r:.80}")
        calls = reader.integer(f"the number of calls of {name!r:.80}")
        n_values = reader.integer(f"the number of values of {name!r:.80}")
        if n_values < 1:
            raise FormatError(f"{path}: {name!r:.80} claims {n_values} values, expected at least 1")
        values: Float32Array = np.frombuffer(reader.take(4 * n_values, f"the values of {name!r:.80}"), "<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # as above
            entries[name] = np.divide(values, np.float32(max(calls, 1)), dtype=np.float32)
    return entries


class _Reader:
    """Reads forward; running out of bytes is a ``FormatError``."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._at = file.seek(0)
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int, what: str) -> bytes:
        left = self.size - self._at
        if not 0 <= count <= left:
            raise FormatError(f"{self._path}: {what} needs {count} bytes at byte {self._at}, but {left} are left")
        content = self._file.read(count)
        if len(content) < count:
            raise FormatError(f"{self._path}: became shorter while it was being read")
        self._at += count
        return content

    def integer(self, what: str) -> int:
        value: int = struct.unpack("<i", self.take(4, what))[0]
        return value


def _check_weights(what: str, weights: Float32Array) -> None:
    if not (np.isfinite(weights) & (weights >= 0)).all():
        wrong = weights[~(np.isfinite(weights) & (weights >= 0))].flat[0]
        raise FormatError(f"{what} holds {wrong}, expected finite numbers of at least 0")
