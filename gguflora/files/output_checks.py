"""Checks of an output path before any work: it must not be an input, exist unasked, or be too large for its disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from gguflora.errors import OutputError
from gguflora.files.shard_names import same_split

_ADAPTER = "adapter_config.json"
"""What a directory holds all of whose files are one adapter."""


def check_target(target: Path, inputs: Iterable[Path], *, force: bool, size: int) -> None:
    """Check, before any work, that ``size`` bytes can be written to ``target``; see `check_targets`."""
    check_targets([target], inputs, force=force, size=size)


def check_targets(targets: Sequence[Path], inputs: Iterable[Path], *, force: bool, size: int) -> None:
    """Check, before any work, that ``size`` bytes in all can be written to files of one directory.

    Raises:
        OutputError: if one exists and ``force`` is not set, is one of the inputs, or their directory is missing, not
            writable or too full.
    """
    sources = list(inputs)
    for target in targets:
        _check_name(target, sources, force=force)
    target, folder = targets[0], targets[0].parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {folder} is not writable")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(f"{target}: needs {size:,} bytes, but only {free:,} are free on its disk")


def _check_name(target: Path, inputs: Iterable[Path], *, force: bool) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, expected the name of a file")
    if not target.exists():
        return
    for source in inputs:
        if _is_part(source, target):
            raise OutputError(f"{target}: is also an input; choose another name for the output")
    if not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")


def _is_part(source: Path, target: Path) -> bool:
    """Whether a file is an input, another file of the same split model, or of the same adapter or checkpoint."""
    if not source.exists():
        return False
    if source.samefile(target):
        return True
    if same_split(source, target):
        return True
    folder = source if source.is_dir() else source.parent
    is_whole = source.is_dir() or (source.suffix != ".gguf" and source.with_name(_ADAPTER).is_file())
    return is_whole and folder.samefile(target.resolve().parent) and target.suffix != ".gguf"


def check_folder_target(target: Path, inputs: Iterable[Path], *, marker: str, force: bool) -> None:
    """Check, before any work, that a directory can be written at ``target``.

    Args:
        target: the directory.
        inputs: what must not be overwritten.
        marker: name of a file that every directory of this kind holds: others are never overwritten.
        force: whether one of this kind may be.

    Raises:
        OutputError: if it cannot.
    """
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{target}: the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {parent} is not writable")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise OutputError(f"{target}: exists and is no directory with {marker}; choose another name")
    for source in inputs:
        if source.exists() and (source.samefile(target) or source.parent.samefile(target)):
            raise OutputError(f"{target}: is also an input; choose another name for the output")
    if any(target.iterdir()) and not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")
