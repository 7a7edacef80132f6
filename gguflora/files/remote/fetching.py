"""Fetch remote files and folders into the local cache, or ask for their size and version."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gguflora.errors import RemoteError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import cache, hub, stores
from gguflora.files.remote.cache import digest_of, make_folder
from gguflora.files.remote.download import download
from gguflora.files.remote.location import (
    Kind,
    file_name,
    local_path,
    redacted,
    split_checksum,
)
from gguflora.files.remote.selection import ALLOW_PICKLE, RemoteFile, check_name


def fetch(location: str, kind: Kind = "file", *, offline: bool | None = None, allow_pickle: bool | None = None) -> Path:
    """Fetch a file, or the needed files of a folder, unless the cache has their current version.

    Args:
        location: a URL for fsspec, with ``#sha256=...`` to check the file, or ``hf://org/name[@revision][/path]``. For
            a file of a split GGUF model, all its files are fetched.
        kind: kind of folder, which determines the files that are needed.
        offline: use only the cache; by default according to GGUFLORA_OFFLINE and HF_HUB_OFFLINE.
        allow_pickle: also fetch ``.bin`` files; by default according to GGUFLORA_ALLOW_PICKLE.

    Returns:
        Path of the local file or folder.

    Raises:
        RemoteError: if a file cannot be read, or its checksum is wrong.
        OutputError: if the cache cannot be written.
    """
    url, sha256 = split_checksum(location)
    offline = cache.is_offline(url) if offline is None else offline
    if is_local(url):
        return _local(url, sha256)
    if offline and not hub.is_hub(url):
        path = _newest(url)
        if sha256 is not None and path.is_file():
            cache.check_sha256(url, sha256_of(path), sha256)
        return path
    files, is_folder = _list(url, kind, offline=offline, allow_pickle=allow_pickle)
    if sha256 and (is_folder or len(files) > 1):
        raise RemoteError(f"{redacted(url)}: is not a single file, so #sha256= cannot be checked")
    if hub.is_hub(url):
        return hub.fetch(url, files, is_folder=is_folder, offline=offline, sha256=sha256)
    version = digest_of(*(f"{file.name} {file.stamp}" for file in files))
    name = file_name(url)
    check_name(url, name)
    folder = make_folder(_cache_folder(url) / version / name if is_folder else _cache_folder(url) / version)
    store, _ = stores.open_store(url)
    for file in files:
        download(store, file, folder / file.name, sha256)
    os.utime(folder)  # offline, the version with the latest time is used
    return folder if is_folder else folder / name


@dataclass(frozen=True, slots=True)
class Found:
    """Version and size of a remote file or folder.

    Attributes:
        content: identifier of the content; None if the store does not provide one.
        size: total size in bytes of the files that `fetch` would fetch; None if the store does not provide it.
    """

    content: str | None
    size: int | None


def stat(location: str, kind: Kind = "file") -> Found:
    """Ask the store for the version and size of a location, without fetching it.

    Raises:
        RemoteError: if the location does not exist, or cannot be read.
    """
    url, sha256 = split_checksum(location)
    if is_local(url) or (cache.is_offline(url) and not hub.is_hub(url)):
        fetch(location, kind)
        return Found(None, None)
    files, _ = _list(url, kind, offline=cache.is_offline(url), allow_pickle=None)
    known = [file.size for file in files if file.size is not None]
    contents = [f"{file.name} {file.content}" for file in files if file.content]
    content = hashlib.sha256("\n".join(contents).encode()).hexdigest() if len(contents) == len(files) else None
    return Found(sha256 or content, sum(known) if len(known) == len(files) else None)


def list_matching(pattern: str) -> list[str]:
    """List all locations that match a pattern with ``*``, ``?`` or ``[...]``, sorted.

    Raises:
        RemoteError: if the store reports an error.
    """
    return hub.list_matching(pattern) if hub.is_hub(pattern) else stores.list_matching(pattern)


def _list(url: str, kind: Kind, *, offline: bool, allow_pickle: bool | None) -> tuple[list[RemoteFile], bool]:
    pickles = cache.is_enabled(ALLOW_PICKLE) if allow_pickle is None else allow_pickle
    if hub.is_hub(url):
        files, is_folder = hub.list_files(url, kind, offline=offline, allow_pickle=pickles)
    else:
        files, is_folder = stores.list_files(url, kind, allow_pickle=pickles)
    for file in files:
        check_name(url, file.name)
    return files, is_folder


def is_local(url: str) -> bool:
    """Whether a URL names a file of this machine."""
    return local_path(url) is not None or url.startswith("local://")


def _local(url: str, sha256: str | None) -> Path:
    path = local_path(url) or Path(url.removeprefix("local://"))
    if not path.exists():
        raise RemoteError(f"{url}: no such file or directory")
    if sha256 and (path.is_dir() or sha256_of(path) != sha256):
        raise RemoteError(f"{url}: its SHA-256 is not {sha256}")
    return path


def _cache_folder(url: str) -> Path:
    return cache.cache_folder() / "files" / digest_of(url)


def _newest(url: str) -> Path:
    """Return the cached version of a file or folder that was fetched last."""
    versions = [path for path in _cache_folder(url).glob(f"*/{glob.escape(file_name(url))}") if path.exists()]
    if not versions:
        raise cache.not_cached_error(url)
    return max(versions, key=lambda path: (path if path.is_dir() else path.parent).stat().st_mtime_ns)
