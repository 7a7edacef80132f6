"""Write and read files in remote stores: outputs, which are uploaded atomically, and small files of a pipeline."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from gguflora.errors import OutputError, RemoteError
from gguflora.files.output_checks import ADAPTER_WEIGHTS
from gguflora.files.remote.hub import is_hub
from gguflora.files.remote.location import redacted
from gguflora.files.remote.stores import open_store, remote_file, store_errors

_OBJECT_STORES: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Protocols of object stores, where an upload is atomic. In other stores a file is renamed when it is complete."""

_FILES_PER_REQUEST: Final = 256
_MARKER: Final = "adapter_config.json"


def put(source: Path, url: str) -> None:
    """Upload a file or a folder of files, and replace the files of the same names and a former adapter's weights.

    A file appears completely or not at all. In a folder, an old ``adapter_config.json`` is removed first, and the new
    one uploaded last: without it, an incomplete folder does not look like an adapter.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(_checked(url))
    with store_errors(url):
        if not source.is_dir():
            _put_file(store, source, path)
            return
        files = sorted((file for file in source.iterdir() if file.is_file()), key=lambda file: file.name == _MARKER)
        names = {file.name for file in files}
        marker = f"{path}/{_MARKER}"
        if store.exists(marker):
            store.rm_file(marker)
        for file in files:
            _put_file(store, file, f"{path}/{file.name}")
        for entry in store.ls(path, detail=True):
            name = entry["name"].rpartition("/")[2]
            if entry["type"] == "file" and name not in names and any(fnmatch(name, form) for form in ADAPTER_WEIGHTS):
                store.rm_file(entry["name"])


def _put_file(store: Any, source: Path, path: str) -> None:  # noqa: ANN401  (fsspec)
    folder, _, name = path.rpartition("/")
    if _is_object_store(store):
        store.put_file(str(source), path)
        return
    store.makedirs(folder, exist_ok=True)
    draft = f"{folder}/.{name}.{secrets.token_hex(4)}.partial"
    try:
        store.put_file(str(source), draft)
        store.mv(draft, path)
    except BaseException:
        with suppress(Exception):
            store.rm_file(draft)
        raise


def _is_object_store(store: Any) -> bool:  # noqa: ANN401
    """Whether a store has no folders to create; s3fs would create a bucket instead."""
    protocols = {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)
    return bool(protocols & _OBJECT_STORES)


def write_bytes(url: str, content: bytes) -> None:
    """Write a small file atomically.

    Raises:
        OutputError: if the store reports an error.
    """
    try:
        store, path = open_store(_checked(url))
        with store_errors(url):
            draft = path if _is_object_store(store) else f"{path}.{secrets.token_hex(4)}.partial"
            store.pipe_file(draft, content)
            if draft != path:
                store.mv(draft, path)
    except RemoteError as error:
        raise OutputError(str(error)) from error


def create_bytes(url: str, content: bytes) -> bool:
    """Create a small file; return False if it exists already.

    Raises:
        OutputError: if the store reports an error.
    """
    try:
        store, path = open_store(_checked(url))
        with store_errors(url):
            try:
                if not _is_object_store(store):
                    store.makedirs(path.rpartition("/")[0], exist_ok=True)
                store.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
    except RemoteError as error:
        raise OutputError(str(error)) from error
    return True


def read_bytes(url: str) -> bytes | None:
    """Read a small file; return None if it does not exist.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(url)
    with store_errors(url):
        try:
            content: bytes = store.cat_file(path)
        except FileNotFoundError:
            return None
    return content


def remove(url: str) -> None:
    """Remove a file, if it exists.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(url)
    with store_errors(url), suppress(FileNotFoundError):
        store.rm_file(path)


def read_all(url: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of a folder's small files with a suffix; nothing if the folder does not exist.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(url)
    with store_errors(url):
        if not store.isdir(path):
            return
        paths = [entry["name"] for entry in store.ls(path, detail=True) if entry["name"].endswith(suffix)]
        for start in range(0, len(paths), _FILES_PER_REQUEST):
            contents: dict[str, bytes] = store.cat(
                paths[start : start + _FILES_PER_REQUEST]
            )  # concurrent in most stores
            yield from ((path.rpartition("/")[2], content) for path, content in contents.items())


def stamps_of(url: str) -> dict[str, str]:
    """Return the stamp of every file in a folder, by its path in the folder; if ``url`` is a file, its path is ''.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(url)
    with store_errors(url):
        entries = store.find(path, detail=True)
    start = len(store._strip_protocol(path))
    return {name[start:].lstrip("/"): remote_file("", {"name": name, **entry}).stamp for name, entry in entries.items()}


def _checked(url: str) -> str:
    """Return the URL, or raise ``RemoteError`` if its store is read-only."""
    if url.startswith(("http://", "https://")) or is_hub(url):
        raise RemoteError(
            f"{redacted(url)}: cannot be written; write to a local folder, or to a store such as s3:// or gs://"
        )
    return url


def writable(url: str) -> str:
    """Check that outputs can be written to a URL, and return it without slashes at the end.

    Raises:
        RemoteError: if the store is read-only or cannot be reached, or a package for it is missing.
    """
    url = _checked(url).rstrip("/")
    store, path = open_store(url)
    with store_errors(url), suppress(FileNotFoundError):
        store.info(f"{path}/{_MARKER}")
    return url
