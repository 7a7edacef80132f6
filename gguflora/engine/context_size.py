"""How many tokens of context to ask for."""

from __future__ import annotations

import os
from typing import Final

from gguflora.files.gguf import GgufFile

_DEFAULT: Final = 4096


def context_size(base: str | os.PathLike[str], asked: int | None) -> int:
    """Tokens of context: as asked, else as the base was trained with, but not more than 4096.

    Raises:
        GgufError: if the base cannot be read.
    """
    if asked is not None:
        return asked
    with GgufFile(base) as file:
        trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return min(trained, _DEFAULT) if isinstance(trained, int) and trained > 0 else _DEFAULT
