"""The keys that clients send, and the names of their holders."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers

from gguflora.errors import ServerError
from gguflora.server.errors import Failure
from gguflora.server.settings import KEY_VARIABLE, Settings

_LINE: Final = re.compile(r"(\S+)\s+(\S(?:.*\S)?)")
_MAX_BYTES: Final = 1 << 20

CACHE_OWNER: ContextVar[str] = ContextVar("cache_owner", default="")
"""Whose part of the KV cache the current request may use; empty is the part of all."""


def read_keys(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file of keys: on each line a key, a space, and the name of its holder; ``#`` begins a comment line.

    Returns:
        Names by key.

    Raises:
        ServerError: if the file cannot be read, a line has no name, a key is given twice, or there is no key.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{path}: the file of keys cannot be read: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ServerError(f"{path}: line {number} is not a key, a space and a name")
        if found[1] in keys:
            raise ServerError(f"{path}: line {number} has the key of {keys[found[1]]!r} again")
        keys[found[1]] = found[2]
    if not keys or len(content) > _MAX_BYTES:
        raise ServerError(f"{path}: expected from 1 key up to {_MAX_BYTES} bytes of keys")
    return keys


def check_key(headers: Headers, settings: Settings) -> str:
    """Return the name of the holder of a request's key; an empty name where no key is needed or it has no name.

    Raises:
        Failure: 401 if a key is needed and the request has none that is known.
    """
    known = keys_of(settings)
    if not known:
        return ""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")  # as Anthropic's clients send it
    given = key.strip().encode("latin-1")
    names = [name for expected, name in known.items() if hmac.compare_digest(given, expected.encode())]  # compares all
    if not names:
        raise Failure(401, f"send the server's {KEY_VARIABLE} as 'Authorization: Bearer KEY'", "invalid_api_key")
    return names[0]


def keys_of(settings: Settings) -> Mapping[str, str]:
    """Return all keys with the names of their holders."""
    single = {} if settings.api_key is None else {settings.api_key: ""}
    return {**single, **settings.api_keys}


def owner_of(name: str, settings: Settings) -> str:
    """Return the `CACHE_OWNER` of the requests of a key's holder."""
    return f"key {name}" if settings.private_cache else ""
