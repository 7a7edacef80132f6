"""How llama.cpp names the files of a split model: ``name-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

PART_NAME: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_names(name: str) -> list[str]:
    """The names of all files of a split model, by that of any of them; any other name is its own."""
    found = PART_NAME.fullmatch(name)
    count = int(found[3]) if found else 1
    if not found or not 0 < int(found[2]) <= count:
        return [name]
    return [f"{found[1]}-{number:05}-of-{found[3]}.gguf" for number in range(1, count + 1)]


def part_paths(path: Path, count: int) -> tuple[Path, ...]:
    """Names of the files of a model split into ``count``, from the name of the whole or of any of them.

    ``model.gguf`` gives ``model-00001-of-00003.gguf`` and so on; of one file it is the name itself.
    """
    if count == 1:
        return (path,)
    found = PART_NAME.fullmatch(path.name)
    stem = found[1] if found else path.name.removesuffix(".gguf")
    return tuple(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def same_split(path: Path, other: Path) -> bool:
    """Whether two files are, by their names and place, of the same split model."""
    one, two = (PART_NAME.fullmatch(name.resolve().name) for name in (path, other))
    return bool(one and two and one.group(1, 3) == two.group(1, 3) and path.resolve().parent == other.resolve().parent)
