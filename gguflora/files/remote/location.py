"""Parse locations: tell URLs from local paths, and split off names and checksums."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from gguflora.errors import RemoteError

Kind = Literal["adapter", "model", "config", "file"]
"""Kind of an input: an adapter's folder, a model's folder, a model's folder without its weights, or a single file."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/[^/]")
_FILE_URL: Final = re.compile(r"file:(?://(?:localhost)?)?(/[^#]*)", re.IGNORECASE)
_CHECKSUM: Final = re.compile(r"#sha256=([0-9A-Fa-f]*)$")


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL.

    Raises:
        RemoteError: if it is a ``pathlib.Path`` made from a URL, which has lost a slash.
    """
    if isinstance(location, str):
        return bool(_URL.match(location))
    if cut := _COLLAPSED.match(os.fspath(location)):
        raise RemoteError(
            f"{location}: a Path does not keep the two slashes of a URL; give {cut[1]}://... as a string instead"
        )
    return False


def looks_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is a URL, or a ``pathlib.Path`` made from a URL."""
    return bool(_COLLAPSED.match(os.fspath(location)) or _URL.match(os.fspath(location)))


def local_path(location: str | os.PathLike[str]) -> Path | None:
    """Return the path that a ``file:`` URL names, percent-decoded (RFC 8089); None of any other location."""
    found = _FILE_URL.fullmatch(location) if isinstance(location, str) else None
    return Path(unquote(found[1])) if found else None


def split_checksum(location: str) -> tuple[str, str | None]:
    """Split a URL into the part before its fragment ``#sha256=...`` and the SHA-256, None if there is no fragment.

    Raises:
        RemoteError: if the fragment is not a SHA-256.
    """
    match = _CHECKSUM.search(location)
    if not match:
        return location, None
    if len(match[1]) != 64:
        raise RemoteError(f"{redacted(location)}: #sha256= needs 64 hexadecimal digits, found {len(match[1])}")
    return location[: match.start()], match[1].lower()


def redacted(location: str | os.PathLike[str]) -> str:
    """Return a location without passwords and without queries, which can hold signatures, for use in messages."""
    text = os.fspath(location)
    if not _URL.match(text):
        return text
    scheme, rest = text.split("://", 1)
    rest = rest.split("#", 1)[0].split("?", 1)[0] if scheme in {"http", "https"} else _CHECKSUM.sub("", rest)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host if scheme == 'hf' else host.rpartition('@')[2]}{slash}{path}"


def file_name(location: str | os.PathLike[str]) -> str:
    """Return the last component of a location, without a revision: ``name`` for ``hf://org/name@revision``."""
    text = split_checksum(os.fspath(location))[0]
    if not _URL.match(text):
        return os.path.basename(text.rstrip("/"))  # noqa: PTH119  (a str, as for URLs)
    path = urlsplit(text).path if text.startswith(("http://", "https://")) else text.split("://", 1)[1]
    name = unquote(path.rstrip("/").rpartition("/")[2])
    return name.partition("@")[0] if text.startswith("hf://") else name


def join(folder: str, name: str) -> str:
    """Append a name to the URL of a folder."""
    return f"{folder.rstrip('/')}/{name}"
