"""Select the files of a remote folder to fetch: weights as safetensors, configuration and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.errors import RemoteError
from gguflora.files.remote.location import Kind, redacted

ALLOW_PICKLE: Final = "GGUFLORA_ALLOW_PICKLE"
"""Environment variable; set to 1, it allows fetching ``.bin`` files."""


_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "tokenizer_config.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
NAMES: Final[dict[Kind, tuple[str, ...]]] = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", *_TOKENIZER),
    "model": ("config.json", "model.safetensors.index.json", "model.safetensors"),
    "config": ("config.json",),
    "file": (),
}
"""The files to fetch for each kind of folder; for a model, also its shards."""

PICKLES: Final[dict[Kind, tuple[str, ...]]] = {"adapter": ("adapter_model.bin",)}
_SHARD: Final = re.compile(r"(?!adapter)[^/]+-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a remote store.

    Attributes:
        name: name without the folder.
        path: path in the store.
        size: size in bytes; None if the store does not provide it.
        content: identifier of the content (an ETag or a hash); None if the store does not provide one.
        stamp: text that changes when the file changes; empty if the store provides nothing to form it from.
        sha256: SHA-256 in hexadecimal; None if the store does not provide it.
    """

    name: str
    path: str
    size: int | None
    content: str | None
    stamp: str
    sha256: str | None = None


def files_to_fetch(location: str, names: Iterable[str], kind: Kind, *, allow_pickle: bool) -> list[str]:
    """Select the files of a folder to fetch.

    Args:
        location: the folder, for messages.
        names: names of all files in the folder.
        kind: kind of folder.
        allow_pickle: whether to select ``.bin`` files, too.

    Raises:
        RemoteError: if the folder is not of this kind.
    """
    available = sorted(names)
    known = {*NAMES[kind], *(PICKLES.get(kind, ()) if allow_pickle else ())}
    chosen = [name for name in available if name in known or (kind == "model" and _SHARD.fullmatch(name))]
    problem = _problem(kind, chosen, available)
    if problem:
        raise RemoteError(f"{redacted(location)}: {problem}; found: {', '.join(available)[:300] or 'nothing'}")
    return chosen


def _problem(kind: Kind, chosen: Sequence[str], available: Sequence[str]) -> str | None:
    if kind == "file":
        return "is a folder; name the file in it"
    needed = "adapter_config.json" if kind == "adapter" else "config.json"
    if needed not in chosen:
        gguf = "; name the .gguf file that is meant" if any(name.endswith(".gguf") for name in available) else ""
        return f"holds no {needed}{gguf}"
    if kind == "config" or any(name.endswith((".safetensors", ".bin")) for name in chosen):
        return None
    pickle = any(name.endswith(".bin") for name in available)
    hint = f", only .bin files, which are pickles; {ALLOW_PICKLE}=1 allows them" if pickle and kind == "adapter" else ""
    return f"holds no weights as safetensors{hint}"


def check_name(location: str, name: str) -> None:
    """Refuse a name that could lead out of the cache's folder.

    Raises:
        RemoteError: if the name is not a plain file name.
    """
    if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise RemoteError(f"{redacted(location)}: {name!r} is not a valid file name")
