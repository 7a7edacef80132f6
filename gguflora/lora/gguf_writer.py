"""Write GGUF LoRA files. `adapters.gguf_lora` reads them and documents their layout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from gguflora import quants
from gguflora._version import __version__
from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.adapters.gguf_lora import ALPHA_KEY, INVOCATION_KEY
from gguflora.errors import AdapterError, QuantizationError
from gguflora.files.gguf import TOKEN_EMBEDDING
from gguflora.files.gguf_header import valid_text
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factors import Factors
from gguflora.quants.types import type_named

_FLOATS: Final[dict[str, type[np.generic]]] = {"F32": np.float32, "F16": np.float16}
_CHECKED: Final = 1 << 14
"""Values that are compared at once; most adapters in float32 differ from F16 among the first ones."""
_ALIGNMENT: Final = 32
"""GGUF's default; a file that says nothing else has it."""
OUTTYPES: Final = ("auto", "f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the file: its name, quant type and bytes (..., row_bytes)."""

    name: str
    type: str
    content: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """The metadata of a GGUF LoRA file.

    Attributes:
        name: name of the adapter.
        architecture: GGUF name of the base's architecture.
        alpha: alpha of all tensors; 0 if the scaling is folded into B.
        source: values of ``gguflora.<key>`` metadata that say how the file was made.
        invocation_tokens: tokens that activate an aLoRA; empty for other adapters.
    """

    name: str
    architecture: str
    alpha: float
    source: Mapping[str, str]
    invocation_tokens: tuple[int, ...] = ()


def check_outtype(outtype: str) -> None:
    """Raise ``QuantizationError`` unless factors can be stored as this type."""
    if outtype not in OUTTYPES:
        raise QuantizationError(f"outtype is {outtype!r}, expected one of {', '.join(OUTTYPES)}")


def common_alpha(factored: Sequence[Factors]) -> float:
    """Return the alpha with ``scaling = alpha / rank`` for every tensor, or 0 if there is none.

    llama.cpp reads one float32 alpha per file and takes alpha 0 as scaling 1.
    """
    alphas = [float(np.float32(factors.scaling * factors.rank)) for factors in factored]
    return alphas[0] if all(math.isclose(alpha, alphas[0], rel_tol=2**-23) for alpha in alphas) else 0.0


def encode_factors(factors: Factors, outtype: str, alpha: float) -> list[Stored]:
    """Encode a pair of factors as the two tensors of a file with this alpha.

    Raises:
        QuantizationError: if a value is too large for the type.
    """
    a, b = factors.a, factors.b
    if not alpha and factors.scaling != 1.0:
        b = (as_float64(b) * factors.scaling).astype(np.float32)
    if factors.tensor == TOKEN_EMBEDDING:
        # llama.cpp looks up rows of A and multiplies them by B, so the factors are swapped
        a, b = b, a.T
    return [_encode(f"{factors.tensor}.lora_a", a, outtype), _encode(f"{factors.tensor}.lora_b", b, outtype)]


def check_finite(name: str, values: Array) -> None:
    """Raise ``AdapterError`` if a factor holds infinity or NaN."""
    numbers = as_float32(values)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(numbers.sum()) and not np.isfinite(numbers).all():
            raise AdapterError(f"the factors of {name} are too large for float32; use smaller weights")


def as_stored(name: str, delta: LowRank, outtype: str) -> LowRank:
    """Return a delta of a tensor with its factors rounded as a GGUF file of type ``outtype`` holds them."""
    a, b = (
        quants.dequantize(item.content.view(_FLOATS.get(item.type, np.uint8)), item.type)
        for item in encode_factors(Factors(name, delta.a, delta.b, delta.scaling), outtype, 1.0)
    )
    if name == TOKEN_EMBEDDING:
        a, b = b.T, a
    return LowRank(a, b, delta.scaling)


def _encode(name: str, array: Array, outtype: str) -> Stored:
    values = np.ascontiguousarray(as_float32(array))
    chosen = exact_type(values) if outtype == "auto" else outtype.upper()
    if values.shape[-1] % type_named(chosen).block_weights:
        chosen = "F16"
    try:
        content = quants.quantize(values, type_named(chosen).id).view(np.uint8)
    except QuantizationError as error:
        raise QuantizationError(f"{name!r} cannot be stored as {chosen}: {error}; try --outtype f32") from error
    return Stored(name, chosen, content)


def exact_type(values: NDArray[np.float32]) -> str:
    """Return "F16" if it holds the values exactly, else "F32"."""
    # not BF16: with BF16 factors llama.cpp also rounds the activations to eight significant bits
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        parts = (flat[start : start + _CHECKED] for start in range(0, flat.size, _CHECKED))
        return "F16" if all((part.astype(np.float16) == part).all() for part in parts) else "F32"


def write_lora(path: Path, header: LoraHeader, stored: Sequence[Stored]) -> None:
    """Write a GGUF LoRA file.

    Raises:
        OSError: if the file cannot be written.
    """
    dims = {item.name: item.content.ndim for item in stored}
    with LoraWriter(path, header, dims, quantized=any(item.type == "Q8_0" for item in stored)) as writer:
        for item in stored:
            writer.add(item)


class LoraWriter:
    """Writes a GGUF LoRA file tensor by tensor, so that a large file needs no memory of its size.

    Args:
        path: the file.
        header: its metadata; `alpha` may be set until the writer is left.
        dims: number of dimensions of each tensor, in the order in which they will be added.
        quantized: whether a tensor may be of a quant type.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, header: LoraHeader, dims: Mapping[str, int], *, quantized: bool) -> None:
        self._path, self._header, self._dims, self._quantized = path, header, dims, quantized
        self._infos: list[tuple[str, str, tuple[int, ...], int]] = []
        self.alpha = header.alpha

    def __enter__(self) -> Self:
        guessed = [(name, "F32", (4,) * n_dims, 4) for name, n_dims in self._dims.items()]
        self._room = len(self._render(guessed))
        self._file = self._path.open("wb")
        self._file.seek(self._room)
        return self

    def add(self, item: Stored) -> None:
        """Write one tensor."""
        self._infos.append((item.name, item.type, item.content.shape, item.content.nbytes))
        self._file.write(item.content.data)
        self._file.write(bytes(-item.content.nbytes % _ALIGNMENT))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                header = self._render(self._infos)
                assert len(header) == self._room
                self._file.seek(0)
                self._file.write(header)

    def _render(self, infos: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
        """Return all bytes before the data."""
        import gguf  # noqa: PLC0415  (slow to import)

        header = self._header
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            writer = gguf.GGUFWriter(path, header.architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(valid_text(header.name))
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(ALPHA_KEY, self.alpha)
            if header.invocation_tokens:
                tokens = list(header.invocation_tokens)
                writer.add_key_value(INVOCATION_KEY, tokens, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
            writer.add_string("gguflora.version", __version__)
            for key, value in header.source.items():
                writer.add_string(f"gguflora.{key}", valid_text(value))
            if self._quantized:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for name, kind, shape, size in infos:
                writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=gguf.GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            rendered = path.read_bytes()
        return rendered + bytes(-len(rendered) % _ALIGNMENT)
