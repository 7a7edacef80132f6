"""Hugging Face repositories, ``hf://org/name[@revision][/path]``, fetched by huggingface_hub into its own cache."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote

from gguflora.errors import MissingExtraError, RemoteError
from gguflora.files.checksum import sha256_of
from gguflora.files.remote import cache
from gguflora.files.remote.location import Kind, redacted
from gguflora.files.remote.selection import RemoteFile, check_name, files_to_fetch
from gguflora.files.remote.stores import store_errors
from gguflora.files.shard_names import part_names
from gguflora.system.storage import point, replace

_SCHEME: Final = "hf://"
_LOCATION: Final = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/\w+|[^/@]+))?(?:/(?P<path>.*?))?/?"
)

_HASH: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """A parsed ``hf://`` location.

    Attributes:
        repo: the repository, ``org/name``.
        revision: branch, tag or commit.
        path: path of a file or folder in the repository; empty for the whole repository.
    """

    repo: str
    revision: str
    path: str


def is_hub(url: str) -> bool:
    """Whether a URL is a location on the Hugging Face Hub."""
    return url.startswith(_SCHEME)


def parse_location(url: str) -> HubLocation:
    """Parse an ``hf://`` location.

    Raises:
        RemoteError: if it is malformed.
    """
    match = _LOCATION.fullmatch(url)
    if not match or ".." in (match["path"] or "").split("/"):
        raise RemoteError(
            f"{redacted(url)}: expected hf://org/name, hf://org/name@revision or hf://org/name/path/of/file"
        )
    return HubLocation(match["repo"], unquote(match["revision"] or "main"), match["path"] or "")


def list_files(url: str, kind: Kind, *, offline: bool, allow_pickle: bool) -> tuple[list[RemoteFile], bool]:
    """List the files to fetch for a location, and say whether the location is a folder.

    Raises:
        RemoteError: if the repository cannot be read, or the folder is not of this kind.
    """
    place = parse_location(url)
    files = {file.path: file for file in (_list_cached(url, place) if offline else _list_remote(url, place))}
    if place.path in files:
        folder, _, given = place.path.rpartition("/")
        paths = [place.path, *(_join(folder, name) for name in part_names(given) if name != given)]
        missing = [path for path in paths if path not in files]
        if missing:
            raise RemoteError(f"{redacted(url)}: the repository has no {missing[0]!r}")
        return [files[path] for path in paths], False
    names = [file.name for file in files.values() if file.path == _join(place.path, file.name)]
    if place.path and not any(path.startswith(f"{place.path}/") for path in files):
        raise RemoteError(f"{redacted(url)}: the repository has no such file or folder")
    chosen = files_to_fetch(url, names, kind, allow_pickle=allow_pickle)
    return [files[_join(place.path, name)] for name in chosen], True


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _list_remote(url: str, place: HubLocation) -> list[RemoteFile]:
    """List all files of a repository with one request."""
    api = _library(url).HfApi(endpoint=_endpoint())
    with store_errors(url):
        listed = api.model_info(place.repo, revision=place.revision, files_metadata=True)
    files = []
    for one in listed.siblings or []:
        check_path(url, one.rfilename)
        sha256 = one.lfs.sha256 if one.lfs else None
        content = sha256 or one.blob_id or listed.sha
        files.append(RemoteFile(_name(one.rfilename), one.rfilename, one.size, content, content or "", sha256))
    return files


def _list_cached(url: str, place: HubLocation) -> list[RemoteFile]:
    """List the files of a repository in huggingface_hub's cache, whose blobs are named after their hashes."""
    library = _library(url)
    folder = Path(library.constants.HF_HUB_CACHE) / f"models--{place.repo.replace('/', '--')}"
    reference = folder / "refs" / place.revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else place.revision
    snapshot = folder / "snapshots" / commit
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    if not paths:
        raise cache.not_cached_error(url)
    return [_cached_file(path, str(path.relative_to(snapshot)), commit) for path in paths]


def _cached_file(path: Path, inside: str, commit: str) -> RemoteFile:
    blob = Path(os.path.realpath(path)).name
    content = blob if _HASH.fullmatch(blob) else commit
    return RemoteFile(_name(inside), inside, path.stat().st_size, content, content, _sha256_in(blob))


def _sha256_in(etag: str) -> str | None:
    return etag if _HASH.fullmatch(etag) and len(etag) == 64 else None


def fetch(url: str, files: Sequence[RemoteFile], *, is_folder: bool, offline: bool, sha256: str | None) -> Path:
    """Fetch the files that `list_files` has listed.

    Returns:
        Path of the file; for a folder, of a directory with links to exactly these files.

    Raises:
        RemoteError: if a file cannot be fetched, or its hash is wrong.
    """
    place = parse_location(url)
    paths = [_download(url, place, file, offline=offline, sha256=sha256) for file in files]
    commits = {path.parts[-1 - file.path.count("/") - 1] for path, file in zip(paths, files, strict=True)}
    if len(commits) > 1:
        raise RemoteError(f"{redacted(url)}: the repository was changed while being read; try again")
    return _link_folder(url, place, commits.pop(), paths) if is_folder else paths[0]


def _download(url: str, place: HubLocation, file: RemoteFile, *, offline: bool, sha256: str | None) -> Path:
    """Return the path of a file in huggingface_hub's cache, after checking its hash.

    A cached file that was undamaged before and is damaged now is fetched again.
    """
    while True:
        with store_errors(url):
            fetched = _library(url).hf_hub_download(
                place.repo, file.path, revision=place.revision, endpoint=_endpoint(), local_files_only=offline
            )
        path = Path(fetched)
        blob = Path(os.path.realpath(path))
        with cache.locked(cache.make_folder(cache.cache_folder() / "checksums") / blob.name):
            was_undamaged = cache.has_record(blob)
            found = (None if sha256 else cache.recorded_sha256(blob)) or sha256_of(blob)  # a pinned one is read
            try:
                cache.check_sha256(f"{url}, {file.path}", found, file.sha256, _sha256_in(blob.name))
            except RemoteError:
                cache.remove_record(blob)
                path.unlink()
                blob.unlink(missing_ok=True)
                if was_undamaged and not offline:
                    continue
                raise
            cache.record_sha256(blob, found)
        cache.check_sha256(url, found, sha256)
        return path


def _link_folder(url: str, place: HubLocation, commit: str, files: Sequence[Path]) -> Path:
    """Return a folder with the name of the one on the Hub and links to only these files."""
    names = "\n".join(path.name for path in files)
    name = _name(place.path) or _name(place.repo)
    folder = cache.cache_folder() / "hub" / cache.digest_of(redacted(url), commit, names) / name
    cache.make_folder(folder)
    for path in files:
        link, draft = folder / path.name, folder / f".{path.name}.{os.getpid()}"
        draft.unlink(missing_ok=True)
        point(draft, path)
        replace(draft, link)
    return folder


def list_matching(pattern: str) -> list[str]:
    """List the files and folders of a repository that match a glob pattern, sorted.

    Raises:
        RemoteError: if the repository cannot be read.
    """
    place = parse_location(pattern)
    files = _list_cached(pattern, place) if cache.is_offline(pattern) else _list_remote(pattern, place)
    paths = {path for file in files for path in (file.path, *map(str, PurePosixPath(file.path).parents)) if path != "."}
    from fsspec.utils import glob_translate  # noqa: PLC0415

    path_pattern = re.compile(glob_translate(place.path))
    prefix = pattern[: len(pattern.rstrip("/")) - len(place.path)]
    return sorted(f"{prefix}{path}" for path in paths if path_pattern.match(path))


def check_path(url: str, path: str) -> None:
    """Refuse a path that leads outside the repository's folder.

    Raises:
        RemoteError: if a part of the path is not a plain file name.
    """
    for name in path.split("/"):
        check_name(url, name)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _library(url: str) -> Any:  # noqa: ANN401  (loaded only when a repository is named)
    if not importlib.util.find_spec("huggingface_hub"):
        raise MissingExtraError(f"{redacted(url)}: hf://", "huggingface_hub", "remote")
    import huggingface_hub.constants  # noqa: PLC0415

    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
