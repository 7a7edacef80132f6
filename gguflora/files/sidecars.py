"""The files that a merge in place keeps beside the model: the undo file and the journal."""

from __future__ import annotations

import os
from pathlib import Path

from gguflora.errors import GgufError


def undo_path(path: Path) -> Path:
    """Return the path of a model's undo file."""
    return _sidecar(path, ".undo")


def journal_path(path: Path) -> Path:
    """Return the path of a model's journal, which exists while the model is being changed."""
    return _sidecar(path, ".journal")


def check_finished(path: Path) -> None:
    """Raise ``GgufError`` if a merge or unmerge in place did not finish, or is still running."""
    if journal_path(path).exists():
        raise GgufError(
            f"{path}: is half merged: a merge in place was interrupted or is still running "
            f"({journal_path(path).name} exists); restore the base with: gguflora unmerge {path}"
        )


def _sidecar(path: Path, suffix: str) -> Path:
    path = Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a link to itself
    return path.with_name(path.name + suffix)
