"""The cache of remote files: where they lie, one download of a file at a time, hashes checked before use."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gguflora.errors import OutputError, RemoteError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote.location import redacted


def cache_folder() -> Path:
    """``$GGUFLORA_CACHE``, or ``gguflora`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("GGUFLORA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gguflora"


def is_offline(url: str) -> bool:
    """Whether nobody may be asked: GGUFLORA_OFFLINE says so for all stores, HF_HUB_OFFLINE for the Hub."""
    if url.startswith(("file://", "local://", "memory://")):
        return False
    return is_on("GGUFLORA_OFFLINE") or (url.startswith("hf://") and is_on("HF_HUB_OFFLINE"))


def not_fetched(url: str) -> RemoteError:
    """The error of a file that is asked for offline and not in the cache."""
    variable = "GGUFLORA_OFFLINE" if is_on("GGUFLORA_OFFLINE") else "HF_HUB_OFFLINE"
    return RemoteError(f"{redacted(url)}: was not fetched before, and {variable} forbids to fetch it now")


def is_on(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def digest_of(*texts: str) -> str:
    """A short name for texts of any length."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def make_folder(folder: Path) -> Path:
    """Make a folder of the cache.

    Raises:
        OutputError: if that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the cache cannot be written: {error.strerror}; set GGUFLORA_CACHE") from error
    return folder


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Only one process or thread at a time is inside for this file."""
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def recorded_sha256(path: Path) -> str | None:
    """SHA-256 of a file that was recorded when it came; None if there is none, or the file is another by now.

    A file of the same size and time is taken for unchanged, any other is read again.
    """
    record = _record_of(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == _stamp(path):
            return str(known["sha256"])
        if sha256_of(path) == known["sha256"]:
            record_sha256(path, known["sha256"])
            return str(known["sha256"])
    return None


def record_sha256(path: Path, sha256: str) -> None:
    """Remember the SHA-256 of a file."""
    record = _record_of(path)
    make_folder(record.parent)
    draft = record.with_suffix(f".{os.getpid()}.new")
    draft.write_text(json.dumps({"path": str(path), "stamp": _stamp(path), "sha256": sha256}), encoding="utf-8")
    draft.replace(record)


def has_record(path: Path) -> bool:
    """Whether a file was found sound before."""
    return _record_of(path).exists()


def forget(path: Path) -> None:
    """Drop the record of a file."""
    _record_of(path).unlink(missing_ok=True)


def check_sha256(location: str, found: str, *expected: str | None) -> None:
    """Compare a file's SHA-256 with those that are known of it.

    Raises:
        RemoteError: if it is another.
    """
    for one in expected:
        if one is not None and one != found:
            raise RemoteError(
                f"{redacted(location)}: its SHA-256 is {found}, expected {one}; it was damaged on its way or replaced"
            )


def _record_of(path: Path) -> Path:
    return cache_folder() / "checksums" / f"{digest_of(os.path.realpath(path))}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
