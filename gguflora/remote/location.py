"""What a location says: whether it is remote, its name, its checksum, and which files of a folder are wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from gguflora.errors import RemoteError

Kind = Literal["adapter", "model", "config", "file"]
"""What a folder is fetched as: an adapter, a model with its weights, its configuration only; ``file`` is no folder."""

ALLOW_PICKLE: Final = "GGUFLORA_ALLOW_PICKLE"
"""Environment variable that, set to 1, lets ``.bin`` files be fetched, too."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")
_CHECKSUM: Final = re.compile(r"#sha256=([0-9A-Fa-f]*)$")
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

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


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL.

    Raises:
        RemoteError: if it is a ``pathlib.Path`` of a URL, which is a URL no more.
    """
    if isinstance(location, str):
        return bool(_URL.match(location))
    if cut := _COLLAPSED.match(os.fspath(location)):
        raise RemoteError(
            f"{location}: a Path does not keep the two slashes of a URL; give {cut[1]}://... as a string instead"
        )
    return False


def split_checksum(location: str) -> tuple[str, str | None]:
    """A URL and the SHA-256 of its fragment ``#sha256=...``.

    Raises:
        RemoteError: if that is no SHA-256.
    """
    found = _CHECKSUM.search(location)
    if not found:
        return location, None
    if len(found[1]) != 64:
        raise RemoteError(f"{shown(location)}: #sha256= needs 64 hexadecimal digits, found {len(found[1])}")
    return location[: found.start()], found[1].lower()


def shown(location: str | os.PathLike[str]) -> str:
    """A location as messages may show it: without passwords, and without queries, which hold signatures."""
    text = os.fspath(location)
    if not _URL.match(text):
        return text
    scheme, rest = text.split("://", 1)
    rest = rest.split("#", 1)[0].split("?", 1)[0] if scheme in {"http", "https"} else _CHECKSUM.sub("", rest)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host if scheme == 'hf' else host.rpartition('@')[2]}{slash}{path}"


def file_name(location: str | os.PathLike[str]) -> str:
    """The last part of a location: of ``hf://org/name@revision`` it is ``name``."""
    text = split_checksum(os.fspath(location))[0]
    if not _URL.match(text):
        return os.path.basename(text.rstrip("/"))  # noqa: PTH119  (of any location)
    path = urlsplit(text).path if text.startswith(("http://", "https://")) else text.split("://", 1)[1]
    name = unquote(path.rstrip("/").rpartition("/")[2])
    return name.partition("@")[0] if text.startswith("hf://") else name


def join(folder: str, name: str) -> str:
    """The URL of a name below a folder's."""
    return f"{folder.rstrip('/')}/{name}"


def parts_of(name: str) -> list[str]:
    """The files of a split GGUF model, of which this is one; of any other file its own name."""
    found = _PART.fullmatch(name)
    count = int(found[3]) if found else 1
    if not found or not 0 < int(found[2]) <= count:
        return [name]
    return [f"{found[1]}-{number:05}-of-{found[3]}.gguf" for number in range(1, count + 1)]


def wanted(location: str, names: Iterable[str], kind: Kind, *, allow_pickle: bool) -> list[str]:
    """The files of a folder that are fetched: weights as safetensors, and what describes them.

    Raises:
        RemoteError: if the folder is not of this kind.
    """
    held = sorted(names)
    known = {*NAMES[kind], *(PICKLES.get(kind, ()) if allow_pickle else ())}
    chosen = [name for name in held if name in known or (kind == "model" and _SHARD.fullmatch(name))]
    problem = _problem(kind, chosen, held)
    if problem:
        raise RemoteError(f"{shown(location)}: {problem}; found: {', '.join(held)[:300] or 'nothing'}")
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
        raise RemoteError(f"{shown(location)}: {name!r} is no name of a file")
