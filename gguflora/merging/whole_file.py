"""Plan a file in which every tensor gets the type of a preset: types, metadata and layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.errors import QuantizationError, listed
from gguflora.files.gguf import GgufFile, Layout, encode_entry
from gguflora.files.gguf_rewritten import rewritten_layout
from gguflora.merging.imatrix import ImatrixOrigin, importance_of, read_imatrix, read_origin
from gguflora.merging.mixture import Form, ModelFacts, ggml_shape, in_order, is_quantized, mixture, needs_imatrix
from gguflora.merging.presets import Preset
from gguflora.placement.target import ChangedTensor
from gguflora.quants.arrays import Float32Array
from gguflora.quants.types import TYPES, GgmlType

_VERSION_KEY, _FILE_TYPE_KEY = "general.quantization_version", "general.file_type"
_QUANTIZATION_VERSION: Final = 2
_LONGEST_TEXT: Final = 127
"""llama.cpp cuts the texts of metadata overrides to this many bytes."""


@dataclass(frozen=True, slots=True)
class Importance:
    """An importance matrix: its weights by tensor, and what the metadata says about its origin."""

    weights: Mapping[str, Float32Array]
    path: str | os.PathLike[str]
    origin: ImatrixOrigin


def read_importance(imatrix: str | os.PathLike[str] | None) -> Importance | None:
    """Read an importance matrix and its origin, if a path is given.

    Raises:
        FormatError: if the file is missing or damaged.
    """
    if imatrix is None:
        return None
    return Importance(read_imatrix(imatrix), imatrix, read_origin(imatrix))


@dataclass(frozen=True, slots=True)
class WholePlan:
    """Layout, tensors to write (all others are copied), and warnings."""

    layout: Layout
    targets: Sequence[ChangedTensor]
    warnings: tuple[str, ...]


def plan_whole_file(
    file: GgufFile,
    preset: Preset,
    importance: Importance | None,
    changed: Sequence[ChangedTensor] = (),
    entries: Mapping[str, bytes] | None = None,
) -> WholePlan:
    """Plan a file of a preset's types.

    Args:
        file: the source.
        preset: the preset.
        importance: the importance matrix.
        changed: tensors that adapters change or add; their types are chosen here.
        entries: encoded metadata to add or replace.

    Raises:
        QuantizationError: if a tensor cannot be stored in its type.
        MismatchError: if the importance matrix belongs to another model.
    """
    deltas = {target.name: target for target in changed}
    forms = {name: Form(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()}
    forms |= {target.name: Form(target.name, target.shape, target.source.type) for target in changed}
    parts = _parts(file, list(forms))
    ordered = [forms[name] for names in parts for name in names]
    types, misfits = mixture(preset, ordered, ModelFacts.of(file), has_imatrix=importance is not None)
    targets = []
    for form in ordered:
        kind = types[form.name]
        if form.name in deltas:
            old = deltas[form.name]
            targets.append(ChangedTensor(old.name, old.source, old.shape, kind, old.deltas))
        elif kind != form.type:
            targets.append(ChangedTensor(form.name, file.tensors[form.name], form.shape, kind, ()))
    for target in targets:
        if target.type != target.source.type:
            _check(file, target, preset, importance)
    layout = rewritten_layout(
        file,
        parts,
        {name: (ggml_shape(form.shape), types[name]) for name, form in forms.items()},
        {**(entries or {}), **_entries(preset, importance)},
        [target.name for target in targets],
    )
    return WholePlan(layout, targets, tuple(_warnings(preset, targets, types, misfits)))


def _parts(file: GgufFile, names: Sequence[str]) -> list[list[str]]:
    """Return the names of the tensors in each file: sorted; those of a split model stay in their file's order."""
    if len(file.parts) == 1:
        return [in_order(names)]
    parts = [sorted(part.tensors, key=lambda name: part.tensors[name].offset) for part in file.parts]
    parts[-1] += [name for name in names if name not in file.tensors]
    return parts


def _check(file: GgufFile, target: ChangedTensor, preset: Preset, importance: Importance | None) -> None:
    location, source, kind = f"{file.path}: tensor {target.name!r}", target.source, target.type
    if source.type.id not in TYPES:
        raise QuantizationError(f"{location} is {source.type.name}, which cannot be quantized again")
    if source.n_in % kind.block_weights:
        raise QuantizationError(
            f"{location} has rows of {source.n_in} weights, which cannot be stored as {kind.name} (a multiple of "
            f"{kind.block_weights} is needed)"
        )
    weights = None if importance is None else importance_of(importance.weights, target.name, target.shape)
    if weights is None and (needs_imatrix(target.name, kind, preset) or kind.needs_imatrix):
        raise QuantizationError(
            f"{location} would be {kind.name}, which {preset.name} cannot have without an importance matrix; give one "
            f"for this tensor with --imatrix, or another type with --tensor-type {target.name}=q4_k"
        )


def _entries(preset: Preset, importance: Importance | None) -> dict[str, bytes]:
    """Return the metadata that llama-quantize writes, in its order."""
    values: dict[str, str | int] = {_VERSION_KEY: _QUANTIZATION_VERSION, _FILE_TYPE_KEY: preset.file_type}
    if importance is not None:
        origin = importance.origin
        values["quantize.imatrix.file"] = _cut(os.fspath(importance.path))
        if origin.dataset is not None:
            values["quantize.imatrix.dataset"] = _cut(origin.dataset)
        values["quantize.imatrix.entries_count"] = len(importance.weights)
        if origin.chunks > 0:
            values["quantize.imatrix.chunks_count"] = origin.chunks
    return {key: encode_entry(key, value) for key, value in values.items()}


def _cut(text: str) -> str:
    return text.encode()[:_LONGEST_TEXT].decode(errors="ignore")


def _warnings(
    preset: Preset,
    targets: Sequence[ChangedTensor],
    types: Mapping[str, GgmlType],
    misfits: Mapping[str, GgmlType],
) -> list[str]:
    warnings = []
    again = [t.name for t in targets if t.source.type.block_weights > 1 and t.type != t.source.type]
    if again:
        warnings.append(
            f"{len(again)} tensors were quantized before and are quantized again, which loses quality; better start "
            f"from an F16 or BF16 file: {listed(again, 3)}"
        )
    if misfits:
        first = next(iter(misfits))
        warnings.append(
            f"{len(misfits)} tensors have rows that are not whole blocks of their type and get another, as "
            f"llama-quantize does: {first} is {types[first].name} instead of {misfits[first].name}"
        )
    quantized = [name for name, _ in types.items() if is_quantized(Form(name, (2, 2), types[name]))]
    for pattern, _ in preset.tensor_types:
        if preset.main.block_weights == 1 or not any(pattern.search(name) for name in quantized):
            warnings.append(f"--tensor-type {pattern.pattern}: changes no tensor")
    return warnings
