"""Write a factored adapter as a GGUF LoRA file if the name ends with ``.gguf``, else as a PEFT directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.deltas import LowRank
from gguflora.adapters.peft.config import FILE_NAME
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import AdapterError
from gguflora.files.atomic import atomic_folder, atomic_output
from gguflora.files.output_checks import ADAPTER_WEIGHTS, check_folder_target, check_target
from gguflora.lora.convert import architecture_warnings, type_warnings
from gguflora.lora.factored import ComputedPairs, FactoredAdapter, for_base, split_expert, stack_dims, stacked
from gguflora.lora.gguf_writer import (
    LoraHeader,
    LoraWriter,
    as_stored,
    check_finite,
    check_outtype,
    common_alpha,
    encode_factors,
)
from gguflora.lora.peft_writer import write_peft_adapter
from gguflora.lora.to_hf import for_model
from gguflora.lora.uncut import UncutAdapter, on_base, on_model
from gguflora.system.nameless import path_of

GGUF_SUFFIX: Final = ".gguf"


@dataclass(frozen=True, slots=True)
class Written:
    """Summary of a written adapter.

    Attributes:
        output: path of the GGUF LoRA file or PEFT directory.
        tensors: number of changed tensors or modules.
        ranks: smallest and largest rank of the factors.
        size: bytes of the factors.
        warnings: messages for the user.
    """

    output: Path
    tensors: int
    ranks: tuple[int, int]
    size: int
    warnings: tuple[str, ...]


def is_gguf(out: Path) -> bool:
    """Whether the name asks for a GGUF LoRA file."""
    return out.suffix == GGUF_SUFFIX


def check_output(out: Path, inputs: Sequence[Path], *, outtype: str, force: bool) -> None:
    """Check that ``out`` can be written, before any work is done.

    Raises:
        OutputError: if it cannot be written.
        QuantizationError: for an unknown type.
    """
    check_outtype(outtype)
    if is_gguf(out):
        check_target(out, inputs, force=force, size=0)
    else:
        check_folder_target(out, inputs, marker=FILE_NAME, force=force)


def for_output(adapter: UncutAdapter, base: BaseModel | None, out: Path) -> UncutAdapter:
    """Bring an adapter to the names of the output: GGUF tensors for a GGUF file, modules for a PEFT directory.

    Raises:
        GgufloraError: if adapter and base do not fit.
    """
    if base is None:
        return adapter
    return on_base(adapter, base) if is_gguf(out) else on_model(adapter, base)


def rounding(name: str, out: Path, outtype: str) -> Callable[[LowRank], LowRank] | None:
    """Return the function that rounds a delta's factors as the output holds them; None if it holds them exactly."""
    if not is_gguf(out) or outtype in {"auto", "f32"}:
        return None
    tensor, _ = split_expert(name)
    return lambda delta: as_stored(tensor, delta, outtype)


def write_adapter(
    adapter: FactoredAdapter, out: Path, base: BaseModel | None, outtype: str, source: Mapping[str, str]
) -> Written:
    """Write an adapter in the format that the name of ``out`` asks for.

    Args:
        adapter: the adapter to write.
        out: file or directory to write; call `check_output` first.
        base: base model; needed if the adapter's names are those of the other format.
        outtype: type of the factors in a GGUF file.
        source: how the adapter was made, for the metadata of a GGUF file.

    Raises:
        AdapterError: if a base is needed and not given.
        GgufloraError: if adapter and base do not fit, or ``out`` cannot be written.
    """
    if base is None and is_gguf(out) == (adapter.architecture is None):
        task = "GGUF LoRA from weights of a Hugging Face model" if is_gguf(out) else "PEFT directory from GGUF tensors"
        raise AdapterError(f"{out}: to make a {task}, give the base model with --base")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error of the writers
        if not is_gguf(out):
            return _write_peft(adapter if base is None else for_model(adapter, base), out)
        placed = adapter if base is None else for_base(adapter, base)
        notes = [] if base is None else architecture_warnings(base, list(stack_dims(placed.pairs)))
        return _write_gguf(replace(placed, warnings=(*placed.warnings, *notes)), out, outtype, source)


def _write_peft(adapter: FactoredAdapter, out: Path) -> Written:
    with atomic_folder(out, marker=FILE_NAME, stale=ADAPTER_WEIGHTS) as folder:
        summary = write_peft_adapter(folder, adapter)
    ranks = summary.ranks
    return Written(out, len(adapter.pairs), (min(ranks), max(ranks)), summary.size, adapter.warnings)


def _write_gguf(adapter: FactoredAdapter, out: Path, outtype: str, source: Mapping[str, str]) -> Written:
    is_computed = isinstance(adapter.pairs, ComputedPairs)
    alpha = 1.0 if is_computed else common_alpha(list(stacked(adapter.pairs)))
    header = LoraHeader(adapter.name, str(adapter.architecture), alpha, source, adapter.invocation_tokens)
    dims = {f"{name}.lora_{part}": n for name, n in stack_dims(adapter.pairs).items() for part in "ab"}
    ranks, types, size = [], [], 0
    with atomic_output(out) as file, LoraWriter(path_of(file), header, dims, quantized=outtype == "q8_0") as writer:
        for factors in stacked(adapter.pairs):
            check_finite(factors.tensor, factors.a)
            check_finite(factors.tensor, factors.b)
            for item in encode_factors(factors, outtype, alpha):
                writer.add(item)
                types.append(item.type)
                size += item.content.nbytes
            ranks.append(factors.rank)
        if is_computed:  # the scaling is 1
            writer.alpha = float(ranks[0]) if len(set(ranks)) == 1 else 0.0
    warnings = (*adapter.warnings, *type_warnings(outtype, types))
    return Written(out, len(ranks), (min(ranks), max(ranks)), size, warnings)
