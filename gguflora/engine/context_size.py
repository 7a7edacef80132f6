"""Choose the size of a context."""

from __future__ import annotations

import os
from typing import Final

from gguflora.files.gguf import GgufFile

_DEFAULT: Final = 4096


def context_size(base: str | os.PathLike[str], requested: int | None) -> int:
    """Return the number of tokens of a context: as requested, or else the base's training length up to 4096.

    Raises:
        GgufError: if the base cannot be read.
    """
    if requested is not None:
        return requested
    with GgufFile(base) as file:
        trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return min(trained, _DEFAULT) if isinstance(trained, int) and trained > 0 else _DEFAULT
