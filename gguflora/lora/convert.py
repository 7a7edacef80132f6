"""``convert``: write a PEFT adapter as a GGUF LoRA file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gguflora.adapters.adapter import Adapter, read_adapter
from gguflora.architectures import ignored_at_run_time
from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.architectures.unruled import unknown_warning
from gguflora.errors import AdapterError, listed
from gguflora.files.atomic import atomic_output
from gguflora.files.gguf import GgufFile
from gguflora.files.output_checks import check_target
from gguflora.files.remote import remote_inputs
from gguflora.lora.factors import Factors, factor_adapter
from gguflora.lora.gguf_writer import (
    LoraHeader,
    check_outtype,
    common_alpha,
    encode_factors,
    write_lora,
)
from gguflora.placement.language_part import language_part
from gguflora.placement.vocabulary import compare_tokenizer, describe_changes
from gguflora.system.nameless import path_of


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did, or would do with ``dry_run``.

    Attributes:
        output: path of the GGUF LoRA file.
        adapter: name of the adapter.
        architecture: GGUF name of the base's architecture.
        tensors: number of base tensors that the adapter changes.
        ranks: smallest and largest rank of the factors.
        alpha: the file's alpha; 0 if the scaling is folded into B.
        types: number of factors stored as each quant type.
        size: bytes of the tensors.
        errors: relative error of each delta that ``rank`` or ``energy`` approximates, by tensor.
        warnings: messages for the user.
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
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(adapter="adapter", base="config")
def convert(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    rank: int | None = None,
    energy: float | None = None,
    scale: float = 1.0,
    text_only: bool = False,
    trust_names: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> ConvertReport:
    """Write an adapter as a GGUF LoRA file for llama.cpp.

    Args:
        adapter: PEFT directory, or a GGUF LoRA file to store again.
        base: GGUF file of the base model, or a directory with its ``config.json``. Its weights are read only for
            methods that need them.
        out: the file to write.
        outtype: type of the factors: ``f32``, ``f16``, ``bf16``, ``q8_0``, or ``auto``, which stores a factor as f16
            if that is exact, else as f32.
        rank: approximate each delta of a higher rank by the closest delta of this rank.
        energy: approximate each delta with the lowest rank that keeps this share of its squared norm.
        scale: multiplies the adapter's deltas.
        text_only: take only the part of a multimodal model's adapter that changes the language model.
        trust_names: apply the adapter by name and shape where the order of a tensor's rows is not known.
        dry_run: check everything but write nothing.
        force: overwrite ``out``.

    Raises:
        GgufloraError: if adapter and base cannot be read or do not fit together, or ``out`` cannot be written.
    """
    check_outtype(outtype)
    target, source = Path(out), read_adapter(adapter)
    source = language_part(source) if text_only else source
    model = read_base(base, trust_names=trust_names)
    if not abs(float(scale)) <= float(np.finfo(np.float32).max):
        raise AdapterError(f"scale is {scale}, expected a finite number")
    factored = [
        replace(factors, scaling=factors.scaling * scale) for factors in factor_adapter(source, model, rank, energy)
    ]
    alpha = common_alpha(factored)
    stored = [item for factors in factored for item in encode_factors(factors, outtype, alpha)]
    size = sum(item.content.nbytes for item in stored)
    check_target(target, [source.path, Path(base)], force=force or dry_run, size=size)
    if not dry_run:
        with atomic_output(target, force=force) as file:
            made_from = {"source": source.path.name, "source.sha256": source.sha256}
            header = LoraHeader(source.name, model.architecture, alpha, made_from, source.invocation_tokens)
            write_lora(path_of(file), header, stored)
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
            *(["the scale is 0: the file changes nothing"] if scale == 0 else []),
            *_collect_cautions(factored),
            *tokenizer_warnings(source, base),
            *architecture_warnings(model, [factors.tensor for factors in factored]),
            *type_warnings(outtype, types),
        ),
        dry_run=dry_run,
    )


def _collect_cautions(factored: Sequence[Factors]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for factors in factored for text in factors.cautions))


def tokenizer_warnings(adapter: Adapter, base: str | os.PathLike[str]) -> list[str]:
    """Return a warning that names how the adapter's tokenizer differs from the base's; a GGUF LoRA cannot hold it."""
    if Path(base).is_dir():
        return []
    with GgufFile(base) as file:
        try:
            found = compare_tokenizer(file, adapter)
        except AdapterError as error:  # the LoRA holds no tokenizer, so it can be written
            return [f"the adapter's tokenizer was not compared with the base's: {error}"]
        differences = describe_changes(file, found.changed)
    if found.beyond:
        differences.append(f"{len(found.beyond)} tokens past the rows of the embedding ({listed(found.beyond, 3)})")
    told = [found.another_kind] if found.another_kind else []
    if not differences:
        return told
    return [
        *told,
        f"{adapter.path.parent}: its tokenizer differs from the base's, and a GGUF LoRA cannot hold that: "
        f"{'; '.join(differences)}. The base's is used at run time; merge the adapter to carry the differences over",
    ]


def architecture_warnings(model: BaseModel, tensors: Sequence[str]) -> list[str]:
    """Return warnings about deltas of tensors that llama.cpp would not apply."""
    unknown = unknown_warning(model)
    ignored: dict[str, list[str]] = {}
    for tensor in tensors:
        reason = ignored_at_run_time(model, tensor)
        if reason:
            ignored.setdefault(reason, []).append(tensor)
    return [f"{model.path}: {unknown}"] * (unknown is not None) + [
        f"{len(names)} of {len(tensors)} changes will be ignored at run time: {reason} ({listed(names)}); "
        "merge the adapter instead"
        for reason, names in ignored.items()
    ]


def type_warnings(outtype: str, types: Sequence[str]) -> tuple[str, ...]:
    """Return warnings about factors, given their types, that could not be stored as ``outtype``."""
    odd = [kind for kind in types if outtype == "q8_0" and kind != "Q8_0"]
    if not odd:
        return ()
    return (
        f"{len(odd)} of {len(types)} factors are stored as F16, because Q8_0 needs rows of a multiple of 32 values",
    )
