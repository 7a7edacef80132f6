"""Plan a merge: which tensors change, in which quant type they are written, and the layout of the output file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from gguflora._version import __version__
from gguflora.adapters.adapter import Adapter
from gguflora.adapters.deltas import LowRank, Replace
from gguflora.architectures import with_biases
from gguflora.architectures.base_model import BaseModel, describe
from gguflora.architectures.mapping import can_untie
from gguflora.architectures.unruled import unknown_warning
from gguflora.errors import QuantizationError, UnsupportedAdapterError, listed
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Layout, Shape, TensorEntry, encode_entry
from gguflora.merging.output_types import OutputTypes
from gguflora.merging.presets import Preset
from gguflora.merging.rounding import RoundingOptions
from gguflora.merging.whole_file import Importance, plan_whole_file
from gguflora.placement.copies import describe_copies, without_copies
from gguflora.placement.place import (
    PlacedDelta,
    cautions,
    new_vocabulary,
    place,
)
from gguflora.placement.target import ChangedTensor, ScaledDelta
from gguflora.placement.vocabulary import TEMPLATE, compare_tokenizer, describe_changes
from gguflora.quants.types import TYPES, type_named

MERGED_NAMES: Final = "gguflora.merged.names"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge writes.

    Attributes:
        layout: layout of the output.
        targets: the tensors that are not just copied from the base.
        warnings: messages for the user.
        tokenizer: what the adapters' tokenizers change in the base's metadata, one text for each difference.
    """

    layout: Layout
    targets: Sequence[ChangedTensor]
    warnings: tuple[str, ...]
    tokenizer: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WholeFile:
    """The preset that gives every tensor of the output its type, and the importance matrix."""

    preset: Preset
    importance: Importance | None


_AS_BASE: Final = OutputTypes()


def make_plan(
    file: GgufFile,
    sources: Sequence[tuple[Adapter, float]],
    rounding: RoundingOptions,
    types: OutputTypes = _AS_BASE,
    *,
    from_unquantized: bool = False,
    trust_names: bool = False,
    whole: WholeFile | None = None,
) -> MergePlan:
    """Plan a merge.

    Args:
        file: the base.
        sources: adapters and their scales.
        rounding: rounding of the weights; it is recorded in the metadata.
        types: quant types of the changed tensors.
        from_unquantized: whether deltas are added to the base before quantization instead of the quantized base.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
        whole: the preset that the whole file is quantized in; ``types`` then has no say.

    Raises:
        GgufloraError: if adapters and base do not fit together, or a tensor cannot be written as asked.
    """
    model = replace(with_biases(describe(file, mmproj=True)), trust_names=trust_names)
    deltas: dict[str, list[ScaledDelta]] = {}
    unknown = unknown_warning(model)
    warnings = [] if unknown is None else [f"{file.path}: {unknown}"]
    for source, scale in sources:
        if source.invocation_tokens:
            raise UnsupportedAdapterError(
                f"{source.path}: is an activated LoRA, which does not change the base before its invocation tokens, so "
                "it cannot be merged; convert it and load it at run time"
            )
        everything = place(source, model)
        placed = without_copies(file, everything)
        told = (*source.warnings, *describe_copies(everything, placed), *cautions(file, placed))
        warnings += [f"{source.path}: {text}" for text in told]
        warnings += [f"{source.path}: its scale is 0: it changes nothing"] * (scale == 0)
        for name, placed_items in placed.items():
            effective = [(item, scale) for item in placed_items if scale and not _is_zero(item)]
            if effective:
                deltas.setdefault(name, []).extend(effective)
    untied = _untie(model, deltas) if model.is_tied else set()
    entries = _merge_record(file, sources, rounding)
    n_tokens = _find_new_vocabulary(file, deltas)
    metadata, tokenizer_warnings = _metadata_of_tokenizers(file, sources, n_tokens)
    warnings += tokenizer_warnings
    entries |= {key: encode_entry(key, value) for key, value in metadata.items()}
    fallbacks: dict[tuple[str, str, int], list[str]] = {}
    targets, only_floats = [], not any(tensor.type.block_weights > 1 for tensor in file.tensors.values())
    for name, items in deltas.items():
        entry = file.tensors.get(TOKEN_EMBEDDING if name in untied else name) or _missing_bias(name, model.shapes[name])
        grown = n_tokens and name in {TOKEN_EMBEDDING, OUTPUT}
        shape = (n_tokens, entry.n_in) if grown else entry.shape
        kind, instead_of = types.fitting_type_of(name, entry, only_floats=only_floats)
        if instead_of is not None:
            fallbacks.setdefault((instead_of.name, kind.name, entry.n_in), []).append(name)
        targets.append(ChangedTensor(name, entry, shape, kind, items))
    if whole is not None:
        return _plan_whole_file(file, targets, entries, whole, rounding, warnings, describe_changes(file, metadata))
    for target in targets:
        _check_type(file, target, rounding, from_unquantized=from_unquantized)
    warnings += [
        f"{_are(names)} {used} instead of {wanted}, as llama-quantize stores rows of {n_in} weights, which "
        f"are not whole blocks of {wanted}: {listed(names, 3)}"
        for (wanted, used, n_in), names in fallbacks.items()
    ]
    warnings += [f"--type {pattern}: matches no changed tensor" for pattern in types.unused_patterns(list(deltas))]
    layout = file.layout(entries, {target.name: (target.shape, target.type) for target in targets})
    return MergePlan(layout, targets, tuple(warnings), tuple(describe_changes(file, metadata)))


def _are(names: Sequence[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _plan_whole_file(
    file: GgufFile,
    targets: Sequence[ChangedTensor],
    entries: Mapping[str, bytes],
    whole: WholeFile,
    rounding: RoundingOptions,
    warnings: Sequence[str],
    tokenizer: Iterable[str],
) -> MergePlan:
    plan = plan_whole_file(file, whole.preset, whole.importance, targets, entries)
    for target in plan.targets:
        if target.type == target.source.type:  # the others are checked there
            _check_type(file, target, rounding, from_unquantized=False)
    return MergePlan(plan.layout, plan.targets, (*warnings, *plan.warnings), tuple(tokenizer))


def _metadata_of_tokenizers(
    file: GgufFile, sources: Sequence[tuple[Adapter, float]], n_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """Return what the adapters' tokenizers change in the metadata, and warnings about what cannot be carried over.

    Raises:
        UnsupportedAdapterError: if the tokenizers of two adapters differ in their tokens or special tokens.
    """
    metadata: dict[str, Any] = {}
    owners: dict[str, Adapter] = {}
    warnings = []
    for source, scale in sources:
        if not scale:
            continue
        found = compare_tokenizer(file, source, n_tokens)
        for key, value in found.changed.items():
            owner = owners.setdefault(key, source)
            if metadata.setdefault(key, value) == value:
                continue
            if not key.startswith(TEMPLATE):
                raise UnsupportedAdapterError(
                    f"{source.path.parent}: its tokenizer has another {key} than that of {owner.path.parent}; one "
                    "model cannot have both. Merge one of the adapters, or remove a tokenizer that does not matter"
                )
            warnings.append(f"{source.path.parent}: its {key} is dropped: {owner.path.parent} comes first")
        if found.another_kind:
            warnings.append(found.another_kind)
        if found.beyond:
            warnings.append(
                f"{source.path.parent}: its tokenizer has {len(found.beyond)} tokens past the rows of the embedding, "
                f"which the merged model does not know: {listed(found.beyond, 3)}"
            )
    return metadata, warnings


def _find_new_vocabulary(file: GgufFile, deltas: Mapping[str, Sequence[ScaledDelta]]) -> int:
    """Return the size of the adapters' vocabulary if it is larger than the base's, else 0."""
    names = [name for name in (TOKEN_EMBEDDING, OUTPUT) if name in deltas or name in file.tensors]
    rows = {
        name: new_vocabulary(item.delta for item, _ in deltas.get(name, ()) if item.tensor_slice.rows is None)
        for name in names
    }
    n_tokens = max(rows.values(), default=0)
    before = file.tensors[TOKEN_EMBEDDING].n_rows if TOKEN_EMBEDDING in file.tensors else n_tokens
    if n_tokens <= before:
        return 0
    for name, count in rows.items():
        if count < n_tokens:
            raise UnsupportedAdapterError(
                f"{file.path}: the adapter's vocabulary has {n_tokens} tokens, the base's {before}, but the "
                f"adapter has no {name!r} of that size; save it with save_embedding_layers=True"
            )
    return n_tokens


def _missing_bias(name: str, shape: Shape) -> TensorEntry:
    """Return the entry of a bias that the base does not have: zeros without stored bytes."""
    return TensorEntry(name, shape, type_named("F32"), 0, 0)


def _is_zero(item: PlacedDelta) -> bool:
    return isinstance(item.delta, LowRank) and item.delta.scaling == 0


def _untie(model: BaseModel, deltas: dict[str, list[ScaledDelta]]) -> set[str]:
    """Give a model with tied embeddings an output weight of its own if embedding and output change differently.

    The new output weight starts as a copy of the embedding. Its entry in ``deltas`` is removed if it is not needed.

    Returns:
        Names of the tensors that are copies of the embedding.
    """
    embedding, output = deltas.get(TOKEN_EMBEDDING, []), deltas.get(OUTPUT, [])
    if len(embedding) == len(output) and all(map(_is_same_delta, embedding, output)):
        deltas.pop(OUTPUT, None)
        return set()
    if not can_untie(model):
        raise UnsupportedAdapterError(
            f"{model.path}: its token embedding is also the output weight, and the adapters change them differently; "
            f"llama.cpp's {model.architecture} cannot have an output weight of its own"
        )
    deltas[OUTPUT] = output
    return {OUTPUT}


def _is_same_delta(one: ScaledDelta, other: ScaledDelta) -> bool:
    (a, scale_a), (b, scale_b) = (one[0].delta, one[1]), (other[0].delta, other[1])
    if isinstance(a, Replace) and isinstance(b, Replace) and a.shape == b.shape:
        return scale_a == scale_b and np.array_equal(a.values, b.values)
    return a is b and scale_a == scale_b


def _check_type(file: GgufFile, target: ChangedTensor, rounding: RoundingOptions, *, from_unquantized: bool) -> None:
    source, kind = target.source, target.type
    location = f"{file.path}: tensor {source.name!r}"
    if source.type.id not in TYPES:
        raise QuantizationError(f"{location} is {source.type.name}, which cannot be quantized again")
    if source.n_in % kind.block_weights:
        raise QuantizationError(
            f"{location} has rows of {source.n_in} weights, which cannot be stored as {kind.name} (a multiple of "
            f"{kind.block_weights} is needed); give it another type with --type {source.name}=Q8_0, for example"
        )
    is_stochastic = (
        kind == source.type and kind.supports_stochastic and rounding.mode == "adaptive" and not from_unquantized
    )
    importance = rounding.importance(target, 0) if len(target.shape) > 1 else None
    if kind.needs_imatrix and importance is None and not is_stochastic:
        raise QuantizationError(
            f"{location} would be {kind.name}, which cannot be quantized without an importance matrix; give one "
            "for this tensor with --imatrix, or another type with --outtype"
        )


def _merge_record(
    file: GgufFile, sources: Sequence[tuple[Adapter, float]], rounding: RoundingOptions
) -> dict[str, bytes]:
    """Return the metadata that records this merge, appended to the record of earlier merges."""
    earlier = len(file.metadata.get(MERGED_NAMES) or [])
    lists: dict[str, tuple[Any, list[Any]]] = {
        MERGED_NAMES: ("", [source.name for source, _ in sources]),
        "gguflora.merged.sha256": ("", [source.sha256 for source, _ in sources]),
        "gguflora.merged.scales": (1.0, [scale for _, scale in sources]),
        "gguflora.merged.rounding": ("nearest", [rounding.name] * len(sources)),
        "gguflora.merged.seeds": (0, [rounding.seed] * len(sources)),
    }
    record = {
        key: encode_entry(key, [*(file.metadata.get(key) or [missing] * earlier), *values])
        for key, (missing, values) in lists.items()
    }
    return {"gguflora.version": encode_entry("gguflora.version", __version__), **record}


def count_merges(file: GgufFile) -> int:
    """Return the number of adapters that were merged into the base before."""
    return len(file.metadata.get(MERGED_NAMES) or [])
