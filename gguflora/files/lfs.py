"""Recognize Git LFS pointers: small text files that stand for the real ones until these are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gguflora.errors import FormatError

_POINTER: Final = b"version https://git-lfs.github.com/spec/"


def check_fetched(path: Path) -> None:
    """Raise ``FormatError`` if a file is a Git LFS pointer.

    Raises:
        FormatError: the message has the command that fetches the file.
    """
    if not path.is_file():  # opening a named pipe would wait for its writer
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise FormatError(
                f"{path}: is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download "
                "the file"
            )
