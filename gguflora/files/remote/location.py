"""What a location says: whether it is remote, its name, its checksum."""

from __future__ import annotations

import os
import re
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from gguflora.errors import RemoteError

Kind = Literal["adapter", "model", "config", "file"]
"""What a folder is fetched as: an adapter, a model with its weights, its configuration only; ``file`` is no folder."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")
_CHECKSUM: Final = re.compile(r"#sha256=([0-9A-Fa-f]*)$")


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


def looks_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL, or was one before it became a ``pathlib.Path``."""
    return bool(_COLLAPSED.match(os.fspath(location)) or _URL.match(os.fspath(location)))


def split_checksum(location: str) -> tuple[str, str | None]:
    """A URL and the SHA-256 of its fragment ``#sha256=...``.

    Raises:
        RemoteError: if that is no SHA-256.
    """
    found = _CHECKSUM.search(location)
    if not found:
        return location, None
    if len(found[1]) != 64:
        raise RemoteError(f"{redacted(location)}: #sha256= needs 64 hexadecimal digits, found {len(found[1])}")
    return location[: found.start()], found[1].lower()


def redacted(location: str | os.PathLike[str]) -> str:
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
