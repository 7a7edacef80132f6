"""The local cache of remote files: its folder, a lock for each file, and the recorded SHA-256 of each file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from gguflora.errors import OutputError, RemoteError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote.location import redacted
from gguflora.files.strict_json import to_json
from gguflora.system.descriptors import open_file
from gguflora.system.locks import lock
from gguflora.system.memory import read_bytes
from gguflora.system.processes import user_key
from gguflora.system.storage import replace

MAX_DOWNLOAD: Final = "GGUFLORA_MAX_DOWNLOAD"
"""The environment variable that --max-download sets."""


def cache_folder() -> Path:
    """Return ``$GGUFLORA_CACHE``, or by default ``gguflora`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    folder = os.environ.get("GGUFLORA_CACHE")
    return Path(folder) if folder else user_cache() / "gguflora"


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME``, or by default ``~/.cache``; in a container without a home, a folder for this user."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given)
    with suppress(RuntimeError):  # no HOME, and a user that the system does not know
        return Path.home() / ".cache"
    return Path(tempfile.gettempdir()) / f"cache-{user_key()}"


def is_offline(url: str) -> bool:
    """Whether network access is disabled for a URL: by GGUFLORA_OFFLINE, or by HF_HUB_OFFLINE for ``hf://``."""
    if url.startswith(("file://", "local://", "memory://")):
        return False
    return is_enabled("GGUFLORA_OFFLINE") or (url.startswith("hf://") and is_enabled("HF_HUB_OFFLINE"))


def not_cached_error(url: str) -> RemoteError:
    """Return the error for a file that is needed offline but not in the cache."""
    variable = "GGUFLORA_OFFLINE" if is_enabled("GGUFLORA_OFFLINE") else "HF_HUB_OFFLINE"
    return RemoteError(f"{redacted(url)}: was not fetched before, and {variable} forbids fetching it now")


def is_enabled(variable: str) -> bool:
    """Whether an environment variable is set to 1, on, yes or true."""
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def max_download() -> int:
    """Return the largest number of bytes of one file that is fetched: $GGUFLORA_MAX_DOWNLOAD, by default 1 TiB.

    Raises:
        UsageError: if the variable is no size.
    """
    return read_bytes(os.environ.get(MAX_DOWNLOAD) or "1T", MAX_DOWNLOAD)


def digest_of(*texts: str) -> str:
    """Return a short name for some texts: the first 24 hexadecimal digits of their SHA-256."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:24]


def make_folder(folder: Path) -> Path:
    """Create a folder of the cache, unless it exists.

    Raises:
        OutputError: if it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: the cache cannot be written: {error.strerror}; set GGUFLORA_CACHE to another directory"
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file of the cache, across threads and processes."""
    handle = open_file(path.with_name(f".{path.name}.lock"), write=True, create=True, follow=False, mode=0o666)
    try:
        lock(handle)  # not all file systems have locks
        yield
    finally:
        os.close(handle)


def recorded_sha256(path: Path) -> str | None:
    """Return the recorded SHA-256 of a file; None if there is no record, or the file has changed since.

    A file with the recorded size and modification time counts as unchanged. Any other file is hashed again.
    """
    record = _record_path(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == _stamp(path):
            return str(known["sha256"])
        if sha256_of(path) == known["sha256"]:
            record_sha256(path, known["sha256"])
            return str(known["sha256"])
    return None


def record_sha256(path: Path, sha256: str) -> None:
    """Record the SHA-256 of a file that has been checked."""
    record = _record_path(path)
    make_folder(record.parent)
    draft = record.with_suffix(f".{os.getpid()}.new")
    draft.write_text(to_json({"path": str(path), "stamp": _stamp(path), "sha256": sha256}), encoding="utf-8")
    replace(draft, record)


def has_record(path: Path) -> bool:
    """Whether the SHA-256 of a file was recorded, so the file was undamaged at that time."""
    return _record_path(path).exists()


def remove_record(path: Path) -> None:
    """Remove the record of a file's SHA-256, if there is one."""
    _record_path(path).unlink(missing_ok=True)


def check_sha256(location: str, found: str, *expected: str | None) -> None:
    """Compare a file's SHA-256 with the expected ones.

    Args:
        location: location of the file, for messages.
        found: SHA-256 of the file.
        expected: SHA-256 from each source that may know it; None where it does not.

    Raises:
        RemoteError: if they differ.
    """
    for sha256 in expected:
        if sha256 is not None and sha256 != found:
            raise RemoteError(
                f"{redacted(location)}: its SHA-256 is {found}, expected {sha256}; the file was damaged during the "
                "transfer, or replaced"
            )


def _record_path(path: Path) -> Path:
    return cache_folder() / "checksums" / f"{digest_of(os.path.realpath(path))}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
