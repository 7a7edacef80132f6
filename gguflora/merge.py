"""Merge adapters into a quantized GGUF file: ``merge``.

The output is the base file but for the rows of the changed tensors: those are dequantized, changed and quantized
again, a block of rows at a time, on several threads, while the rest is copied by the kernel. No model is ever held in
memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguflora import _native
from gguflora._version import __version__
from gguflora.adapters import Adapter, read_adapter
from gguflora.architectures import can_untie, unknown_warning
from gguflora.base_model import BaseModel, check_whole, describe
from gguflora.changed_rows import Scaled, Target, without_copies
from gguflora.deltas import LowRank, Replace
from gguflora.errors import AdapterError, QuantizationError, UnsupportedAdapterError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Layout, encode_entry
from gguflora.files.output import atomic_output, check_target
from gguflora.placement import Placed, cautions, new_vocabulary, place
from gguflora.rewrite import Progress, Rewriter
from gguflora.vocabulary import grown_vocabulary

AdapterPath = str | os.PathLike[str]
AdapterArgument = AdapterPath | Sequence[AdapterPath | tuple[AdapterPath, float]]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did, or with ``dry_run`` would do.

    Attributes:
        output: the merged GGUF file.
        adapters: name, SHA-256 and scale of each adapter.
        tensors: number of changed tensors by quant type.
        weights: number of weights in them.
        size: of the output, in bytes.
        seconds: wall time.
        threads: used.
        warnings: what the user should know.
        dry_run: True if nothing was written.
    """

    output: Path
    adapters: tuple[tuple[str, str, float], ...]
    tensors: dict[str, int]
    weights: int
    size: int
    seconds: float
    threads: int
    warnings: tuple[str, ...]
    dry_run: bool

    @property
    def weights_per_second(self) -> float:
        """Changed weights for each second of wall time."""
        return self.weights / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output), "weights_per_second": self.weights_per_second}


def merge(
    base: str | os.PathLike[str],
    adapters: AdapterArgument,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with adapters merged in, every tensor in its own quant type.

    Args:
        base: GGUF file of any quant types; opened read-only.
        adapters: a PEFT directory or GGUF LoRA file, or a sequence of them or of (path, scale); summed, then
            rounded once.
        out: the file to write.
        threads: number of threads; by default one for each core this process may use.
        dry_run: check everything, write nothing.
        force: overwrite ``out``.
        progress: called with (bytes done, bytes in all), from several threads but never at once.

    Raises:
        GgufloraError: if something cannot be read, does not fit together or cannot be written; ``out`` is then as
            it was.
    """
    started, target = time.perf_counter(), Path(out)
    used_threads = threads or len(os.sched_getaffinity(0))
    with GgufFile(base) as file:
        check_whole(file)
        sources = [(read_adapter(path), scale) for path, scale in _with_scales(adapters)]
        plan = _make_plan(file, sources)
        inputs = [file.path, *(source.path for source, _ in sources)]
        check_target(target, inputs, force=force or dry_run, size=plan.layout.size)
        if not dry_run:
            with atomic_output(target) as output:
                Rewriter(file, plan.layout, plan.targets, used_threads, progress).write(output)
                file.check_unchanged()
        touched = [target.source for target in plan.targets if target.changes]
    types = [tensor.type.name for tensor in touched]
    return MergeReport(
        output=target,
        adapters=tuple((source.name, source.sha256, scale) for source, scale in sources),
        tensors={name: types.count(name) for name in sorted(set(types))},
        weights=sum(tensor.n_rows * tensor.n_in for tensor in touched),
        size=plan.layout.size,
        seconds=time.perf_counter() - started,
        threads=used_threads,
        warnings=plan.warnings,
        dry_run=dry_run,
    )


def _with_scales(adapters: AdapterArgument) -> list[tuple[AdapterPath, float]]:
    given = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in given]
    for path, scale in pairs:
        if not abs(float(scale)) <= float(np.finfo(np.float32).max):
            raise AdapterError(f"{path}: its scale is {scale}, expected a finite number")
    return [(path, float(scale)) for path, scale in pairs]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The layout of the output, what is not just copied from the base, and what the user should know."""

    layout: Layout
    targets: Sequence[Target]
    warnings: tuple[str, ...]


def _make_plan(file: GgufFile, sources: Sequence[tuple[Adapter, float]]) -> _Plan:
    model = describe(file)
    changes: dict[str, list[Scaled]] = {}
    unknown = unknown_warning(model)
    warnings = [] if unknown is None else [f"{file.path}: {unknown}"]
    for source, scale in sources:
        if source.invocation_tokens:
            raise UnsupportedAdapterError(
                f"{source.path}: is an activated LoRA, which leaves the base as it is up to its invocation tokens, so "
                "it cannot be merged; convert it and load it at run time"
            )
        placed = without_copies(file, place(source, model))
        warnings += [f"{source.path}: {text}" for text in (*source.warnings, *cautions(file, placed))]
        for name, placed_items in placed.items():
            effective = [(item, scale) for item in placed_items if scale and not _is_nothing(item)]
            if effective:
                changes.setdefault(name, []).extend(effective)
    untied = _untie(model, changes) if model.is_tied else set()
    entries = _record(file, sources)
    n_tokens = _vocabulary_of(file, changes)
    if n_tokens:
        for source, _ in sources:
            entries |= grown_vocabulary(file, source.path.parent, n_tokens)
    targets = []
    for name, items in changes.items():
        entry = file.tensors[TOKEN_EMBEDDING if name in untied else name]
        grown = n_tokens and name in {TOKEN_EMBEDDING, OUTPUT}
        targets.append(Target(name, entry, (n_tokens, entry.n_in) if grown else entry.shape, items))
    for target in targets:
        _check_target_type(file, target)
    layout = file.layout(entries, {target.name: (target.shape, target.source.type) for target in targets})
    return _Plan(layout, targets, tuple(warnings))


def _vocabulary_of(file: GgufFile, changes: Mapping[str, Sequence[Scaled]]) -> int:
    """Rows of the embedding and output where an adapter has more than the base, else 0."""
    names = [name for name in (TOKEN_EMBEDDING, OUTPUT) if name in changes or name in file.tensors]
    rows = {
        name: new_vocabulary(item.change for item, _ in changes.get(name, ()) if item.piece.rows is None)
        for name in names
    }
    n_tokens, before = max(rows.values(), default=0), file.tensors[TOKEN_EMBEDDING].n_rows if rows else 0
    if n_tokens <= before:
        return 0
    for name, count in rows.items():
        if count < n_tokens:
            raise UnsupportedAdapterError(
                f"{file.path}: the adapter's vocabulary has {n_tokens} tokens, the base's {before}, but the "
                f"adapter has no {name!r} of that size; save it with save_embedding_layers=True"
            )
    return n_tokens


def _is_nothing(item: Placed) -> bool:
    return isinstance(item.change, LowRank) and item.change.factor == 0


def _untie(model: BaseModel, changes: dict[str, list[Scaled]]) -> set[str]:
    """Where a tied embedding and output change differently, an output weight of its own.

    It begins as a copy of the embedding. Leaves ``changes`` with an entry for it, or without one if none is needed.
    """
    embedding, output = changes.get(TOKEN_EMBEDDING, []), changes.get(OUTPUT, [])
    if len(embedding) == len(output) and all(map(_same, embedding, output)):
        changes.pop(OUTPUT, None)
        return set()
    if not can_untie(model):
        raise UnsupportedAdapterError(
            f"{model.path}: its token embedding is also the output weight, and the adapters change them differently; "
            f"llama.cpp's {model.architecture} cannot have an output weight of its own"
        )
    changes[OUTPUT] = output
    return {OUTPUT}


def _same(one: Scaled, other: Scaled) -> bool:
    (a, scale_a), (b, scale_b) = (one[0].change, one[1]), (other[0].change, other[1])
    if isinstance(a, Replace) and isinstance(b, Replace) and a.shape == b.shape:
        return scale_a == scale_b and np.array_equal(a.values, b.values)
    return a is b and scale_a == scale_b


def _check_target_type(file: GgufFile, target: Target) -> None:
    kind, name = target.source.type, target.source.name
    if kind.id not in _native.TYPES or kind.needs_imatrix:
        raise QuantizationError(f"{file.path}: tensor {name!r} is {kind.name}, which cannot be quantized again")


def _record(file: GgufFile, sources: Sequence[tuple[Adapter, float]]) -> dict[str, bytes]:
    """Metadata that says what was merged, after what an earlier merge has said."""
    lists: dict[str, list[Any]] = {
        "gguflora.merged.names": [source.name for source, _ in sources],
        "gguflora.merged.sha256": [source.sha256 for source, _ in sources],
        "gguflora.merged.scales": [scale for _, scale in sources],
    }
    record = {key: encode_entry(key, [*(file.metadata.get(key) or []), *values]) for key, values in lists.items()}
    return {"gguflora.version": encode_entry("gguflora.version", __version__), **record}
