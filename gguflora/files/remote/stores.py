"""fsspec's file systems: opened, listed, and their errors turned into ours."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from gguflora.errors import GgufloraError, MissingExtraError, RemoteError
from gguflora.files.remote.location import Kind, file_name, redacted
from gguflora.files.remote.selection import (
    NAMES,
    PICKLES,
    RemoteFile,
    files_to_fetch,
)
from gguflora.files.shard_names import part_names

_CONTENT: Final = ("ETag", "etag", "md5Hash", "sha")
_TIMES: Final = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created")
_NUMBERS: Final = slice(-len("-00001-of-00002.gguf"), None)
_EXCEPTIONS: Final = {
    "RepositoryNotFoundError": "no such repository, or it is private and HF_TOKEN does not open it",
    "GatedRepoError": "is gated: ask for access on its page and set HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision",
    "RemoteEntryNotFoundError": "the repository has no such file",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE forbids to ask for it",
    "TooManyRedirects": "the server redirects without end",
    "NoCredentialsError": "no credentials were found for this store",
    "DefaultCredentialsError": "no credentials were found for this store",
}
"""What exceptions of huggingface_hub, aiohttp, httpx and of the stores' libraries mean."""

_UNREACHABLE: Final = {"ConnectError", "ConnectTimeout", "ClientConnectorError", "EndpointConnectionError", "gaierror"}
_STATUS: Final = {
    401: "not authorized; are credentials missing or wrong?",
    403: "access denied; are credentials missing, or not enough?",
    404: "no such file",
    429: "the server asks to come back later",
}


def open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL and its path there; listings that it remembers are dropped, as others write, too.

    Raises:
        RemoteError: if the protocol is unknown, or a package for it is missing.
    """
    if not importlib.util.find_spec("fsspec"):
        raise MissingExtraError(f"{redacted(url)}: a remote file", "fsspec", "remote")
    from fsspec.core import url_to_fs  # noqa: PLC0415  (import gguflora does not load it)

    is_web = url.startswith(("http://", "https://"))
    options = {"client_kwargs": {"timeout": _patience()}} if is_web else {}
    with asking(url):
        try:
            store, path = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise RemoteError(f"{redacted(url)}: cannot be opened: {error}") from error
        store.invalidate_cache()
    return store, path


def _patience() -> Any:  # noqa: ANN401  (aiohttp is loaded only here)
    """Any file may take any time, but the server must not fall silent."""
    try:
        import aiohttp  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("http:// or https://", "aiohttp", "remote") from error
    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


@contextmanager
def asking(location: str) -> Iterator[None]:
    """Turn what stores and their libraries raise into one clear error.

    Raises:
        RemoteError: for any of them.
    """
    try:
        yield
    except GgufloraError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise RemoteError(f"{redacted(location)}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception of a store means; those that it was made from say more."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    named = [_EXCEPTIONS[name] for one in chain if (name := type(one).__name__) in _EXCEPTIONS]
    known = named or [text for one in reversed(chain) if (text := _meaning(one))]
    if known:
        return known[0]
    if isinstance(error, FileNotFoundError):
        return f"cannot be reached: {_first_line(chain[-1])}" if len(chain) > 1 else "no such file or folder"
    return _first_line(error)


def _meaning(error: BaseException) -> str | None:
    """What one exception means, where it can be told from its status or class."""
    name = type(error).__name__
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and status >= 400:
        return f"{_STATUS.get(status, 'the server failed')} (HTTP {status})"
    if name in _UNREACHABLE:
        return f"cannot be reached: {_first_line(error)}"
    if isinstance(error, PermissionError):
        return f"{_STATUS[403]} ({_first_line(error)})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk of the cache is full"
    return None


def _first_line(error: BaseException) -> str:
    return f"{(str(error).strip().splitlines() or [''])[0]:.200}" or type(error).__name__


def list_files(url: str, kind: Kind, *, allow_pickle: bool) -> tuple[list[RemoteFile], bool]:
    """The files that a location stands for, and whether it is a folder.

    Raises:
        RemoteError: if it cannot be read, or is not of this kind.
    """
    store, path = open_store(url)
    with asking(url):
        if url.startswith(("http://", "https://")):
            return _list_web(store, url, kind, allow_pickle=allow_pickle)
        entry = store.info(path)
        if entry["type"] != "directory":
            first = remote_file(file_name(url), entry)
            parent = path[: len(path) - len(first.name)]
            others = [(name, f"{parent}{name}") for name in part_names(first.name) if name != first.name]
            return [first, *(remote_file(name, store.info(other)) for name, other in others)], False
        entries = {one["name"].rstrip("/").rpartition("/")[2]: one for one in store.ls(path, detail=True)}
    names = [name for name, one in entries.items() if one["type"] != "directory"]
    chosen = files_to_fetch(url, names, kind, allow_pickle=allow_pickle)
    return [remote_file(name, entries[name]) for name in chosen], True


def _list_web(store: Any, url: str, kind: Kind, *, allow_pickle: bool) -> tuple[list[RemoteFile], bool]:  # noqa: ANN401
    """As `list_files`: web servers have no folders, but names that end in a slash, and perhaps a page of links."""
    entry = store.info(url) if not url.endswith("/") else {"url": url}
    if not entry["url"].endswith("/"):
        own = file_name(url)
        first = remote_file(own, {**entry, "name": url})
        others = [(name, url.replace(own[_NUMBERS], name[_NUMBERS])) for name in part_names(own) if name != own]
        return [first, *(remote_file(name, store.info(other)) for name, other in others)], False
    folder = entry["url"]
    problem: Exception | None = None
    try:
        links = {file_name(link): link for link in store.ls(folder, detail=False) if not link.endswith("/")}
    except Exception as error:  # most servers list nothing, but have the files
        links, problem = {}, error
    candidates = [*links, *NAMES[kind], *(PICKLES.get(kind, ()) if allow_pickle else ())]
    found = {}
    for name in dict.fromkeys(candidates):
        if name in links:
            found[name] = links[name]
        elif store.exists(folder + name):
            found[name] = folder + name
    if problem and not found:
        raise problem
    chosen = files_to_fetch(url, found, kind, allow_pickle=allow_pickle)
    return [remote_file(name, store.info(found[name])) for name in chosen], True


def remote_file(name: str, entry: Mapping[str, Any]) -> RemoteFile:
    """A file of a listing."""
    content = next((str(entry[key]) for key in _CONTENT if entry.get(key)), None)
    weak = content is not None and content.startswith("W/")
    time = next((str(entry[key]) for key in _TIMES if entry.get(key)), "")
    size = entry.get("size")
    return RemoteFile(
        name,
        entry["name"],
        size if isinstance(size, int) else None,
        None if weak or content is None else f"{content.strip(chr(34))} {size}",
        f"{content} {size}" if content else f"{time} {size}" if time else "",
    )


def list_matching(url: str) -> list[str]:
    """All locations that fit a pattern, sorted.

    Raises:
        RemoteError: if the store cannot be asked.
    """
    store, path = open_store(url)
    with asking(url):
        found: Sequence[str] = store.glob(path)
        return sorted(one if "://" in one else store.unstrip_protocol(one) for one in found)
