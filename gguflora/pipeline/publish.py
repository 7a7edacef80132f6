"""Move the finished output of a job from its folder of drafts to its place."""

from __future__ import annotations

import filecmp
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from gguflora.errors import OutputError
from gguflora.files.atomic import atomic_folder
from gguflora.files.output_checks import ADAPTER_WEIGHTS
from gguflora.files.shard_names import part_names
from gguflora.files.strict_json import to_json
from gguflora.system.storage import link, replace, sync_folder

_MARKER: Final = "adapter_config.json"


def publish(drafts: Path, folder: Path, *, force: bool = True, claim: Path | None = None) -> None:
    """Move all files and folders of ``drafts`` to ``folder``.

    Files of a split model appear together: an old first file goes before new later ones come, and the new one comes
    last. In the folder of an adapter only its own files are replaced. A link in an output's place is replaced, not
    followed.

    Args:
        drafts: the folder of drafts.
        folder: the folder of the outputs.
        force: whether they replace what has their names. Otherwise that is an error, unless it is the same, byte for
            byte; then it stays, and counts as moved.
        claim: a file that says what is about to be moved (see `stamps_in`), so that the next run knows it for its own
            if this one is killed.

    Raises:
        OutputError: if something cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(drafts.iterdir(), reverse=True)
        files = [entry for entry in entries if not entry.is_dir()]
        for entry in files:
            if (folder / entry.name).is_dir() and not (folder / entry.name).is_symlink():
                raise OutputError(f"{folder / entry.name}: is a directory, expected a file; remove it")
        if claim is not None:
            claim.write_text(to_json(stamps_in(entries)), "utf-8")
        if force:
            _replace(entries, files, folder)
        else:
            _place(entries, folder)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


def stamps_in(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Return the sizes and times of files and of the files in folders, by name; they stay when a file is moved."""
    stats: dict[str, os.stat_result] = {}
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            stats |= {f"{path.name}/{entry.name}": entry.lstat() for entry in path.iterdir()}
        elif os.path.lexists(path):
            stats[path.name] = path.lstat()
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _replace(entries: Sequence[Path], files: Sequence[Path], folder: Path) -> None:
    if len(files) > 1:
        (folder / files[-1].name).unlink(missing_ok=True)
    for entry in files:
        replace(entry, folder / entry.name)
    for entry in entries:
        if entry not in files:
            _publish_folder(entry, folder / entry.name, force=True)


def _publish_folder(draft: Path, target: Path, *, force: bool) -> None:
    if force and target.is_symlink():
        target.unlink()
    with atomic_folder(target, marker=_MARKER, stale=ADAPTER_WEIGHTS, force=force) as folder:
        for entry in draft.iterdir():
            replace(entry, folder / entry.name)


def _place(entries: Sequence[Path], folder: Path) -> None:
    """Move files and folders to names that are free, or that hold the same already: all of them or none."""
    new = [entry for entry in entries if not _is_there(entry, folder / entry.name)]
    placed: list[Path] = []
    try:
        for entry in new:
            if entry.is_dir():
                _publish_folder(entry, folder / entry.name, force=False)
            else:
                _move_to_free(entry, folder / entry.name)
                placed.append(folder / entry.name)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise


def _is_there(draft: Path, target: Path) -> bool:
    """Return whether a place holds what is to come there; False if it is free.

    Raises:
        OutputError: if it holds something else.
    """
    if draft.is_dir() and target.is_dir():
        held = {path.name for path in target.iterdir()}
        names = {path.name for path in draft.iterdir()}
        stale = {path.name for pattern in ADAPTER_WEIGHTS for path in target.glob(pattern)} - names
        if not held:
            return False
        if names <= held and not stale and all(_is_same(draft / name, target / name) for name in names):
            return True
    elif not os.path.lexists(target):
        return False
    elif _is_same(draft, target):
        return True
    raise _in_the_way(target)


def _is_same(draft: Path, target: Path) -> bool:
    are_files = all(path.is_file() and not path.is_symlink() for path in (draft, target))
    return are_files and filecmp.cmp(draft, target, shallow=False)


def _in_the_way(target: Path) -> OutputError:
    return OutputError(
        f"{target}: is in the way: no record of this pipeline names it, and it is not what this job makes; move it "
        "away, or let --force replace it"
    )


def _move_to_free(draft: Path, target: Path) -> None:
    """Move a file to a name that is free, at once where the file system has hard links."""
    try:
        if link(draft, target):
            draft.unlink()
        elif os.path.lexists(target):
            raise _in_the_way(target)
        else:
            replace(draft, target)
    except FileExistsError:
        raise _in_the_way(target) from None


def publish_alone(aside: Path, out: Path, drafts: Path, *, force: bool = True, claim: Path | None = None) -> None:
    """Move one output, with the other files of a split model, from where it was put aside to its place.

    Args:
        aside: where it was put aside.
        out: its place.
        drafts: the folder of drafts, where the next run removes what a killed one left.
        force: as for `publish`.
        claim: as for `publish`.

    Raises:
        OutputError: if something cannot be written; then it is where it was.
    """
    names = [aside.name] if aside.is_dir() else part_names(aside.name)
    try:
        drafts.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=drafts) as folder:
            for name in names:
                replace(aside.parent / name, Path(folder) / name)
            try:
                publish(Path(folder), out.parent, force=force, claim=claim)
            except OutputError:
                for entry in Path(folder).iterdir():
                    with suppress(OSError):
                        replace(entry, aside.parent / entry.name)
                raise
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
