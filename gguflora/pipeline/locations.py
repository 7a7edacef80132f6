"""Locations of inputs and outputs: paths and URLs, which of them are the same, and what they are called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from gguflora.files import remote
from gguflora.files.shard_names import PART_NAME

Location = Path | str
"""A local path, or a URL."""

STATE: Final = ".gguflora"
"""Folder of a pipeline's own files, in the output folder."""

_SNAPSHOT: Final = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")
"""Folder of a model in the cache of huggingface_hub: its owner and its name."""


def to_location(text: str) -> Location:
    """Return the location that a text names: a URL or a path."""
    if (path := remote.local_path(text)) is not None:
        return path
    return text if remote.is_remote(text) else Path(text)


def made_by(location: Location, places: Mapping[Location, Location]) -> Location | None:
    """Return the output that a location names or lies in.

    A link in an output's place stands for the output, wherever it leads: tools such as DVC put links to their own
    stores there. A link elsewhere stands for the file that it names.

    Args:
        location: the location.
        places: the locations of all that jobs write, and the output of each one's job.
    """
    if isinstance(location, str):
        parts = location.split("/")
        return next((places[way] for end in range(len(parts), 2, -1) if (way := "/".join(parts[:end])) in places), None)
    place = in_place(location)
    target = Path(os.path.realpath(place))  # which takes links that go in circles, unlike Path.resolve
    return next((places[path] for path in (place, target, *place.parents, *target.parents) if path in places), None)


def in_place(path: Path) -> Path:
    """Return the absolute path of a name, with links in its folders followed, but not the name itself."""
    path = Path(os.path.abspath(path))  # noqa: PTH100  (resolve would follow the name itself)
    return Path(os.path.realpath(path.parent)) / path.name


def label_of(location: Location) -> str:
    """Return the name of a location for the names of outputs.

    It is a file's name without suffix and without the number of a split model's file, or a directory's name. A folder
    in the cache of huggingface_hub has the name of its repository.
    """
    name = PurePosixPath(PART_NAME.sub(r"\1.gguf", _parts(location)[-1]))
    is_folder = isinstance(location, Path) and location.is_dir()
    return name.stem if name.suffix in {".gguf", ".json"} and not is_folder else name.name


def folder_label(location: Location, level: int) -> str | None:
    """Return the name of the folder ``level`` levels above a location; None if there is none."""
    parts = _parts(location)
    return parts[-1 - level] if level < len(parts) else None


def _parts(location: Location) -> list[str]:
    """Return the names of a location's folders, and its own."""
    if isinstance(location, str):
        folders = location.split("://", 1)[1].split("#", 1)[0].rstrip("/").split("/")[:-1]
        owner = [part.partition("@")[0] for part in folders] if location.startswith("hf://") else folders
        return [*owner, remote.file_name(location)]
    path = os.path.abspath(location)  # noqa: PTH100  (links have names of their own)
    return [part for part in _SNAPSHOT.sub(r"\1/\2", path).split("/") if part] or [path]
