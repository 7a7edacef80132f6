"""What lies beside a model that is merged into in place."""

from __future__ import annotations

from pathlib import Path

from gguflora.errors import GgufError


def undo_path(path: Path) -> Path:
    """The undo file of a model."""
    return _beside(path, ".undo")


def journal_path(path: Path) -> Path:
    """The journal of a model, which is there while the model is being changed."""
    return _beside(path, ".journal")


def check_finished(path: Path) -> None:
    """Raise ``GgufError`` for a model that a merge in place or its undoing has left half done."""
    if journal_path(path).exists():
        raise GgufError(
            f"{path}: is half merged, for a merge in place was stopped or is going on ({journal_path(path).name}); "
            f"put the base back with: gguflora unmerge {path}"
        )


def _beside(path: Path, suffix: str) -> Path:
    path = path.resolve()
    return path.with_name(path.name + suffix)
