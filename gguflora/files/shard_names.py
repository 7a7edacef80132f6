"""The file names of a split model in llama.cpp: ``name-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PART_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """Return the names of all files of a split model, given any of them; for any other name, only that name."""
    match = PART_NAME.fullmatch(name)
    count = int(match[3]) if match else 1
    if not match or not 0 < int(match[2]) <= count:
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, count + 1)]


def part_paths(path: Path, count: int) -> tuple[Path, ...]:
    """Return the paths of the files of a model that is split into ``count`` files.

    Args:
        path: path of the model (``model.gguf``), or of any of its files (``model-00001-of-00003.gguf``).
        count: number of files; for 1 the result is ``path`` itself.
    """
    if count == 1:
        return (path,)
    match = PART_NAME.fullmatch(path.name)
    stem = match[1] if match else path.name.removesuffix(".gguf")
    return tuple(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def same_split(path: Path, other: Path) -> bool:
    """Whether two paths are in one directory and have names of the same split model."""
    one, two = (PART_NAME.fullmatch(name.resolve().name) for name in (path, other))
    return bool(one and two and one.group(1, 3) == two.group(1, 3) and path.resolve().parent == other.resolve().parent)
