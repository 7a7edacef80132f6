"""Download a file from a store in pieces, and resume after an interruption."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import IO, Any, Final

from gguflora.errors import OutputError, RemoteError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import cache
from gguflora.files.remote.location import redacted
from gguflora.files.remote.selection import RemoteFile
from gguflora.files.remote.stores import reason, store_errors
from gguflora.system.storage import replace

_LOG = logging.getLogger("gguflora.files.remote")
_PIECE: Final = 16 << 20
_CHUNK: Final = 1 << 20
_ATTEMPTS: Final = 5
"""Number of consecutive attempts without progress after which a download fails."""


def download(store: Any, file: RemoteFile, target: Path, sha256: str | None) -> None:  # noqa: ANN401  (fsspec)
    """Download a file to ``target``, unless it is there already.

    The bytes are first written to ``<target>.part``. A later attempt, also by another process, resumes from that file.

    Args:
        store: fsspec's file system.
        file: the remote file.
        target: local path.
        sha256: expected SHA-256; None if it is not known.

    Raises:
        RemoteError: if the store fails, or the size or the SHA-256 is not the expected one.
        OutputError: if the disk has too little free space.
    """
    with cache.locked(target):
        known = cache.recorded_sha256(target) if file.stamp and target.exists() else None
        if known and (sha256 is None or sha256_of(target) == known):  # others may forge records of a shared cache
            cache.check_sha256(file.path, known, sha256, file.sha256)
            return
        limit = cache.max_download()
        if file.size is not None and file.size > limit:
            raise _too_large(file, limit)
        target.unlink(missing_ok=True)
        part = target.with_name(f"{target.name}.part")
        if not file.stamp:  # the partial file may come from another version
            part.unlink(missing_ok=True)
        _check_free_space(file, part)
        _LOG.info("fetching %s", redacted(file.path))
        _download_with_retries(store, file, part)
        found = sha256_of(part)
        try:
            cache.check_sha256(file.path, found, sha256, file.sha256)
        except RemoteError:
            part.unlink()
            raise
        replace(part, target)
        cache.record_sha256(target, found)


def _check_free_space(file: RemoteFile, part: Path) -> None:
    needed = (file.size or 0) - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OutputError(
            f"{redacted(file.path)}: needs {needed:,} bytes in the cache {cache.cache_folder()}, but only {free:,} are "
            "free; set GGUFLORA_CACHE to a directory on another disk"
        )


def _download_with_retries(store: Any, file: RemoteFile, part: Path) -> None:  # noqa: ANN401
    """Download the rest of the file, and retry as long as attempts make progress."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            with store_errors(file.path):
                return _append(store, file, part)
        except RemoteError as error:
            received = part.stat().st_size if part.exists() else 0
            failures = 1 if received > before else failures + 1
            if failures >= _ATTEMPTS or _is_permanent(error.__cause__):
                raise
            _LOG.warning("%s; resuming at byte %d", error, received)
            time.sleep(min(0.1 * 2**failures, 5.0))


def _is_permanent(error: BaseException | None) -> bool:
    """Whether a retry cannot succeed."""
    if error is None or isinstance(error, FileNotFoundError | PermissionError | NotImplementedError):
        return True
    status = getattr(error, "status", None)
    return "redirects" in reason(error) or (isinstance(status, int) and 400 <= status < 500 and status != 429)


def _append(store: Any, file: RemoteFile, part: Path) -> None:  # noqa: ANN401
    limit = cache.max_download()
    with part.open("ab") as target:
        if file.path.startswith(("http://", "https://")):
            _stream(store, file, target, limit)
        else:
            _read_ranges(store, file, target, limit)
        size = target.tell()
    if size > limit:
        part.unlink()
        raise _too_large(file, limit)
    if file.size is not None and size > file.size:
        part.unlink()
        raise RemoteError(f"{redacted(file.path)}: is longer than the {file.size:,} bytes that the store announced")
    if file.size is not None and size < file.size:
        raise ConnectionError(f"ended after {size:,} of {file.size:,} bytes")


def _too_large(file: RemoteFile, limit: int) -> RemoteError:
    size = "more than the" if file.size is None else f"{file.size:,} bytes, more than the"
    return RemoteError(
        f"{redacted(file.path)}: has {size} {limit:,} bytes that one file may have; --max-download allows more"
    )


def _read_ranges(store: Any, file: RemoteFile, target: IO[bytes], limit: int) -> None:  # noqa: ANN401
    size = file.size
    while size is None or target.tell() < size:
        stop = target.tell() + _PIECE if size is None else min(target.tell() + _PIECE, size)
        piece = store.cat_file(file.path, start=target.tell(), end=stop)
        target.write(piece)
        if len(piece) < _PIECE or target.tell() > limit:
            return


def _stream(store: Any, file: RemoteFile, target: IO[bytes], limit: int) -> None:  # noqa: ANN401
    """Request all missing bytes at once. A server that ignores ranges sends the whole file again."""
    done = target.tell()
    if file.size is not None and done == file.size:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with store.open(file.path, "rb", block_size=0, size=1, headers=headers) as stream:
        stream.r.raise_for_status()
        encoding = stream.r.headers.get("Content-Encoding", "identity")
        if encoding.lower() not in {"identity", ""}:  # it was not asked for, and 0.3 MB may become 300
            raise RemoteError(
                f"{redacted(file.path)}: the server sends it encoded ({encoding!r:.40}), which is refused"
            )
        etag = stream.r.headers.get("ETag")
        if file.content and etag and file.content.split(" ")[0] != etag.strip('"'):
            raise RemoteError(f"{redacted(file.path)}: was changed while being read; try again")
        if done and stream.r.status != 206:
            target.truncate(0)
            target.seek(0)
        while chunk := stream.read(_CHUNK):
            target.write(chunk)
            if target.tell() > (limit if file.size is None else min(file.size, limit)):
                return
