"""Check an output path before the work begins: it must be writable, not be an input, and have enough disk space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from gguflora.errors import OutputError
from gguflora.files.output_rule import check_regular
from gguflora.files.shard_names import same_split

ADAPTER_WEIGHTS = ("adapter_model.*", "adapter_model-*-of-*.safetensors")
"""Names of weights in an adapter's directory. A new adapter replaces all of them; other files stay."""

_ADAPTER = "adapter_config.json"
"""Name of a file that marks its directory as an adapter."""


def check_target(target: Path, inputs: Iterable[Path], *, force: bool, size: int) -> None:
    """Check that ``size`` bytes can be written to ``target``; see `check_targets`."""
    check_targets([target], inputs, force=force, size=size)


def check_targets(targets: Sequence[Path], inputs: Iterable[Path], *, force: bool, size: int) -> None:
    """Check that files can be written to one directory.

    Args:
        targets: paths of the files.
        inputs: paths that must not be overwritten, not even with ``force``.
        force: whether existing files may be overwritten.
        size: total size of the files in bytes.

    Raises:
        OutputError: if a file exists and ``force`` is not set or it is one of the inputs, or if the directory is
            missing, not writable, or on a disk with too little free space.
    """
    sources = list(inputs)
    for target in targets:
        _check_name(target, sources, force=force)
    target, folder = targets[0], targets[0].parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {folder} is not writable")
    disk = shutil.disk_usage(folder)
    if size > disk.free and disk.total:  # some network shares say nothing
        raise OutputError(f"{target}: needs {size:,} bytes, but only {disk.free:,} are free on its disk")


def _check_name(target: Path, inputs: Iterable[Path], *, force: bool) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    check_regular(target)
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, expected the name of a file")
    if not target.exists():
        return
    for source in inputs:
        try:
            is_input = _is_part(source, target)
        except FileNotFoundError:  # another process has just removed it
            return
        if is_input:
            raise OutputError(f"{target}: is also an input; choose another name for the output")
    if not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")


def _is_part(source: Path, target: Path) -> bool:
    """Whether ``target`` is the input ``source``, or belongs to the same split model, adapter or checkpoint."""
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
    """Check that a directory can be written at ``target``.

    Args:
        target: path of the directory.
        inputs: paths that must not lie in the directory at any depth, not even with ``force``.
        marker: name of a file that every directory of this kind holds; a directory without it is never written to.
        force: whether the output's files may be replaced in a directory with the marker.

    Raises:
        OutputError: if the directory cannot be written.
    """
    parent = target.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{target}: the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {parent} is not writable")
    check_regular(target)
    if not target.exists():
        return
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise OutputError(f"{target}: exists, but is not a directory with {marker}; choose another name")
    for source in inputs:
        if not source.exists():
            continue
        if source.samefile(target) or source.parent.samefile(target):
            raise OutputError(f"{target}: is also an input; choose another name for the output")
        if _contains(target, source):
            raise OutputError(f"{target}: contains the input {source}; choose another name for the output")
    if not os.access(target, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory is not writable")
    if any(target.iterdir()) and not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")


def _contains(folder: Path, path: Path) -> bool:
    """Whether a path lies in a directory at any depth, as it is written or after its symbolic links."""
    return folder.absolute() in path.absolute().parents or folder.resolve() in path.resolve().parents
