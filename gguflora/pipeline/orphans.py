"""Outputs that former runs of a recipe made and that it no longer names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from gguflora.errors import OutputError
from gguflora.files import remote
from gguflora.pipeline.job import RecipePlan
from gguflora.pipeline.locations import STATE, Location, in_place
from gguflora.pipeline.records import Records, aside_name, aside_of
from gguflora.pipeline.state import inside


def find_orphans(plan: RecipePlan, records: Records) -> list[str]:
    """Return the names of outputs that this recipe made, that are unchanged since, and that no job makes any more."""
    names = [name for job in plan.jobs for name in job.names]
    others = records.others([*names, *map(aside_name, names)])
    found = []
    for name, record in others.items():
        out = _location(plan.folder, name)
        if out is not None and record.get("stamp") and records.stamp_of(name, out) == record["stamp"]:
            found.append(name)
    return sorted(found)


def remove_orphans(folder: Location, records: Records, names: Iterable[str]) -> None:
    """Remove outputs and their records.

    Raises:
        OutputError: if one cannot be removed.
    """
    for name in names:
        out, files = _location(folder, name), records.files_made(name)
        if isinstance(out, str):
            _remove_remote(out, files)
        elif out is not None:
            _remove(out, files, folder)
        records.forget(name)


def remove_aside(folder: Location, records: Records, name: str) -> None:
    """Remove the output that failed its checks before the one of the same name passed them, and its record.

    Raises:
        OutputError: if it cannot be removed.
    """
    aside = aside_of(folder, name)
    if records.read(aside_name(name)) is None:
        return
    files = records.files_made(aside_name(name))
    if isinstance(aside, str):
        _remove_remote(aside, files)
    else:
        _remove(aside, files, aside.parent)  # which another job may be about to use
    records.forget(aside_name(name))


def _remove_remote(out: str, files: Collection[str]) -> None:
    """Remove an output's files: the output itself and the other parts of a split model, or those in a folder."""
    parent = out.rpartition("/")[0] if remote.file_name(out) in files else out
    for file in files:
        remote.remove(remote.join(parent, file))


def _remove(out: Path, files: Iterable[str], stop: Location) -> None:
    """Remove an output's files, and the folders below ``stop`` that are empty then; of a link, only the link."""
    try:
        _unlink(out, files, stop)
    except OSError as error:
        raise OutputError(f"{out}: cannot be removed: {error.strerror or error}") from error


def _unlink(out: Path, files: Iterable[str], stop: Location) -> None:
    parent = out if out.is_dir() and not out.is_symlink() else out.parent
    for path in [out] if out.is_symlink() else [parent / file for file in files]:
        path.unlink(missing_ok=True)
    while parent != stop and parent.name != STATE:
        with suppress(OSError):
            parent.rmdir()
        if parent.exists():
            return
        parent = parent.parent


def _location(folder: Location, name: str) -> Location | None:
    """Return the location of an output; None if its name leads out of the folder."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        return None
    if isinstance(folder, str):
        return remote.join(folder, name)
    path = in_place(folder / name)
    is_own = path != inside(folder, "") and path.is_relative_to(folder)
    return path if is_own else None
