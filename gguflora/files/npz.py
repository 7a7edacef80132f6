"""Read the arrays of an ``.npz`` file, as MLX writes it: uncompressed, without pickles.

numpy's own reader allocates what a header asks for before it looks at the file; here every size is checked first.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import SafetensorsError

_SUFFIX: Final = ".npy"
_KINDS: Final = "fiub"
_DAMAGED: Final = (
    *(OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, RecursionError),
    *(MemoryError, SyntaxError, TypeError, KeyError, struct.error),
)
"""What zipfile and numpy raise on damaged files."""


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of an ``.npz`` file.

    Raises:
        SafetensorsError: if the file is damaged, compressed, or holds anything but arrays of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.filename.removesuffix(_SUFFIX): _read(path, archive, entry) for entry in archive.infolist()}
    except _DAMAGED as error:
        raise SafetensorsError(f"{path}: is not a readable .npz file: {error!s:.200}") from error


def _read(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
        raise SafetensorsError(f"{path}: {entry.filename!r:.100} is compressed, expected arrays as MLX writes them")
    stream = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise SafetensorsError(f"{path}: {entry.filename!r:.100} has the unknown version {version} of the npy format")
    shape, is_fortran, dtype = read_header(stream)
    values = stream.read()
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise SafetensorsError(f"{path}: {entry.filename!r:.100} holds {dtype!s:.40}, expected an array of numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(values):
        raise SafetensorsError(f"{path}: {entry.filename!r:.100} of shape {shape!r:.80} has {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if is_fortran else "C")
