"""PEFT adapter to GGUF LoRA file: ``convert``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora import quants
from gguflora._native import type_named
from gguflora._version import __version__
from gguflora.adapters import Adapter, read_adapter
from gguflora.adapters.gguf_lora import ALPHA_KEY, INVOCATION_KEY
from gguflora.adapters.keys import some
from gguflora.architectures import ignored_at_run_time, unknown_warning
from gguflora.base_model import BaseModel, read_base
from gguflora.deltas import as_float64
from gguflora.errors import AdapterError, QuantizationError
from gguflora.factors import Factors, factor_adapter
from gguflora.files.gguf import TOKEN_EMBEDDING
from gguflora.files.output import atomic_output, check_target, path_of
from gguflora.files.safetensors import Array, as_float32

OUTTYPES: Final = ("auto", "f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did, or with ``dry_run`` would do.

    Attributes:
        output: the GGUF LoRA file.
        adapter: name of the adapter.
        architecture: of the base, as GGUF names it.
        tensors: number of base tensors that the adapter changes.
        ranks: smallest and largest rank.
        alpha: as written; 0 where the factors are folded into B.
        types: number of stored factors by quant type.
        size: of the tensors, in bytes.
        errors: relative error of each change that ``rank`` or ``energy`` approximates.
        warnings: what the user should know.
        dry_run: True if nothing was written.
    """

    output: Path
    adapter: str
    architecture: str
    tensors: int
    ranks: tuple[int, int]
    alpha: float
    types: dict[str, int]
    size: int
    errors: dict[str, float]
    warnings: tuple[str, ...]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of the output: bytes (..., row_bytes) of a quant type."""

    name: str
    type: str
    content: NDArray[np.uint8]


def convert(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    rank: int | None = None,
    energy: float | None = None,
    scale: float = 1.0,
    dry_run: bool = False,
    force: bool = False,
) -> ConvertReport:
    """Write an adapter as a GGUF LoRA file for llama.cpp.

    Args:
        adapter: PEFT directory, or a GGUF LoRA file to store again.
        base: GGUF file of the base model, or a directory with its ``config.json``. Its weights are read only for
            methods that need them.
        out: the file to write.
        outtype: ``f32``, ``f16``, ``bf16``, ``q8_0``, or ``auto``: f16 for each factor whose values it holds
            exactly, else f32.
        rank: approximate changes that are not of this rank or lower by the closest ones that are.
        energy: the same, with the lowest rank that keeps this share of each change's squared norm.
        scale: multiplies the adapter's change.
        dry_run: check everything, write nothing.
        force: overwrite ``out``.

    Raises:
        GgufloraError: if adapter and base cannot be read or do not fit together, or ``out`` cannot be written.
    """
    if outtype not in OUTTYPES:
        raise QuantizationError(f"outtype is {outtype!r}, expected one of {', '.join(OUTTYPES)}")
    target, source = Path(out), read_adapter(adapter)
    model = read_base(base)
    if not abs(float(scale)) <= float(np.finfo(np.float32).max):
        raise AdapterError(f"scale is {scale}, expected a finite number")
    factored = [
        replace(factors, factor=factors.factor * scale) for factors in factor_adapter(source, model, rank, energy)
    ]
    alpha = common_alpha(factored)
    stored = [item for factors in factored for item in _store(factors, outtype, alpha)]
    size = sum(item.content.nbytes for item in stored)
    check_target(target, [source.path, Path(base)], force=force or dry_run, size=size)
    if not dry_run:
        with atomic_output(target) as file:
            _write(path_of(file), source, model.architecture, alpha, stored)
    ranks = [factors.rank for factors in factored]
    types = [item.type for item in stored]
    return ConvertReport(
        output=target,
        adapter=source.name,
        architecture=model.architecture,
        tensors=len(factored),
        ranks=(min(ranks), max(ranks)),
        alpha=alpha,
        types={name: types.count(name) for name in dict.fromkeys(types)},
        size=size,
        errors={factors.tensor: factors.error for factors in factored if factors.error is not None},
        warnings=(
            *source.warnings,
            *_cautions(factored),
            *_about_architecture(model, factored),
            *_warnings(outtype, stored),
        ),
        dry_run=dry_run,
    )


def common_alpha(factored: Sequence[Factors]) -> float:
    """The alpha with ``factor = alpha / rank`` for every tensor, or 0 if there is none.

    llama.cpp has one alpha for a file, a 32-bit float, and takes 0 as "factor 1".
    """
    alphas = [float(np.float32(factors.factor * factors.rank)) for factors in factored]
    return alphas[0] if all(math.isclose(alpha, alphas[0], rel_tol=2**-23) for alpha in alphas) else 0.0


def _store(factors: Factors, outtype: str, alpha: float) -> list[_Stored]:
    a, b = factors.a, factors.b
    if not alpha and factors.factor != 1.0:
        b = (as_float64(b) * factors.factor).astype(np.float32)
    if factors.tensor == TOKEN_EMBEDDING:
        # llama.cpp looks rows up in A and multiplies them with B: the factors change places
        a, b = b, a.T
    return [_encode(f"{factors.tensor}.lora_a", a, outtype), _encode(f"{factors.tensor}.lora_b", b, outtype)]


def _encode(name: str, array: Array, outtype: str) -> _Stored:
    values = np.ascontiguousarray(as_float32(array))
    chosen = _exact_type(values) if outtype == "auto" else outtype.upper()
    if values.shape[-1] % type_named(chosen).block_weights:
        chosen = "F16"
    try:
        content = quants.quantize(values, type_named(chosen).id).view(np.uint8)
    except QuantizationError as error:
        raise QuantizationError(f"{name!r} cannot be stored as {chosen}: {error}; try --outtype f32") from error
    return _Stored(name, chosen, content)


def _exact_type(values: NDArray[np.float32]) -> str:
    # not BF16: with such factors llama.cpp rounds the activations to eight bits, too
    with np.errstate(over="ignore"):
        return "F16" if (values.astype(np.float16) == values).all() else "F32"


def _cautions(factored: Sequence[Factors]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for factors in factored for text in factors.cautions))


def _about_architecture(model: BaseModel, factored: Sequence[Factors]) -> list[str]:
    unknown = unknown_warning(model)
    ignored: dict[str, list[str]] = {}
    for factors in factored:
        reason = ignored_at_run_time(model, factors.tensor)
        if reason:
            ignored.setdefault(reason, []).append(factors.tensor)
    return [f"{model.path}: {unknown}"] * (unknown is not None) + [
        f"{len(names)} of {len(factored)} changes will be ignored at run time: {reason} ({some(names)}); "
        "merge the adapter instead"
        for reason, names in ignored.items()
    ]


def _warnings(outtype: str, stored: list[_Stored]) -> tuple[str, ...]:
    odd = [item.name for item in stored if outtype == "q8_0" and item.type != "Q8_0"]
    if not odd:
        return ()
    return (
        f"{len(odd)} of {len(stored)} factors have rows that Q8_0's blocks of 32 do not divide; they are stored as F16",
    )


def _write(path: Path, source: Adapter, architecture: str, alpha: float, stored: list[_Stored]) -> None:
    import gguf  # noqa: PLC0415  (slow to import)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(source.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(ALPHA_KEY, alpha)
    if source.invocation_tokens:
        tokens = list(source.invocation_tokens)
        writer.add_key_value(INVOCATION_KEY, tokens, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    writer.add_string("gguflora.version", __version__)
    writer.add_string("gguflora.source", source.path.name)
    writer.add_string("gguflora.source.sha256", source.sha256)
    if any(item.type == "Q8_0" for item in stored):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for item in stored:
        kind, content = gguf.GGMLQuantizationType[item.type], item.content
        writer.add_tensor_info(item.name, content.shape, content.dtype, content.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    # GGUFWriter writes data with ndarray.tofile, which does not notice a disk that is full
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % writer.data_alignment))
        for item in stored:
            file.write(item.content.data)
            file.write(bytes(-item.content.nbytes % writer.data_alignment))
