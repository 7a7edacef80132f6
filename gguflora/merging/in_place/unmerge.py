"""Give back the base that was merged into: ``unmerge``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguflora.errors import OutputError, PatchError
from gguflora.files.atomic import sync_folder
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
    Piece,
    ahead,
    copied_pieces,
    in_order,
    restored_bytes,
    sha256,
)
from gguflora.merging.sinks import Progress
from gguflora.quants.arrays import Bytes
from gguflora.system.cpus import thread_count


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """What `unmerge` did.

    Attributes:
        base: the (first) file, which is the base again.
        sha256: of it.
        size: of all its files, in bytes.
        changed: number of bytes in the stretches that were put back.
        adapters: name, SHA-256 and scale of each adapter that is out again.
        seconds: wall time.
    """

    base: Path
    sha256: str
    size: int
    changed: int
    adapters: tuple[tuple[str, str, float], ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        adapters = [{"name": name, "sha256": sha256, "scale": scale} for name, sha256, scale in self.adapters]
        return {**asdict(self), "base": str(self.base), "adapters": adapters}


def unmerge(
    base: str | os.PathLike[str], *, threads: int | None = None, progress: Progress | None = None
) -> UnmergeReport:
    """Give back the base that ``merge(..., in_place=True)`` has merged into, even if that was stopped midway.

    Nothing is written before it is known that exactly the base comes out; then the undo file is removed.

    Args:
        base: the merged file (of a split model any one), with its undo file beside it.
        threads: number of threads; by default one for each core this process may use.
        progress: called with (bytes checked, bytes in all).

    Raises:
        PatchError: if the undo file is missing or damaged, or the model was changed since.
        OutputError: if the file cannot be written.
    """
    started, path = time.perf_counter(), Path(base)
    path = path if undo_path(path).exists() else path.with_name(part_names(path.name)[0])
    if not undo_path(path).exists():
        raise PatchError(
            f"{undo_path(path)}: does not exist; only a model that was merged with --in-place, and its undo file kept, "
            "can be unmerged"
        )
    with open_patch(undo_path(path)) as undo:
        paths = part_paths(path, len(undo.facts.merged_sizes))
    with locked(paths) as model, open_patch(model.undo) as undo:
        try:
            changed = restore(model, undo, thread_count(threads), progress)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be changed: {error.strerror or error}; when that is mended, run unmerge again"
            ) from error
        facts = undo.facts
    seconds = time.perf_counter() - started
    return UnmergeReport(path, facts.base_sha256, facts.base_size, changed, facts.adapters, seconds)


def restore(model: JournalModel, undo: Patch, threads: int, progress: Progress | None = None) -> int:
    """Make the base of a merged or half-merged model, and remove journal and undo file.

    Returns:
        Number of bytes in the stretches that were put back.

    Raises:
        PatchError: if the model is neither; nothing is written then.
    """
    journal = Journal(model, undo.facts.base_sha256)
    kept = journal.kept()
    _check(model, undo, kept, threads, progress)
    for offset, content in kept.items():
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
    """How to put a stretch back; None if it is as it was."""
    now = model.files.read(record.to, record.length)
    old = _base_bytes(model, undo, record, now)
    return None if old is now else (record.to, now, old)


def _check(
    model: JournalModel, undo: Patch, kept: Mapping[int, Bytes], threads: int, progress: Progress | None
) -> None:
    """Raise unless exactly the base would come out."""
    facts = undo.facts
    if model.files.size != facts.base_size:
        raise PatchError(f"{model.path}: its size is not the {facts.base_size:,} bytes that {undo.path.name} is for")
    if any(record.source != record.to for record in undo.records):
        raise PatchError(f"{undo.path}: is a patch for another file, not an undo file")
    pieces = _base_pieces(model, undo, kept, threads)
    digest = sha256(_reported(pieces, facts.base_size, progress))
    if digest != facts.base_sha256:
        raise _changed_since(model, undo)


def _base_pieces(model: JournalModel, undo: Patch, kept: Mapping[int, Bytes], threads: int) -> Iterator[Piece]:
    def made(record: Record) -> Piece:
        now = kept.get(record.to)
        now = model.files.read(record.to, record.length) if now is None else now
        return record.to, _base_bytes(model, undo, record, now)

    records = [(record.to, partial(made, record)) for record in undo.records]
    return in_order([*copied_pieces(undo, model.files), *records], threads)


def _base_bytes(model: JournalModel, undo: Patch, record: Record, now: Bytes) -> Bytes:
    found = checksum(now)
    if found == record.old:
        return now
    if found != record.new:
        raise _changed_since(model, undo)
    return restored_bytes(undo, record, now)


def _changed_since(model: JournalModel, undo: Patch) -> PatchError:
    return PatchError(
        f"{model.path}: was changed by something else since {undo.facts.merged} was merged in place, so the base "
        f"{undo.facts.base_name} cannot be had again from {undo.path.name}; nothing was written"
    )


def _reported(pieces: Iterable[Piece], total: int, progress: Progress | None) -> Iterator[Piece]:
    for to, content in pieces:
        yield to, content
        if progress:
            progress(to + len(content), total)
