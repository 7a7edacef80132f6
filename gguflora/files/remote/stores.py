"""Open and list fsspec's file systems, and translate their errors."""

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
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE forbids requests to the Hub",
    "TooManyRedirects": "the server redirects without end",
    "NoCredentialsError": "no credentials were found for this store",
    "DefaultCredentialsError": "no credentials were found for this store",
}
"""Messages for exceptions of huggingface_hub, aiohttp, httpx and the stores' libraries, by class name."""

_UNREACHABLE: Final = {"ConnectError", "ConnectTimeout", "ClientConnectorError", "EndpointConnectionError", "gaierror"}
_STATUS: Final = {
    401: "not authorized; are credentials missing or wrong?",
    403: "access denied; are credentials missing, or not enough?",
    404: "no such file",
    429: "too many requests; try again later",
}


def open_store(url: str) -> tuple[Any, str]:
    """Open the file system of a URL, and return it with the path in it.

    fsspec's cached listings are dropped, because other processes may have written to the store.

    Raises:
        MissingExtraError: if fsspec or aiohttp is not installed.
        RemoteError: if the protocol is unknown, or a package for it is missing.
    """
    if not importlib.util.find_spec("fsspec"):
        raise MissingExtraError(f"{redacted(url)}: a remote file", "fsspec", "remote")
    from fsspec.core import url_to_fs  # noqa: PLC0415  (import gguflora does not load it)

    is_web = url.startswith(("http://", "https://"))
    options: dict[str, Any] = {}
    if is_web:  # proxies and .netrc as in requests and curl; botocore takes proxies of its own accord
        options = {"client_kwargs": {"timeout": _timeout(), "trust_env": True}}
    elif url.startswith(("gs://", "gcs://")):
        options = {"session_kwargs": {"trust_env": True}}
    with store_errors(url):
        try:
            store, path = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise RemoteError(f"{redacted(url)}: cannot be opened: {error}") from error
        store.invalidate_cache()
    return store, path


def _timeout() -> Any:  # noqa: ANN401  (aiohttp is loaded only here)
    """Return a timeout that does not limit the whole download, only the time without a response."""
    try:
        import aiohttp  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("http:// or https://", "aiohttp", "remote") from error
    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


@contextmanager
def store_errors(location: str) -> Iterator[None]:
    """Translate exceptions of stores and their libraries into `RemoteError`.

    Raises:
        RemoteError: if the block raises anything but a `GgufloraError`.
    """
    try:
        yield
    except GgufloraError:
        raise
    except Exception as error:  # every store has its own exceptions
        raise RemoteError(f"{redacted(location)}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Describe an exception of a store, by the most informative exception in its chain of causes."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    named = [_EXCEPTIONS[name] for cause in chain if (name := type(cause).__name__) in _EXCEPTIONS]
    reasons = named or [text for cause in reversed(chain) if (text := _single_reason(cause))]
    if reasons:
        return reasons[0]
    if isinstance(error, FileNotFoundError):
        return f"cannot be reached: {_first_line(chain[-1])}" if len(chain) > 1 else "no such file or folder"
    return _first_line(error)


def _single_reason(error: BaseException) -> str | None:
    """Describe one exception by its HTTP status or class; None if neither is known."""
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
    """List the files to fetch for a location, and say whether the location is a folder.

    Raises:
        RemoteError: if the location cannot be read, or the folder is not of this kind.
    """
    store, path = open_store(url)
    with store_errors(url):
        if url.startswith(("http://", "https://")):
            return _list_web(store, url, kind, allow_pickle=allow_pickle)
        entry = store.info(path)
        if entry["type"] != "directory":
            first = remote_file(file_name(url), entry)
            parent = path[: len(path) - len(first.name)]
            others = [(name, f"{parent}{name}") for name in part_names(first.name) if name != first.name]
            return [first, *(remote_file(name, store.info(other)) for name, other in others)], False
        entries = {item["name"].rstrip("/").rpartition("/")[2]: item for item in store.ls(path, detail=True)}
    names = [name for name, item in entries.items() if item["type"] != "directory"]
    chosen = files_to_fetch(url, names, kind, allow_pickle=allow_pickle)
    return [remote_file(name, entries[name]) for name in chosen], True


def _list_web(store: Any, url: str, kind: Kind, *, allow_pickle: bool) -> tuple[list[RemoteFile], bool]:  # noqa: ANN401
    """List files on a web server, like `list_files`.

    A web server has no folders. A URL that ends in a slash counts as one; it may or may not serve a page of links.
    """
    entry = store.info(url) if not url.endswith("/") else {"url": url}
    if not entry["url"].endswith("/"):
        given = file_name(url)
        first = remote_file(given, {**entry, "name": url})
        others = [(name, url.replace(given[_NUMBERS], name[_NUMBERS])) for name in part_names(given) if name != given]
        return [first, *(remote_file(name, store.info(other)) for name, other in others)], False
    folder = entry["url"]
    problem: Exception | None = None
    try:
        links = {file_name(link): link for link in store.ls(folder, detail=False) if not link.endswith("/")}
    except Exception as error:  # most servers serve no listing, but may have the files
        links, problem = {}, error
    candidates = [*links, *NAMES[kind], *(PICKLES.get(kind, ()) if allow_pickle else ())]
    urls = {}
    for name in dict.fromkeys(candidates):
        if name in links:
            urls[name] = links[name]
        elif store.exists(folder + name):
            urls[name] = folder + name
    if problem and not urls:
        raise problem
    chosen = files_to_fetch(url, urls, kind, allow_pickle=allow_pickle)
    return [remote_file(name, store.info(urls[name])) for name in chosen], True


def remote_file(name: str, entry: Mapping[str, Any]) -> RemoteFile:
    """Convert an entry of fsspec's listings to a `RemoteFile`."""
    content = next((str(entry[key]) for key in _CONTENT if entry.get(key)), None)
    weak = content is not None and content.startswith("W/")  # a weak ETag does not identify the bytes
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
    """List all locations that match a glob pattern, sorted.

    Raises:
        RemoteError: if the store reports an error.
    """
    store, path = open_store(url)
    with store_errors(url):
        matches: Sequence[str] = store.glob(path)
        return sorted(match if "://" in match else store.unstrip_protocol(match) for match in matches)
