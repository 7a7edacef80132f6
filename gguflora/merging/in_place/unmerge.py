"""``unmerge``: restore a base that was merged into in place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguflora.errors import OutputError, PatchError
from gguflora.files.shard_names import part_names, part_paths
from gguflora.files.sidecars import undo_path
from gguflora.merging.in_place.journal import (
    Change,
    Journal,
    JournalModel,
    locked,
)
from gguflora.merging.patch.format import (
    Patch,
    Record,
    checksum,
    open_patch,
)
from gguflora.merging.patch.stream import (
    FilePiece,
    ahead,
    copied_pieces,
    in_order,
    restored_bytes,
    sha256,
    with_progress,
)
from gguflora.merging.sinks import Progress
from gguflora.quants.arrays import Bytes
from gguflora.system.cpus import thread_count
from gguflora.system.storage import sync_folder


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What `unmerge` did.

    Attributes:
        base: path of the restored base; for a split model, of its first file.
        sha256: SHA-256 of the base.
        size: size of all its files in bytes.
        changed: number of bytes in the ranges that were restored.
        adapters: name, SHA-256 and scale of each adapter that was removed.
        seconds: wall time.
    """

    base: Path
    sha256: str
    size: int
    changed: int
    adapters: tuple[tuple[str, str, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        adapters = [{"name": name, "sha256": sha256, "scale": scale} for name, sha256, scale in self.adapters]
        return {**asdict(self), "base": str(self.base), "adapters": adapters}


def unmerge(
    base: str | os.PathLike[str], *, threads: int | None = None, progress: Progress | None = None
) -> UnmergeReport:
    """Restore the base after ``merge(..., in_place=True)``, even if the merge was interrupted.

    Nothing is written until it is certain that the result is exactly the base. Afterwards the undo file is removed.

    Args:
        base: the merged file, or any file of a split model, with its undo file beside it.
        threads: number of threads; by default one for each core that this process may use.
        progress: called with (bytes checked, bytes in total).

    Raises:
        PatchError: if the undo file is missing or damaged, or something else changed the model since the merge.
        OutputError: if the file cannot be written.
    """
    started, path = time.perf_counter(), Path(base)
    path = path if undo_path(path).exists() else path.with_name(part_names(path.name)[0])
    if not undo_path(path).exists():
        raise PatchError(
            f"{undo_path(path)}: does not exist; unmerge needs a model that was merged with --in-place, and its undo "
            "file"
        )
    with open_patch(undo_path(path)) as undo:
        paths = part_paths(path, len(undo.facts.merged_sizes))
    with locked(paths) as model, open_patch(model.undo) as undo:
        try:
            changed = restore(model, undo, thread_count(threads), progress)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be changed: {error.strerror or error}; fix this and run unmerge again"
            ) from error
        facts = undo.facts
    seconds = time.perf_counter() - started
    return UnmergeReport(path, facts.base_sha256, facts.base_size, changed, facts.adapters, seconds)


def restore(model: JournalModel, undo: Patch, threads: int, progress: Progress | None = None) -> int:
    """Restore the base of a merged or half-merged model, and remove journal and undo file.

    Returns:
        Number of bytes in the ranges that were restored.

    Raises:
        PatchError: if the result would not be the base; nothing is written then.
    """
    journal = Journal(model, undo.facts.base_sha256)
    saved = journal.read_saved()
    _check(model, undo, saved, threads, progress)
    for offset, content in saved.items():
        model.files.write(content, offset)
    model.files.sync()
    changed = 0

    def counted(changes: Iterable[Change | None]) -> Iterator[Change]:
        nonlocal changed
        for change in changes:
            if change is not None:
                changed += len(change[1])
                yield change

    tasks = (partial(_change, model, undo, record) for record in undo.records if record.old != record.new)
    journal.change(counted(ahead(tasks, threads)))
    journal.remove()
    model.undo.unlink()
    sync_folder(model.path.parent)
    return changed


def _change(model: JournalModel, undo: Patch, record: Record) -> Change | None:
    """Return the change that restores a record's bytes, or None if they are restored already."""
    current = model.files.read(record.to, record.length)
    old = _base_bytes(model, undo, record, current)
    return None if old is current else (record.to, current, old)


def _check(
    model: JournalModel, undo: Patch, saved: Mapping[int, Bytes], threads: int, progress: Progress | None
) -> None:
    """Raise ``PatchError`` unless the result would be exactly the base."""
    facts = undo.facts
    if model.files.size != facts.base_size:
        raise PatchError(
            f"{model.path}: has {model.files.size:,} bytes, but {undo.path.name} is for {facts.base_size:,} bytes"
        )
    if any(record.source != record.to for record in undo.records):
        raise PatchError(f"{undo.path}: is a patch for another file, not an undo file")
    pieces = _base_pieces(model, undo, saved, threads)
    digest = sha256(with_progress(pieces, facts.base_size, progress))
    if digest != facts.base_sha256:
        raise _changed_since(model, undo)


def _base_pieces(model: JournalModel, undo: Patch, saved: Mapping[int, Bytes], threads: int) -> Iterator[FilePiece]:
    def restore_piece(record: Record) -> FilePiece:
        current = saved.get(record.to)
        current = model.files.read(record.to, record.length) if current is None else current
        return record.to, _base_bytes(model, undo, record, current)

    records = [(record.to, partial(restore_piece, record)) for record in undo.records]
    return in_order([*copied_pieces(undo, model.files), *records], threads)


def _base_bytes(model: JournalModel, undo: Patch, record: Record, current: Bytes) -> Bytes:
    actual = checksum(current)
    if actual == record.old:
        return current
    if actual != record.new:
        raise _changed_since(model, undo)
    return restored_bytes(undo, record, current)


def _changed_since(model: JournalModel, undo: Patch) -> PatchError:
    return PatchError(
        f"{model.path}: was changed by something else since {undo.facts.merged} was merged in place, so "
        f"{undo.path.name} cannot restore the base {undo.facts.base_name}; nothing was written"
    )
