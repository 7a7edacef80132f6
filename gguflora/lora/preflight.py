"""Check that llama.cpp can load a GGUF LoRA onto a base and decode with it.

llama.cpp reports some faults itself, silently ignores others, and aborts the whole process on the rest (an assertion
when loading or at the first decode). The rules come from llama.cpp's ``llama-adapter.cpp``, ``llama-graph.cpp`` and
``gguf.cpp``. The checks read headers only, except that all values must be finite.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gguflora.adapters.gguf_lora import is_norm
from gguflora.architectures import aborts_at_run_time, ignored_at_run_time
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import HotSwapError
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, Shape, TensorEntry
from gguflora.placement.base_weights import read_values

_ALPHA: Final = "adapter.lora.alpha"
_INVOCATION: Final = "adapter.alora.invocation_tokens"
_UINT32, _FLOAT32, _ARRAY = 4, 6, 9  # GGUF value types
_SUFFIXES: Final = (".lora_a", ".lora_b")
_NOT_MULTIPLIED: Final = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
"""Types that ggml can store but not multiply: it would call a null pointer."""

_EXPONENT: Final[dict[str, tuple[str, int]]] = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""NumPy type of the bits of each float type, and its exponent mask, which is all ones in infinity and NaN."""

_IGNORED_NORM: Final = "differs from the base's norm; llama.cpp would silently ignore it: merge the adapter instead"

_CHUNK_BYTES: Final = 1 << 22


def check_loadable(path: Path, base: BaseModel) -> None:
    """Raise an error unless llama.cpp can load the GGUF LoRA at ``path`` onto ``base`` and apply all of it.

    Raises:
        GgufError: if the file is damaged.
        HotSwapError: if the file is not a LoRA or does not fit, or llama.cpp would abort on it or ignore a part of it.
    """
    with GgufFile(path) as file:
        _check_metadata(file, base)
        pairs = _pair_up(file)
        for name, (a, b) in pairs.items():
            _check_pair(f"{path}: {name!r}", name, a, b, base)
        for name, problem in _norm_problems(file, base).items():
            raise HotSwapError(f"{path}: {name!r}: {problem}")
        for tensor in file.tensors.values():
            _check_finite(file, tensor)


def problems_of(path: Path, base: BaseModel) -> dict[str, str]:
    """Return the error message of `check_loadable` for each faulty tensor, by name of the base's tensor.

    Raises:
        GgufError: if the file is damaged.
        HotSwapError: if the file is not a LoRA or is for another architecture.
    """
    problems: dict[str, str] = {}
    with GgufFile(path) as file:
        _check_metadata(file, base)
        problems |= _norm_problems(file, base)
        for name, (a, b) in _pair_up(file).items():
            location = f"{path}: {name!r}"
            try:
                _check_pair(location, name, a, b, base)
                _check_finite(file, a)
                _check_finite(file, b)
            except HotSwapError as error:
                problems[name] = str(error).removeprefix(f"{location}: ")
    return problems


def _check_metadata(file: GgufFile, base: BaseModel) -> None:
    metadata = file.metadata
    kind, adapter_type = metadata.get("general.type"), metadata.get("adapter.type")
    if kind != "adapter" or adapter_type != "lora":
        raise HotSwapError(
            f"{file.path}: general.type is {kind!r} and adapter.type {adapter_type!r}, expected 'adapter' and 'lora': "
            "this GGUF file is not a LoRA adapter"
        )
    architecture = metadata.get("general.architecture")
    if architecture != base.architecture:
        raise HotSwapError(
            f"{file.path}: is an adapter for the architecture {architecture!r}, but the base {base.path} "
            f"is {base.architecture!r}; load it on the base it was trained on"
        )
    if "" in metadata:
        raise HotSwapError(f"{file.path}: has a metadata entry without a key; write the file again")
    if _ALPHA in metadata and not _is_finite_float32(metadata.raw(_ALPHA), _ALPHA):
        raise HotSwapError(f"{file.path}: {_ALPHA} is {metadata[_ALPHA]!r}, expected a finite number stored as FLOAT32")
    if _INVOCATION in metadata and not _is_token_array(metadata.raw(_INVOCATION), _INVOCATION):
        raise HotSwapError(
            f"{file.path}: {_INVOCATION} is {metadata[_INVOCATION]!r:.100}, expected tokens in an array of UINT32"
        )


def _is_finite_float32(entry: bytes, key: str) -> bool:
    """Whether a raw metadata entry (length, key, type, value) holds a finite FLOAT32."""
    type_offset = 8 + len(key.encode())
    kind, *rest = struct.unpack_from("<I", entry, type_offset)
    return kind == _FLOAT32 and not rest and math.isfinite(struct.unpack_from("<f", entry, type_offset + 4)[0])


def _is_token_array(entry: bytes, key: str) -> bool:
    """Whether a raw metadata entry (length, key, type, values) is a non-empty array of UINT32."""
    type_offset = 8 + len(key.encode())
    (kind,) = struct.unpack_from("<I", entry, type_offset)
    if kind != _ARRAY:
        return False
    element, count = struct.unpack_from("<IQ", entry, type_offset + 4)
    return bool(element == _UINT32 and count > 0)


def _pair_up(file: GgufFile) -> Mapping[str, tuple[TensorEntry, TensorEntry]]:
    factors = [name for name, tensor in file.tensors.items() if not is_norm(tensor)]
    unknown_tensors = [name for name in factors if not name.endswith(_SUFFIXES)]
    if unknown_tensors:
        raise HotSwapError(
            f"{file.path}: tensor {unknown_tensors[0]!r} is neither .lora_a nor .lora_b"
            + (f", nor are {len(unknown_tensors) - 1} others" if unknown_tensors[1:] else "")
            + "; llama.cpp would refuse or silently ignore it: merge the adapter into the base instead"
        )
    pairs = {}
    for name in dict.fromkeys(name[: -len(".lora_a")] for name in factors):
        a, b = file.tensors.get(f"{name}.lora_a"), file.tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            missing = ".lora_a" if a is None else ".lora_b"
            raise HotSwapError(f"{file.path}: {name!r} has no {missing}; the adapter is incomplete")
        pairs[name] = (a, b)
    if not pairs:
        raise HotSwapError(f"{file.path}: holds no LoRA tensors")
    return pairs


def _norm_problems(file: GgufFile, base: BaseModel) -> dict[str, str]:
    """Return a message for each norm that differs from the base's: llama.cpp loads it, but ignores it."""
    norms = [tensor for tensor in file.tensors.values() if is_norm(tensor)]
    if not norms or base.path.is_dir():
        return {tensor.name: _IGNORED_NORM for tensor in norms}
    with GgufFile(base.path) as model:
        return {tensor.name: _IGNORED_NORM for tensor in norms if not _is_norm_of(model, file, tensor)}


def _is_norm_of(model: GgufFile, file: GgufFile, tensor: TensorEntry) -> bool:
    own = model.tensors.get(tensor.name)
    if own is None or own.shape != tensor.shape:
        return False
    stored, given = read_values(model, own, 0, 1), read_values(file, tensor, 0, 1)
    return bool((abs(given - stored) <= 2.0**-23 * abs(stored)).all())


def _check_pair(location: str, name: str, a: TensorEntry, b: TensorEntry, base: BaseModel) -> None:
    if name == TOKEN_EMBEDDING and base.is_tied:
        raise HotSwapError(
            f"{location}: the base {base.path} has no output.weight, its token embedding serves as both, and llama.cpp "
            "aborts on a LoRA of such an embedding; merge the adapter into the base instead"
        )
    weight = base.shapes.get(name)
    if weight is None:
        hint = "merge the adapter instead" if name == "output.weight" else "was it made for another model?"
        raise HotSwapError(f"{location}: the base {base.path} has no such tensor; {hint}")
    if len(weight) < 2:
        raise HotSwapError(
            f"{location}: is a vector in the base; llama.cpp would silently ignore this LoRA: merge it instead"
        )
    ignored = ignored_at_run_time(base, name)
    aborts = aborts_at_run_time(base, name)
    if ignored or aborts:
        raise HotSwapError(f"{location}: {ignored or aborts}; merge the adapter into the base instead")
    for part in (a, b):
        if part.type.name in _NOT_MULTIPLIED:
            raise HotSwapError(
                f"{location}: {part.name!r} is stored as {part.type.name}; llama.cpp cannot multiply with that type"
            )
    _check_shapes(location, name, weight, a.shape, b.shape)


def _check_shapes(location: str, name: str, weight: Shape, a: Shape, b: Shape) -> None:
    stack, n_out, n_in = _as_stack(weight)
    rank = b[-1]
    if name.endswith("token_embd.weight"):  # llama.cpp looks up rows of A, so the factors are swapped
        expected_a, expected_b = (*stack, n_out, rank), (*stack, n_in, rank)
    else:
        expected_a, expected_b = (*stack, rank, n_in), (*stack, n_out, rank)
    for part, found, expected in ((".lora_a", a, expected_a), (".lora_b", b, expected_b)):
        leading, rows, columns = _as_stack(found)
        if (*leading, rows, columns) != expected:
            raise HotSwapError(
                f"{location}: {part} has shape {found}, expected {_format_shape(expected)} to fit the base's {weight} "
                f"at rank {rank}; was it made for another model?"
            )


def _as_stack(shape: Shape) -> tuple[Shape, int, int]:
    """Return two leading dimensions, rows and columns; GGUF writers may drop leading dimensions of 1."""
    padded = (1,) * (4 - len(shape)) + shape
    return padded[:2], padded[2], padded[3]


def _format_shape(shape: Shape) -> str:
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return str(shape)


def _check_finite(file: GgufFile, tensor: TensorEntry) -> None:
    if tensor.type.name not in _EXPONENT:
        return
    dtype, exponent = _EXPONENT[tensor.type.name]
    rows_at_once = max(1, _CHUNK_BYTES // (tensor.nbytes // tensor.n_rows))
    for first in range(0, tensor.n_rows, rows_at_once):
        bits = file.read_rows(tensor, first, min(first + rows_at_once, tensor.n_rows)).view(dtype)
        if ((bits & exponent) == exponent).any():
            raise HotSwapError(f"{file.path}: tensor {tensor.name!r} holds NaN or infinity; its training has diverged")
