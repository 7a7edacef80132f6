"""Read adapter weights: safetensors, in one file or in shards, and torch's older ``.bin`` files.

numpy has no bfloat16, so bf16 tensors are uint16 arrays of their bits. That suffices for slicing, reshaping and
permuting; `as_float32` converts them exactly where numbers are needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from gguflora.errors import MissingExtraError, SafetensorsError, listed
from gguflora.files.lfs import check_fetched
from gguflora.files.npz import read_npz
from gguflora.files.small_files import read_small_text

Array = NDArray[Any]

_INDEX: Final = ".safetensors.index.json"
_DTYPES: Final[dict[str, str]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_BYTES: Final[dict[str, int]] = {
    **{name: np.dtype(code).itemsize for name, code in _DTYPES.items()},
    **{"U64": 8, "U32": 4, "U16": 2, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
_MAX_HEADER: Final = 100_000_000
"""Maximum size of a header in bytes, the same as in the reference implementation of the format."""

Header = dict[str, dict[str, Any]]


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read all tensors of a safetensors file.

    The file is read, not mapped: if it is truncated meanwhile, that raises an error instead of killing the process.

    Raises:
        SafetensorsError: if the file is missing, damaged, or holds a dtype that adapters do not use.
    """
    with _open(path) as file:
        header, start, size = _read_header(path, file)
        content = np.empty(size - start, np.uint8)
        _read_into(path, file, content)
    return {name: _view(path, content, name, entry) for name, entry in header.items()}


def read_header(path: Path) -> tuple[Header, int]:
    """Read the header of a safetensors file, and check it against the file's size.

    Returns:
        The entry of each tensor (dtype, shape, data_offsets), and the offset of the data in the file.

    Raises:
        SafetensorsError: if the file is missing or damaged.
    """
    with _open(path) as file:
        header, start, _ = _read_header(path, file)
    return header, start


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        if path.exists() and not path.is_file():  # a named pipe would block
            raise SafetensorsError(f"{path}: is not a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise SafetensorsError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_header(path: Path, file: BinaryIO) -> tuple[Header, int, int]:
    """Return the entries, the offset of the data, and the size of the file."""
    check_fetched(path)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise _damaged(path, f"its header of {length} bytes does not fit in a file of {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    _check_entries(path, header, size - 8 - length)
    return header, 8 + length, size


def _check_entries(path: Path, header: Header, n_bytes: int) -> None:
    """Raise unless the tensors fill the data without gaps or overlaps."""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the entry of {name!r:.100} is {entry!r:.100}") from error
        if not isinstance(dtype, str) or dtype not in _BYTES:
            raise _damaged(path, f"tensor {name!r:.100} has the unknown dtype {dtype!r:.40}")
        numbers = [*shape, start, stop] if isinstance(shape, list) else [-1]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise _damaged(path, f"the entry of {name!r:.100} is {entry!r:.100}")
        if stop - start != math.prod(shape) * _BYTES[dtype]:
            raise _damaged(path, f"tensor {name!r:.100} of shape {shape!r:.80} has {stop - start} bytes")
        spans.append((start, stop))
    total = 0
    for start, stop in sorted(spans):
        if start != total:
            raise _damaged(path, f"its tensors overlap or leave a gap at byte {start} of their data")
        total = stop
    if total != n_bytes:
        raise _damaged(path, f"its tensors have {total} bytes, but the file holds {n_bytes}")


def _damaged(path: Path, problem: str) -> SafetensorsError:
    return SafetensorsError(f"{path}: is not a readable safetensors file: {problem}")


def _read_into(path: Path, file: BinaryIO, content: NDArray[np.uint8]) -> None:
    target = memoryview(content.data)
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise SafetensorsError(
                f"{path}: became shorter while it was being read; try again when nothing writes to it"
            )
        target = target[count:]


def _view(path: Path, data: Array, name: str, entry: dict[str, Any]) -> Array:
    if entry["dtype"] not in _DTYPES:
        raise SafetensorsError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}"
        )
    start, stop = entry["data_offsets"]
    return np.ndarray(
        entry["shape"], _DTYPES[entry["dtype"]], data[start:stop].tobytes() if start == stop else data[start:stop]
    )


_SAFE_TORCH: Final = (2, 6)
"""The first version whose ``weights_only`` holds (CVE-2025-32434)."""


def read_torch_bin(path: Path) -> dict[str, Array]:
    """Read all tensors of a ``.bin`` file written by ``torch.save``, without executing code from its pickle.

    Raises:
        MissingExtraError: if torch is not installed.
        SafetensorsError: if torch cannot load the file with ``weights_only``.
    """
    try:
        import torch  # noqa: PLC0415  (heavy, and only for these files)
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: a .bin file", "torch", "torch", "or save the adapter as safetensors"
        ) from error
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE_TORCH:
        raise SafetensorsError(f"{path}: torch {torch.__version__} can run code from a .bin file; install torch 2.6")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses to load
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
    """Whether an array holds floats; uint16 counts as bfloat16 bits."""
    return array.dtype.kind == "f" or array.dtype == np.uint16


def as_float32(array: Array) -> NDArray[np.float32]:
    """Convert an array to float32; uint16 values are bfloat16 bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def read_weights(folder: Path, stem: str) -> tuple[Path, dict[str, Array]]:
    """Read all tensors of ``stem.safetensors`` in a folder, of its shards, of ``stem.bin``, or of ``stem.npz``.

    Returns:
        The path of the file, for shards of their index ``stem.safetensors.index.json``, and the tensors by name.

    Raises:
        SafetensorsError: if there is no such file, it cannot be read, or a tensor holds no values.
    """
    path, tensors = _read_weights(folder, stem)
    check_gathered(path, {name: tensor.shape for name, tensor in tensors.items()})
    return path, tensors


def _read_weights(folder: Path, stem: str) -> tuple[Path, dict[str, Array]]:
    single, index, torch_bin = (folder / f"{stem}{end}" for end in (".safetensors", _INDEX, ".bin"))
    if single.is_file():
        return single, read_safetensors(single)
    if index.is_file():
        return index, _read_shards(index)
    if torch_bin.is_file():
        check_fetched(torch_bin)
        return torch_bin, read_torch_bin(torch_bin)
    if (npz := folder / f"{stem}.npz").is_file():
        check_fetched(npz)
        return npz, read_npz(npz)
    names = sorted(entry.name for entry in os.scandir(folder))
    found, others = ", ".join(names) or "nothing", [name for name in names if name.endswith(".safetensors")]
    hint = f"; if {others[0]} holds its weights, rename it to {single.name}" if len(others) == 1 else ""
    if any(re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.safetensors", name) for name in others):
        hint = f"; its shards need their index, {index.name}, which was not copied or not written"
    raise SafetensorsError(f"{folder}: holds neither {single.name} nor {torch_bin.name}; found: {found:.300}{hint}")


def _read_shards(index: Path) -> dict[str, Array]:
    """Return the tensors of all shards that an index names.

    Raises:
        SafetensorsError: if two shards hold different values for one name, or a tensor of the index is in none.
    """
    tensors: dict[str, Array] = {}
    origins: dict[str, str] = {}
    for shard in weight_files(index):
        for name, values in read_safetensors(shard).items():
            if name in tensors and not np.array_equal(tensors[name], values):
                raise SafetensorsError(
                    f"{index}: {origins[name]} and {shard.name} both hold {name!r}, with different values; they come "
                    "from two saves, so save the adapter again into an empty folder"
                )
            tensors[name], origins[name] = values, shard.name
    missing = [name for name in json.loads(read_small_text(index))["weight_map"] if name not in tensors]
    if missing:
        raise SafetensorsError(f"{index}: {len(missing)} tensors that it names are in no shard: {listed(missing, 3)}")
    return tensors


def check_gathered(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ``SafetensorsError`` if tensors hold no values, as DeepSpeed ZeRO-3 saves them if it does not gather them.

    Args:
        path: path of the file, for the message.
        shapes: shape of each tensor by name.
    """
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty and all(".experts." in name for name in empty):
        raise SafetensorsError(
            f"{path}: {len(empty)} of {len(shapes)} tensors hold no values ({listed(empty, 3)}). Tinker writes such "
            "tensors for a projection that experts do not have; take them out of the file if the other tensors of "
            "these experts are whole. If DeepSpeed ZeRO-3 wrote the file, save it again with "
            "stage3_gather_16bit_weights_on_model_save set to true, or use the zero_to_fp32.py that lies beside it"
        )
    if empty:
        raise SafetensorsError(
            f"{path}: {len(empty)} of {len(shapes)} tensors hold no values ({listed(empty, 3)}): DeepSpeed ZeRO-3 "
            "spreads weights over the processes and saved them before gathering; save again with "
            "stage3_gather_16bit_weights_on_model_save set to true, or make whole weights of the checkpoint with the "
            "zero_to_fp32.py that lies beside it"
        )


def weight_files(path: Path) -> list[Path]:
    """Return the paths of all shards if ``path`` is an index of shards, otherwise only ``path``.

    Raises:
        SafetensorsError: if the index cannot be read.
    """
    if not path.name.endswith(_INDEX):
        return [path]
    try:
        names = set(json.loads(read_small_text(path))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SafetensorsError(f"{path}: cannot be read as an index of shards: {error!r:.200}") from error
    if not all(_is_file_name(name) for name in names):
        raise SafetensorsError(f"{path}: names shards that are not in its directory")
    return [path.with_name(name) for name in sorted(names)]


def _is_file_name(name: object) -> bool:
    """Whether a file in the same directory can have this name."""
    if not isinstance(name, str) or not name or "\0" in name or Path(name).name != name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True
