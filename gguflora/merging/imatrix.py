"""Read llama.cpp's importance matrices, which say how much each column of a weight matters for quantization.

There are two formats, which differ in their first bytes. Both are converted to the weights that ``llama-quantize``
passes to ggml (llama.cpp's ``common/imatrix-loader.cpp`` and ``tools/quantize/quantize.cpp``):

* GGUF: ``<tensor>.in_sum2`` holds sums of squared inputs, (n_in,) or (n_experts, n_in), and ``<tensor>.counts`` the
  number of inputs. The weights are sum / count, or 1 for an expert that saw no input.
* ``.dat``: int32 number of entries; each entry has int32 length and bytes of the tensor's name, int32 number of calls,
  int32 number of values, and float32 values. The weights are values / calls. Optional data about the calibration text
  follows.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from gguflora.errors import FormatError, GgufError, MismatchError
from gguflora.files.gguf import MAGIC, TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.quants.arrays import Float32Array

_SUMS, _COUNTS = ".in_sum2", ".counts"
_SMALLEST_ENTRY: Final = 3 * 4 + 1 + 4
"""Bytes of the smallest entry of a ``.dat`` file: a name of one letter and one value."""
_MAX_COUNT: Final = 2.0**53


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Float32Array]:
    """Read the weights of the columns, float32 (n_in,) or (n_experts, n_in), by GGUF tensor.

    ``.dat`` files do not store the number of experts, so theirs are (n_experts * n_in,); `importance_of` reshapes them.

    Raises:
        FormatError: if the file is missing or damaged, is not an importance matrix, or holds negative, infinite or NaN
            values.
    """
    location = Path(path)
    with _open(location) as file:
        imatrix = None if file.read(4) == MAGIC else _read_dat(location, file)
    if imatrix is None:
        imatrix = _read_gguf(location)
    for name, weights in imatrix.items():
        _check_weights(f"{location}: the importance of {name!r}", weights)
    return imatrix


@dataclass(frozen=True, slots=True)
class ImatrixOrigin:
    """The text that an importance matrix was computed on, if it is recorded, and in how many chunks (0: unknown)."""

    dataset: str | None
    chunks: int


def read_origin(path: str | os.PathLike[str]) -> ImatrixOrigin:
    """Read where an importance matrix comes from. `read_imatrix` has checked the file.

    Raises:
        FormatError: if the file is missing or damaged.
    """
    location = Path(path)
    with _open(location) as file:
        if file.read(4) != MAGIC:
            return _origin_of_dat(_Reader(location, file))
    with GgufFile(location) as imatrix:
        datasets, chunks = imatrix.metadata.get("imatrix.datasets"), imatrix.metadata.get("imatrix.chunk_count")
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], str) else None
    return ImatrixOrigin(first, chunks if isinstance(chunks, int) else 0)


def _origin_of_dat(reader: _Reader) -> ImatrixOrigin:
    """Read what follows the entries of a ``.dat`` file, which may be nothing."""
    for _ in range(reader.integer("the number of entries")):
        reader.take(reader.integer("the length of a name"), "a name")
        reader.integer("the number of calls")
        reader.take(4 * reader.integer("the number of values"), "the values")
    if not reader.remaining:
        return ImatrixOrigin(None, 0)
    chunks = reader.integer("the number of chunks")
    if not reader.remaining:
        return ImatrixOrigin(None, chunks)
    text = reader.take(reader.integer("the length of the text's name"), "the text's name")
    return ImatrixOrigin(text.split(b"\0")[0].decode("utf-8", errors="replace") or None, chunks)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open the file for reading. It is not mapped: truncation while reading would kill the process with SIGBUS."""
    if not path.is_file():  # a named pipe would block
        raise FormatError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def importance_of(imatrix: Mapping[str, Float32Array], tensor: str, shape: Shape) -> Float32Array | None:
    """Return the weights of a tensor's columns, float32 (n_matrices, n_in), or None if there are none.

    Args:
        imatrix: the result of `read_imatrix`.
        tensor: name of the tensor.
        shape: shape of the tensor in numpy's order; leading dimensions count experts.

    Raises:
        MismatchError: if the weights are for a tensor of another size.
    """
    weights = imatrix.get(tensor)
    if weights is None:
        return None
    matrices = math.prod(shape[:-2])
    if weights.size == matrices * shape[-1]:
        return weights.reshape(matrices, shape[-1])
    if tensor in {TOKEN_EMBEDDING, "per_layer_token_embd.weight"}:
        # llama-quantize ignores the weights, too: tied to the output they may have any size
        return None
    raise MismatchError(
        f"the importance matrix has {weights.size} values for {tensor!r}, expected {matrices} x {shape[-1]}; was it "
        "made for another model?"
    )


def _read_gguf(path: Path) -> dict[str, Float32Array]:
    with GgufFile(path) as file:
        names = {
            name.removesuffix(end): None for name in file.tensors for end in (_SUMS, _COUNTS) if name.endswith(end)
        }
        if not names:
            raise GgufError(f"{path}: is a GGUF file but not an importance matrix: no tensor's name ends in {_SUMS!r}")
        return {name: _mean_squares(file, name) for name in names}


def _mean_squares(file: GgufFile, name: str) -> Float32Array:
    entries = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
    if entries[0] is None or entries[1] is None:
        raise GgufError(f"{file.path}: has only one of {name + _SUMS!r} and {name + _COUNTS!r}; it is incomplete")
    sums, counts = (_floats(file, entry) for entry in entries if entry)
    if len(sums) % len(counts):
        raise GgufError(f"{file.path}: {name!r} has {len(sums)} sums for {len(counts)} counts, expected a multiple")
    if not (np.abs(counts) < _MAX_COUNT).all():
        raise GgufError(f"{file.path}: {name + _COUNTS!r} holds {counts.max()}, expected a number of inputs")
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]  # halves away from 0, as lround
    rows = sums.reshape(len(counts), -1)
    with np.errstate(over="ignore", invalid="ignore"):  # `_check_weights` refuses infinity and NaN later
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
        raise FormatError(f"{path}: claims {count} entries in {reader.size} bytes; it is not an importance matrix")
    entries: dict[str, Float32Array] = {}
    for number in range(count):
        length = reader.integer(f"the length of name {number}")
        raw = reader.take(length, f"name {number}").split(b"\0")[0]
        name = raw.decode("utf-8", errors="replace")
        if not raw or name in entries:
            problem = "the same name as another" if raw else "no name"
            raise FormatError(f"{path}: entry {number} has {problem}: {name!r:.80}")
        calls = reader.integer(f"the number of calls of {name!r:.80}")
        n_values = reader.integer(f"the number of values of {name!r:.80}")
        if n_values < 1:
            raise FormatError(f"{path}: {name!r:.80} claims {n_values} values, expected at least 1")
        values: Float32Array = np.frombuffer(reader.take(4 * n_values, f"the values of {name!r:.80}"), "<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # as above
            entries[name] = np.divide(values, np.float32(max(calls, 1)), dtype=np.float32)
    return entries


class _Reader:
    """Reads a file sequentially; raises ``FormatError`` if it is too short."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._position = file.seek(0)
        self.size = os.fstat(file.fileno()).st_size

    @property
    def remaining(self) -> int:
        return self.size - self._position

    def take(self, count: int, field: str) -> bytes:
        remaining = self.remaining
        if not 0 <= count <= remaining:
            raise FormatError(
                f"{self._path}: {field} needs {count} bytes at byte {self._position}, but {remaining} are left"
            )
        content = self._file.read(count)
        if len(content) < count:
            raise FormatError(f"{self._path}: became shorter while it was being read")
        self._position += count
        return content

    def integer(self, field: str) -> int:
        value: int = struct.unpack("<i", self.take(4, field))[0]
        return value


def _check_weights(subject: str, weights: Float32Array) -> None:
    if not (np.isfinite(weights) & (weights >= 0)).all():
        wrong = weights[~(np.isfinite(weights) & (weights >= 0))].flat[0]
        raise FormatError(f"{subject} holds {wrong}, expected finite numbers of at least 0")
