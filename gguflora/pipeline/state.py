"""A pipeline's own files, in the folder ``.gguflora`` of its output folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora.errors import OutputError
from gguflora.files import remote
from gguflora.files.atomic import atomic_output
from gguflora.files.small_files import read_small
from gguflora.files.strict_json import to_json
from gguflora.pipeline.locations import STATE, Location

DRAFTS: Final = "drafts"
"""Folder of outputs that are being made."""
ASIDE: Final = "failed"
"""Folder of outputs that failed their checks."""


def inside(folder: Location, name: str) -> Location:
    """Return the location of a file in a pipeline's own folder, which is in its output folder."""
    return folder / STATE / name if isinstance(folder, Path) else remote.join(folder, f"{STATE}/{name}")


def check_own_folder(folder: Location) -> None:
    """Check that a pipeline's own folder, which may have come with a copied or cloned output folder, has only files.

    Writing through a link would replace, and removing drafts would remove, files of the user; a FIFO would block.

    Raises:
        OutputError: if it is a link or a file, or holds a link, a device, a FIFO or a socket.
    """
    if isinstance(folder, str):
        return
    own = folder / STATE
    if os.path.lexists(own) and (own.is_symlink() or not own.is_dir()):
        raise _foreign(own)
    for root, folders, files in os.walk(own):
        for path in (Path(root, name) for name in (*folders, *files)):
            may_be_folder = Path(root) != own or path.name in {DRAFTS, ASIDE}
            if path.is_symlink() or not (path.is_file() or (may_be_folder and path.is_dir())):
                raise _foreign(path)
        if Path(root) == own and DRAFTS in folders:
            folders.remove(DRAFTS)  # removed without following links


def _foreign(path: Path) -> OutputError:
    what = "a link" if path.is_symlink() else "no regular file" if not path.is_file() else "a file, expected a folder"
    return OutputError(f"{path}: is {what}; a pipeline writes only to a folder of its own, so remove it")


def discard(location: Location) -> None:
    """Remove a file if it exists."""
    if isinstance(location, Path):
        location.unlink(missing_ok=True)
    else:
        remote.remove(location)


def part_locations(folder: Location, key: str, count: int) -> list[Location]:
    """Return the locations of a merge's parts until they are assembled."""
    return [inside(folder, f"{key[:32]}-{number}.part") for number in range(1, count + 1)]


def discard_drafts(folder: Location) -> None:
    """Remove drafts, and parts of merges, that a killed run has left behind."""
    state = inside(folder, "")
    if isinstance(state, Path) and not (state / DRAFTS).is_symlink():
        shutil.rmtree(state / DRAFTS, ignore_errors=True)
    names = [path.name for path in state.iterdir()] if isinstance(state, Path) else remote.stamps_of(state)
    for name in names:
        if name.endswith(".part"):
            discard(inside(folder, name))


def read_json(location: Location) -> dict[str, Any] | None:
    """Read a JSON file; return None if it is missing, damaged or no object."""
    if isinstance(location, str):
        return as_object(remote.read_bytes(location) or b"")
    with suppress(OSError):
        return as_object(read_small(location))
    return None


def as_object(content: bytes) -> dict[str, Any] | None:
    """Return the object of a JSON text; None if it is damaged or something else."""
    with suppress(ValueError, RecursionError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None
    return None


def write_json(location: Location, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    text = to_json(content, indent=2).encode()
    if isinstance(location, str):
        remote.write_bytes(location, text)
        return
    with atomic_output(location) as file:
        file.write(text)
