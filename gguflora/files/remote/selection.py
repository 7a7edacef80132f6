"""Which files of a folder are wanted: weights as safetensors, and what describes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.errors import RemoteError
from gguflora.files.remote.location import Kind, redacted

ALLOW_PICKLE: Final = "GGUFLORA_ALLOW_PICKLE"
"""Environment variable that, set to 1, lets ``.bin`` files be fetched, too."""


_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
NAMES: Final[dict[Kind, tuple[str, ...]]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", *_TOKENIZER),
    "model": ("config.json", "model.safetensors.index.json", "model.safetensors"),
    "config": ("config.json",),
    "file": (),
}
"""The files of a folder that are read, by what it is; a model may have shards, too."""

PICKLES: Final[dict[Kind, tuple[str, ...]]] = {"adapter": ("adapter_model.bin",)}
_SHARD: Final = re.compile(r"(?!adapter)[^/]+-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file elsewhere.

    Attributes:
        name: without its folder.
        path: as its store calls it.
        size: in bytes; None if the store does not say.
        content: identifies the bytes (an ETag or a hash); None if the store has nothing of the kind.
        stamp: changes when the file does; empty if the store has nothing of the kind.
        sha256: of the bytes, in hexadecimal, if the store says.
    """

    name: str
    path: str
    size: int | None
    content: str | None
    stamp: str
    sha256: str | None = None


def files_to_fetch(location: str, names: Iterable[str], kind: Kind, *, allow_pickle: bool) -> list[str]:
    """The files of a folder that are fetched: weights as safetensors, and what describes them.

    Raises:
        RemoteError: if the folder is not of this kind.
    """
    held = sorted(names)
    known = {*NAMES[kind], *(PICKLES.get(kind, ()) if allow_pickle else ())}
    chosen = [name for name in held if name in known or (kind == "model" and _SHARD.fullmatch(name))]
    problem = _problem(kind, chosen, held)
    if problem:
        raise RemoteError(f"{redacted(location)}: {problem}; found: {', '.join(held)[:300] or 'nothing'}")
    return chosen


def _problem(kind: Kind, chosen: Sequence[str], held: Sequence[str]) -> str | None:
    if kind == "file":
        return "is a folder; name the file in it"
    needed = "adapter_config.json" if kind == "adapter" else "config.json"
    if needed not in chosen:
        gguf = "; name the .gguf file that is meant" if any(name.endswith(".gguf") for name in held) else ""
        return f"holds no {needed}{gguf}"
    if kind == "config" or any(name.endswith((".safetensors", ".bin")) for name in chosen):
        return None
    pickle = any(name.endswith(".bin") for name in held)
    hint = f", only .bin files, which are pickles; {ALLOW_PICKLE}=1 allows them" if pickle and kind == "adapter" else ""
    return f"holds no weights as safetensors{hint}"


def check_name(location: str, name: str) -> None:
    """Refuse names that would lead out of the cache's folder.

    Raises:
        RemoteError: if it is one.
    """
    if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise RemoteError(f"{redacted(location)}: {name!r} is no name of a file")
