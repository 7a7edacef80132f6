"""Lock an output folder, local or remote, so that only one pipeline writes to it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.errors import GgufloraError, OutputError
from gguflora.files import remote
from gguflora.files.strict_json import to_json
from gguflora.pipeline.locations import STATE, Location
from gguflora.pipeline.state import as_object, check_own_folder
from gguflora.system.descriptors import open_file, read_at, write_at
from gguflora.system.locks import try_lock
from gguflora.system.storage import sync_file

_LOG = logging.getLogger("gguflora.pipeline")
_LOCK: Final = "lock"
BEAT: Final = 20.0
"""Seconds between renewals of the lock of a remote folder."""
STALE: Final = 180.0
"""Seconds without a renewal after which the owner of a lock counts as dead."""


class LockLostError(OutputError):
    """Another run may have taken over the output folder."""


@dataclass(frozen=True, slots=True)
class FolderLock:
    """A lock that this process holds.

    Attributes:
        location: its file, which names the holder as long as it holds the lock.
        token: a text that no other holder has.
        problem: returns why the lock is lost, or None.
    """

    location: Location
    token: str
    problem: Callable[[], str | None] = lambda: None

    def check(self) -> None:
        """Raise ``LockLostError`` if another run may have taken over."""
        if (problem := self.problem()) is not None:
            raise LockLostError(problem)


def is_held(location: Location, token: str) -> bool:
    """Return whether a lock is still held by who has the token; a job asks before its output takes its place.

    Raises:
        RemoteError: if the store cannot be read.
        OSError: if the file cannot.
    """
    if isinstance(location, str):
        return (_read_holder(location) or {}).get("token") == token
    with suppress(FileNotFoundError):
        return token in location.read_text("utf-8", "replace").split()
    return False


@contextmanager
def locked(folder: Location) -> Iterator[FolderLock]:
    """Lock an output folder; create it if it is missing.

    Raises:
        OutputError: if another run has locked it, or it cannot be written.
    """
    with _locked_path(folder) if isinstance(folder, Path) else _locked_url(folder) as lock:
        yield lock


@contextmanager
def _locked_path(folder: Path) -> Iterator[FolderLock]:
    check_own_folder(folder)
    location, token = folder / STATE / _LOCK, secrets.token_hex(8)
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        handle = open_file(location, write=True, create=True, follow=False, mode=0o666)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        try:
            if not try_lock(handle):
                _LOG.warning("%s: its file system has no locks; do not run two pipelines on it at once", folder)
        except BlockingIOError as error:
            holder = read_at(handle, 32, 0).decode(errors="replace").partition(" ")[0]
            raise OutputError(f"{folder}: another pipeline (process {holder}) is writing to it") from error
        _write_holder(handle, f"{os.getpid()} {token}")
        try:
            yield FolderLock(location, token)
        finally:
            _write_holder(handle, "")
    finally:
        os.close(handle)


def _write_holder(handle: int, text: str) -> None:
    """Write who holds a local lock, so that other machines that share the folder see it."""
    with suppress(OSError):  # a full disk; the lock itself holds
        os.ftruncate(handle, 0)
        write_at(handle, text.encode(), 0)
        sync_file(handle)


@contextmanager
def _locked_url(folder: str) -> Iterator[FolderLock]:
    """Lock with a file that only one process can create and that its owner renews, because stores have no locks."""
    lock, token, ended = remote.join(folder, f"{STATE}/{_LOCK}"), secrets.token_hex(8), threading.Event()
    if not remote.create_bytes(lock, _lock_content(token)):
        _take_over(folder, lock, token)
    problems: list[str] = []
    renewer = threading.Thread(target=_renew, args=(lock, token, ended, problems), daemon=True)
    renewer.start()
    try:
        yield FolderLock(lock, token, lambda: problems[0] if problems else None)
    finally:
        ended.set()
        renewer.join()
        with suppress(GgufloraError):  # otherwise it becomes stale
            if (_read_holder(lock) or {}).get("token") == token:
                remote.remove(lock)


def _lock_content(token: str) -> bytes:
    owner = {"host": socket.gethostname(), "process": os.getpid(), "token": token, "time": time.time()}
    return to_json(owner).encode()


def _read_holder(lock: str) -> dict[str, Any] | None:
    """Return what the owner of a lock wrote, empty if it is damaged; None if nobody holds it.

    Raises:
        RemoteError: if the store cannot be read, so that its owner may be alive.
    """
    content = remote.read_bytes(lock)
    return None if content is None else as_object(content) or {}


def _take_over(folder: str, lock: str, token: str) -> None:
    """Take over a lock whose owner died. If several processes try, one succeeds.

    Raises:
        OutputError: if the owner is alive, or another process is taking over.
        RemoteError: if the store cannot be read.
    """
    holder = _read_holder(lock)
    if holder is None:  # its owner has ended in the meantime
        if not remote.create_bytes(lock, _lock_content(token)):
            raise OutputError(f"{folder}: another pipeline has just begun to write to it")
        return
    since = holder.get("time")
    silent = time.time() - (since if isinstance(since, int | float) else 0.0)
    owner = f"process {holder.get('process')} on {holder.get('host')}"
    if silent < STALE:
        raise OutputError(
            f"{folder}: another pipeline ({owner}) is writing to it; if it was killed, it is taken for dead "
            f"{STALE:.0f} s after its last sign of life, which was {silent:.0f} s ago"
        )
    heir = f"{lock}-after-{holder.get('token', 'nobody')}"
    if not remote.create_bytes(heir, _lock_content(token)):
        raise OutputError(f"{folder}: another pipeline is taking it over from {owner}; if none is, remove {heir}")
    if _read_holder(lock) != holder:  # another one took over, and was done with it, since this one looked
        remote.remove(heir)
        raise OutputError(f"{folder}: another pipeline has taken it over from {owner}")
    _LOG.warning("%s: taking over from %s, silent for %.0f s", folder, owner, silent)
    remote.write_bytes(lock, _lock_content(token))
    remote.remove(heir)


def _renew(lock: str, token: str, ended: threading.Event, problems: list[str]) -> None:
    """Renew a lock until the run has ended; add to ``problems`` if another run has, or may have, taken it over."""
    folder, renewed = lock.removesuffix(f"/{STATE}/{_LOCK}"), time.monotonic()
    while not problems and not ended.wait(BEAT):
        with suppress(GgufloraError):  # the next one may succeed
            if (_read_holder(lock) or {}).get("token") in {token, None}:
                remote.write_bytes(lock, _lock_content(token))
                renewed = time.monotonic()
            else:
                problems.append(f"{folder}: another pipeline has taken over; this one was silent for too long")
        if not problems and time.monotonic() - renewed > STALE:
            problems.append(
                f"{folder}: the store took no sign of life for {STALE:.0f} s, so another pipeline may take over"
            )
    for problem in problems:
        _LOG.error("%s", problem)
