"""What may be an output: a regular file, or a new name. One rule for all that gguflora writes.

Output is renamed to its place, so a device or a FIFO there would be replaced by a file, and a link would lose the file
that it names. They are refused. Text and pictures (`write_output`) go through devices and FIFOs to their readers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from gguflora.errors import OutputError
from gguflora.files.shard_names import same_split
from gguflora.system import names
from gguflora.system.descriptors import own_descriptor

_WEIGHTS: Final = {".safetensors", ".bin", ".gguf", ".npz", ".jsonl"}
_CONFIGS: Final = {
    "adapter_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "model.safetensors.index.json",
}  # fmt: skip
"""Files of the folder of a model or an adapter that no report replaces."""
_KINDS: Final = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def check_regular(target: Path) -> None:
    """Check that nothing but a regular file or a directory is at ``target``; nothing at all is fine, too.

    Raises:
        OutputError: if it is a device, a FIFO, a socket or a symbolic link, or Windows takes no file of this name.
    """
    if kind := _special_kind(target):
        raise OutputError(f"{target}: is {kind}, which a complete file cannot replace; give the name of a file")
    if names.CHECKS_NAMES and (problem := names.problem_of_name(target.name)):
        raise OutputError(f"{target}: {target.name!r} {problem}; choose another name")
    try:
        named = target.parent / target.readlink()
    except OSError:  # nothing is there, or no link
        return
    raise OutputError(f"{target}: is a link to {named}; give that name, or remove the link")


def _special_kind(path: Path) -> str | None:
    """Return what a path names, links followed, if it is a device, a FIFO or a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return _KINDS.get(stat.S_IFMT(mode)) or ("an open file" if own_descriptor(path) is not None else None)


def check_text_target(target: Path, *, force: bool) -> None:
    """Check, before the work, that `write_output` can write to ``target``.

    Args:
        target: path of a report or a picture; devices, FIFOs and ``/dev/stdout`` are fine.
        force: whether to replace a file that exists.

    Raises:
        OutputError: if it exists and ``force`` is not set, is a directory, a link or a socket, or its directory is
            missing or not writable.
    """
    if _is_written_through(target):
        return
    check_regular(target)
    if target.is_dir():
        raise OutputError(f"{target}: is a directory, expected the name of a file")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the directory {target.parent} is not writable")
    if target.exists() and not force:
        raise OutputError(f"{target}: already exists; choose another name, or overwrite it with --force")


def check_text_targets(
    targets: Iterable[Path | None], others: Iterable[str | os.PathLike[str] | None], *, force: bool
) -> None:
    """Check, before the work, that reports and pictures can be written, and replace no file of the command.

    Args:
        targets: their paths; None is left out.
        others: the inputs and outputs of the command: files, and folders of models and adapters; None is left out.
        force: whether to replace files that exist.

    Raises:
        OutputError: as `check_text_target`; or if a target is one of the others, or is given twice.
    """
    named = [Path(other) for other in others if other is not None]
    for target in filter(None, targets):
        check_text_target(target, force=force)
        if _is_written_through(target):
            continue
        clash = next((other for other in named if _is_of(target, other)), None)
        if clash is not None:
            raise OutputError(f"{target}: would replace {clash}, which the command uses; choose another name")
        named.append(target)


def _is_of(target: Path, other: Path) -> bool:
    """Whether a path is another one, a part of the same split model, or a file of the other's model or adapter."""
    place, known = (Path(os.path.realpath(path)) for path in (target, other))
    is_inside = place.parent == known and (place.suffix in _WEIGHTS or place.name in _CONFIGS)
    return place == known or is_inside or same_split(place, known)


def write_output(target: Path, content: bytes) -> None:
    """Write a report or a picture: through a device or a FIFO to who reads it, else as a file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    from gguflora.files.atomic import atomic_output  # noqa: PLC0415  (which checks its targets with this module)

    if not _is_written_through(target):
        with atomic_output(target) as file:
            file.write(content)
        return
    descriptor = own_descriptor(target)
    try:
        with open(os.dup(descriptor) if descriptor is not None else target, "wb", buffering=0) as stream:  # noqa: PTH123
            view = memoryview(content)
            while view:
                view = view[stream.write(view) :]
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _is_written_through(target: Path) -> bool:
    return _special_kind(target) in {"a device", "a FIFO", "an open file"} or own_descriptor(target) is not None


def save_figure(figure: Any, target: Path, **options: Any) -> None:  # noqa: ANN401  (matplotlib)
    """Draw a matplotlib figure into a file whose suffix names the format; PNG if it has none.

    Raises:
        OutputError: if the format is unknown, or the file cannot be written.
    """
    picture = BytesIO()
    try:
        figure.savefig(picture, format=target.suffix[1:] or "png", **options)
    except ValueError as error:
        raise OutputError(f"{target}: cannot be written: {error}") from error
    write_output(target, picture.getvalue())
