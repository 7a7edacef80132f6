"""Merge into the base file itself; `gguflora.merging.in_place` describes how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from gguflora.errors import GgufloraError, OutputError
from gguflora.files.gguf import GgufFile, Layout, ShardLayout
from gguflora.files.gguf_shard import GgufShard
from gguflora.files.sidecars import undo_path
from gguflora.merging.in_place.journal import (
    Change,
    Journal,
    JournalModel,
    locked,
)
from gguflora.merging.in_place.unmerge import restore
from gguflora.merging.patch.create import Merged, write_patch
from gguflora.merging.patch.format import Patch, Record, open_patch
from gguflora.merging.patch.stream import ahead, new_bytes, old_bytes
from gguflora.merging.sinks import RowSink
from gguflora.placement.target import ChangedTensor
from gguflora.system.descriptors import read_at


def check_in_place(base: GgufFile, targets: Sequence[ChangedTensor]) -> Layout:
    """Check that targets can overwrite the base's tensors, before any work is done.

    Returns:
        The layout of the result, which is the layout of the base.

    Raises:
        OutputError: if a target has another shape or type, or the base was merged in place before.
    """
    for target in targets:
        form, known = (target.shape, target.type), base.tensors.get(target.name)
        if known is None or form != (known.shape, known.type):
            change = "would be added" if known is None else f"would become {target.type.name} {target.shape}"
            raise OutputError(
                f"{base.path}: tensor {target.name!r} {change}, which changes the file's layout and cannot be done in "
                "place; write a new model with --out"
            )
    undo = undo_path(base.path)
    if undo.exists():
        raise OutputError(
            f"{base.path}: was merged in place before ({undo.name} is beside it); restore the base with: gguflora "
            f"unmerge {base.path}, and merge all adapters at once"
        )
    layout = base.layout({}, {target.name: (target.shape, target.type) for target in targets})
    parts = tuple(map(_with_header, layout.parts, base.parts))
    return replace(layout, parts=parts)


def _with_header(part: ShardLayout, base: GgufShard) -> ShardLayout:
    """Return the layout of a file with the base's own header, byte for byte."""
    return replace(part, header=read_at(base.fileno(), len(part.header), 0))


def merge_in_place(
    base: GgufFile,
    targets: Sequence[ChangedTensor],
    rewrite: Callable[[RowSink], None],
    merged: Merged,
    *,
    threads: int,
) -> int:
    """Write an undo file, then overwrite the changed rows of the base.

    Args:
        base: the base of the merge.
        targets: the changed tensors.
        rewrite: writes the changed rows to a sink.
        merged: what was merged; it is recorded in the undo file.
        threads: number of threads.

    Returns:
        The size of the undo file in bytes.

    Raises:
        GgufloraError: if it cannot be done. The base is then unchanged, or the message says how to restore it.
    """
    with locked(base.paths) as model:
        base.check_unchanged()
        layout = check_in_place(base, targets)
        size = write_patch(model.undo, base, layout, rewrite, merged, threads=threads, force=False)
        with open_patch(model.undo) as undo:
            _apply(model, undo, threads)
    return size


def _apply(model: JournalModel, undo: Patch, threads: int) -> None:
    journal = Journal(model, undo.facts.base_sha256)
    try:
        journal.change(_changes(model, undo, threads))
        journal.remove()
    except BaseException as error:
        _roll_back(model, undo, threads)
        if isinstance(error, OSError):
            raise OutputError(
                f"{model.path}: cannot be changed in place: {error.strerror or error}; the file is unchanged"
            ) from error
        raise


def _roll_back(model: JournalModel, undo: Patch, threads: int) -> None:
    try:
        restore(model, undo, threads)
    except (OSError, GgufloraError) as error:
        raise OutputError(
            f"{model.path}: is half merged and could not be restored ({error}); fix this, then restore the base "
            f"with: gguflora unmerge {model.path}"
        ) from error


def _changes(model: JournalModel, undo: Patch, threads: int) -> Iterator[Change]:
    changed = (record for record in undo.records if record.old != record.new)
    return ahead((partial(_change, model, undo, record) for record in changed), threads)


def _change(model: JournalModel, undo: Patch, record: Record) -> Change:
    before = old_bytes(model.files, record)
    return record.to, before, new_bytes(undo, record, before)
