"""The files in a folder that are the user's content: none that are hidden, or that tools keep for themselves."""

from __future__ import annotations

from pathlib import Path


def visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, sorted, without those whose way there has a part that is hidden.

    Such are `.git`, `.ipynb_checkpoints` and a pipeline's records.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
