"""Adapter weights from disk: safetensors mapped into memory, and torch's older ``.bin`` files.

numpy has no bfloat16, so bf16 tensors are held as uint16 arrays of their bits: slicing, reshaping and permuting need no
more, and `as_float32` widens them, exactly, where numbers are needed.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gguflora.errors import SafetensorsError

Array = NDArray[Any]

_DTYPES: Final[dict[str, str]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read-only views of all tensors of a safetensors file.

    Raises:
        SafetensorsError: if the file is missing, damaged, or holds a dtype that adapters do not use.
    """
    header, start = read_header(path)
    try:
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise SafetensorsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return {name: _view(path, content[start:], name, entry) for name, entry in header.items()}


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file (dtype, shape, data_offsets), checked against its size, and where data begins.

    Raises:
        SafetensorsError: if the file is missing or damaged.
    """
    try:
        if path.exists() and not path.is_file():  # a named pipe would block
            raise SafetensorsError(f"{path}: is not a file")
        with safe_open(path, framework="np"):  # checks the whole header against the file's size
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SafetensorsError(f"{path}: is not a readable safetensors file: {reason}") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _view(path: Path, data: Array, name: str, entry: dict[str, Any]) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise SafetensorsError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}"
        )
    start, end = entry["data_offsets"]
    return np.ndarray(
        entry["shape"], _DTYPES[entry["dtype"]], data[start:end].tobytes() if start == end else data[start:end]
    )


def read_torch_bin(path: Path) -> dict[str, Array]:
    """All tensors of a ``.bin`` file written by ``torch.save``; nothing in it is executed.

    Raises:
        SafetensorsError: if torch is not installed or refuses the file.
    """
    try:
        import torch  # noqa: PLC0415  (heavy, and only for these files)
    except ImportError as error:
        raise SafetensorsError(
            f"{path}: .bin files are read with torch, which is not installed: pip install 'gguflora[torch]', "
            "or save the adapter as safetensors"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it goes on to refuse
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): _from_torch(tensor) for name, tensor in loaded.items()}
    except Exception as error:  # torch.load raises half a dozen unrelated types
        raise SafetensorsError(f"{path}: torch cannot read it as plain weights: {_first_line(error)}") from error


def _from_torch(tensor: Any) -> Array:  # noqa: ANN401  (a torch.Tensor; torch has no types here)
    import torch  # noqa: PLC0415

    tensor = tensor.detach().contiguous()
    array: Array = (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )
    return array


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_float(array: Array) -> bool:
    """Whether `as_float32` of it is meant: floats, or uint16 for bfloat16 bits."""
    return array.dtype.kind == "f" or array.dtype == np.uint16


def as_float32(array: Array) -> NDArray[np.float32]:
    """The values of an array as float32; uint16 is taken for bfloat16 bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def read_weights(folder: Path, stem: str) -> tuple[Path, dict[str, Array]]:
    """The tensors of ``stem.safetensors`` in a folder, else of ``stem.bin``, and the path they came from."""
    safetensors = folder / f"{stem}.safetensors"
    if safetensors.is_file():
        return safetensors, read_safetensors(safetensors)
    torch_bin = folder / f"{stem}.bin"
    if torch_bin.is_file():
        return torch_bin, read_torch_bin(torch_bin)
    found = ", ".join(sorted(entry.name for entry in os.scandir(folder))) or "nothing"
    raise SafetensorsError(f"{folder}: holds neither {safetensors.name} nor {torch_bin.name}; found: {found}")
