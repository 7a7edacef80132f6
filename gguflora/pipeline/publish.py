"""Move the finished output of a job from its folder of drafts to its place."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gguflora.errors import OutputError
from gguflora.files.atomic import atomic_folder
from gguflora.files.output_checks import ADAPTER_WEIGHTS
from gguflora.files.shard_names import part_names
from gguflora.system.storage import replace, sync_folder

_MARKER = "adapter_config.json"


def publish(drafts: Path, folder: Path) -> None:
    """Move all files and folders of ``drafts`` to ``folder``, and replace those of the same names.

    Files of a split model appear together: an old first file goes before new later ones come, and the new one comes
    last. In the folder of an adapter only its own files are replaced. A link in an output's place is replaced, not
    followed.

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
        if len(files) > 1:
            (folder / files[-1].name).unlink(missing_ok=True)
        for entry in files:
            replace(entry, folder / entry.name)
        for entry in entries:
            if entry not in files:
                _publish_folder(entry, folder / entry.name)
        sync_folder(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _publish_folder(draft: Path, target: Path) -> None:
    if target.is_symlink():
        target.unlink()
    with atomic_folder(target, marker=_MARKER, stale=ADAPTER_WEIGHTS) as folder:
        for entry in draft.iterdir():
            replace(entry, folder / entry.name)


def publish_alone(aside: Path, out: Path, drafts: Path) -> None:
    """Move one output, with the other files of a split model, from where it was put aside to its place.

    Args:
        aside: where it was put aside.
        out: its place.
        drafts: the folder of drafts, where the next run removes what a killed one left.

    Raises:
        OutputError: if something cannot be written.
    """
    names = [aside.name] if aside.is_dir() else part_names(aside.name)
    try:
        drafts.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=drafts) as folder:
            for name in names:
                replace(aside.parent / name, Path(folder) / name)
            publish(Path(folder), out.parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
