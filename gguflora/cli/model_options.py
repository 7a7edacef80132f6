"""Options of the commands that run a model: ``--lora [NAME=]PATH``, ``--ctx``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import typer

from gguflora.files.gguf import GgufFile

_DEFAULT_CONTEXT: Final = 4096


def context_size(base: Path, asked: int | None) -> int:
    """Tokens of context: as asked, else as the base was trained with, but not more than 4096.

    Raises:
        GgufError: if the base cannot be read.
    """
    if asked is not None:
        return asked
    with GgufFile(base) as file:
        trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return min(trained, _DEFAULT_CONTEXT) if isinstance(trained, int) and trained > 0 else _DEFAULT_CONTEXT


def named_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Files by name; a path without a name is called as its file or directory.

    Raises:
        typer.BadParameter: if a name or path is empty, or a name given twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, path = _split_name(text)
        if not name or not path.name:
            raise typer.BadParameter(f"the adapter is {text!r}, expected NAME=PATH, for example legal=legal.gguf")
        if name in found:
            raise typer.BadParameter(f"two adapters are named {name!r}; name them with NAME=PATH")
        found[name] = path
    return found


def scaled_adapters(texts: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Files and scales by name.

    Raises:
        typer.BadParameter: if there is no scale, or it is no number.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in texts:
        rest, _, scale = text.rpartition(":")
        name, path = _split_name(rest)
        try:
            found[name] = path, float(scale)
        except ValueError:
            raise typer.BadParameter(f"--lora-scaled is {text!r}, expected [NAME=]PATH:SCALE") from None
    return found


def _split_name(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    location = Path(path if equals else text)
    return (name if equals else location.stem if location.suffix == ".gguf" else location.resolve().name), location
