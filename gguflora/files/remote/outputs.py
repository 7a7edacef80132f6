"""Outputs elsewhere: files that appear whole, folders whose marker appears last, and small files of a pipeline."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora.errors import OutputError, RemoteError
from gguflora.files.remote.hub import is_hub
from gguflora.files.remote.location import redacted
from gguflora.files.remote.stores import asking, open_store, remote_file

_OBJECT_STORES: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Object stores: what is put there appears whole or not at all. Elsewhere files get their names when they are whole."""

_AT_A_TIME: Final = 256
_MARKER: Final = "adapter_config.json"


def put(source: Path, url: str) -> None:
    """Copy a file or a folder of files to its place, replacing what is there.

    A file appears whole or not at all. Of a folder, ``adapter_config.json`` goes first and comes last: without it a
    folder is no adapter.

    Raises:
        RemoteError: if the store refuses.
    """
    store, path = open_store(_checked(url))
    with asking(url):
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
            if entry["type"] == "file" and entry["name"].rpartition("/")[2] not in names:
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
    """Whether it has no folders to make; asked for one, s3fs would make a bucket."""
    protocols = {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)
    return bool(protocols & _OBJECT_STORES)


def write_bytes(url: str, content: bytes) -> None:
    """Write a small file, whole or not at all.

    Raises:
        OutputError: if the store refuses.
    """
    try:
        store, path = open_store(_checked(url))
        with asking(url):
            draft = path if _is_object_store(store) else f"{path}.{secrets.token_hex(4)}.partial"
            store.pipe_file(draft, content)
            if draft != path:
                store.mv(draft, path)
    except RemoteError as error:
        raise OutputError(str(error)) from error


def create_bytes(url: str, content: bytes) -> bool:
    """Write a small file that must not be there yet; False if it is.

    Raises:
        OutputError: if the store refuses.
    """
    try:
        store, path = open_store(_checked(url))
        with asking(url):
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
    """The content of a small file; None if it is not there.

    Raises:
        RemoteError: if the store refuses.
    """
    store, path = open_store(url)
    with asking(url):
        try:
            content: bytes = store.cat_file(path)
        except FileNotFoundError:
            return None
    return content


def remove(url: str) -> None:
    """Remove a file, if it is there.

    Raises:
        RemoteError: if the store refuses.
    """
    store, path = open_store(url)
    with asking(url), suppress(FileNotFoundError):
        store.rm_file(path)


def read_all(url: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a folder's small files; none if it is not there.

    Raises:
        RemoteError: if the store refuses.
    """
    store, path = open_store(url)
    with asking(url):
        if not store.isdir(path):
            return
        paths = [entry["name"] for entry in store.ls(path, detail=True) if entry["name"].endswith(suffix)]
        for first in range(0, len(paths), _AT_A_TIME):
            contents: dict[str, bytes] = store.cat(paths[first : first + _AT_A_TIME])  # at once, where the store can
            yield from ((path.rpartition("/")[2], content) for path, content in contents.items())


def stamps_of(url: str) -> dict[str, str]:
    """Sizes and stamps of all files below a location, by what follows it in their names; a file's own is ''.

    Raises:
        RemoteError: if the store refuses.
    """
    store, path = open_store(url)
    with asking(url):
        found = store.find(path, detail=True)
    start = len(store._strip_protocol(path))
    return {name[start:].lstrip("/"): remote_file("", {"name": name, **entry}).stamp for name, entry in found.items()}


def _checked(url: str) -> str:
    """The URL, unless nothing is ever written there."""
    if url.startswith(("http://", "https://")) or is_hub(url):
        raise RemoteError(
            f"{redacted(url)}: cannot be written; outputs go to a folder, or to s3://, gs:// and the like"
        )
    return url


def writable(url: str) -> str:
    """The URL without slashes at its end.

    Raises:
        RemoteError: if nothing can be written there, a package for it is missing, or the store cannot be asked.
    """
    url = _checked(url).rstrip("/")
    store, path = open_store(url)
    with asking(url), suppress(FileNotFoundError):
        store.info(f"{path}/{_MARKER}")
    return url
