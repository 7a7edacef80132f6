"""A directory whose adapters are loaded when a request first names them, within a limit of memory.

A request *holds* its adapters until the engine has counted it as their user. An adapter that is neither held nor used
may leave memory for another one, the least recently used first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from gguflora.engine.adapter_sets import check_name
from gguflora.engine.registry import LoadedAdapter
from gguflora.errors import (
    AdapterNameError,
    EngineClosedError,
    EngineError,
    GgufloraError,
    QueueFullError,
    RequestError,
)
from gguflora.files.checksum import sha256_of

_LOG: Final = logging.getLogger(__name__)
_MARKS: Final = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
"""Files that make a directory an adapter of PEFT or mlx-lm."""

_WEIGHTS: Final = (".safetensors", ".bin", ".gguf")

_WAIT_SECONDS: Final = 60.0
"""How long a request waits for adapters under other requests to make room."""

_MAX_NAME: Final = 200
"""File systems allow 255 bytes, and raise an error beyond."""

_LOOK_SECONDS: Final = 0.02
_MAX_WAITING: Final = 24

Signature: TypeAlias = tuple[tuple[str, int, int, int, int], ...]
"""Name, size, times of change and inode of each file: while it is equal, no file is read again."""


class AdapterHost(Protocol):
    """What loads the adapters: an engine."""

    def load(self, path: str | os.PathLike[str], name: str | None = None, *, replace: bool = False) -> LoadedAdapter:
        """Load an adapter."""

    def unload(self, name: str) -> None:
        """Unload an adapter."""


@dataclass(slots=True)
class _Entry:
    """An adapter of the folder that requests have named.

    Attributes:
        name: its name.
        adapter: what is loaded of it; None while nothing is.
        signature: signature of the files when they were last read.
        content: hash of these files.
        size: bytes that it takes in memory; before it is loaded, an estimate.
        holders: number of requests that hold it.
        used: time of the last use, in seconds of the monotonic clock.
        loading: held while the files are compared or loaded.
    """

    name: str
    adapter: LoadedAdapter | None = None
    signature: Signature = ()
    content: str = ""
    size: int = 0
    holders: int = 0
    used: float = 0.0
    loading: threading.Lock = field(default_factory=threading.Lock)


class AdapterFolder:
    """The adapters of a directory: subdirectories of PEFT or mlx-lm, and GGUF LoRA files. Thread-safe.

    Args:
        folder: the directory.
        memory: largest number of bytes of its loaded adapters together; None sets no limit.
        host: loads and unloads them.
        users: returns the adapter that is loaded under a name and the number of its users, or None.

    Raises:
        EngineError: if there is no such directory.
    """

    def __init__(
        self,
        folder: Path,
        memory: int | None,
        host: AdapterHost,
        users: Callable[[str], tuple[LoadedAdapter, int] | None],
    ) -> None:
        if not folder.is_dir():
            raise EngineError(f"{folder}: is not a directory; expected one with adapters in it")
        self._folder = folder
        self._memory = memory
        self._host = host
        self._users = users
        self._entries: dict[str, _Entry] = {}
        self._room = threading.Condition()
        self._n_waiting = 0
        for name in sorted(set(self._found()) - set(self.names())):
            _LOG.warning("%s: requests cannot name %r: spaces and @ + = , have a meaning there", folder, name)

    def names(self) -> list[str]:
        """Return the names of all adapters in the folder, sorted."""
        return sorted(name for name in set(self._found()) if _is_name(name))

    def find(self, name: str) -> Path | None:
        """Return the path of the adapter with this name; None if there is none.

        Raises:
            RequestError: if a directory and a file have the name.
        """
        if not _is_name(name):
            return None
        folder, file = self._folder / name, self._folder / f"{name}.gguf"
        paths = [path for path, is_there in ((folder, _is_adapter_folder(folder)), (file, file.is_file())) if is_there]
        if len(paths) > 1:
            raise RequestError(
                f"the directory {name!r} and the file '{name}.gguf' are both adapters; rename one of them"
            )
        return paths[0] if paths else None

    @contextmanager
    def hold(self, names: Sequence[str]) -> Iterator[None]:
        """Load those adapters that belong to the folder, and keep them loaded for the length of a ``with`` block.

        A loaded adapter whose files have changed is replaced. Names of other adapters are passed over.

        Raises:
            QueueFullError: if there is no room for them because of adapters under other requests.
            RequestError: if one cannot be loaded, or if they need more memory together than the limit.
        """
        paths = {name: path for name in names if not self._is_foreign(name) and (path := self.find(name)) is not None}
        entries = self._take(paths)
        try:
            for entry in entries:
                with entry.loading:
                    self._bring(entry, paths[entry.name])
            yield
        finally:
            with self._room:
                for entry in entries:
                    entry.holders -= 1
                    entry.used = time.monotonic()
                self._room.notify_all()

    def _found(self) -> Iterator[str]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.endswith(".gguf") and entry.is_file():
                    yield entry.name.removesuffix(".gguf")
                elif entry.is_dir() and _is_adapter_folder(Path(entry.path)):
                    yield entry.name

    def _loaded(self, entry: _Entry) -> LoadedAdapter | None:
        """Return what is loaded of an entry, unless somebody else has unloaded or replaced it."""
        known = self._users(entry.name)
        is_ours = known is not None and entry.adapter is not None and known[0].load_id == entry.adapter.load_id
        return entry.adapter if is_ours else None

    def _is_foreign(self, name: str) -> bool:
        """Return whether an adapter from elsewhere is loaded under this name."""
        entry = self._entries.get(name)
        return self._users(name) is not None and (entry is None or self._loaded(entry) is None)

    def _take(self, paths: dict[str, Path]) -> list[_Entry]:
        """Make room for adapters and hold them, all or none."""
        signatures = {name: _signature(path) for name, path in paths.items()}
        end = time.monotonic() + _WAIT_SECONDS
        with self._room:
            entries = [self._entries.setdefault(name, _Entry(name)) for name in paths]
            for entry in entries:
                signature = signatures[entry.name]
                if signature != entry.signature and not self._loaded(entry):
                    entry.size = sum(size for name, size, *_ in signature if name.endswith(_WEIGHTS))
            self._check_size(entries)
            while not self._make_room(entries):
                if self._n_waiting >= _MAX_WAITING or time.monotonic() > end:
                    raise QueueFullError("the memory for adapters is full of adapters at work; try again later")
                self._n_waiting += 1
                self._room.wait(_LOOK_SECONDS)  # the engine does not tell when a request ends
                self._n_waiting -= 1
            for entry in entries:
                entry.holders += 1
            return entries

    def _check_size(self, entries: Sequence[_Entry]) -> None:
        needed = sum(entry.size for entry in entries)
        if self._memory is not None and needed > self._memory:
            names = ", ".join(repr(entry.name) for entry in entries)
            raise RequestError(
                f"{names}: needs {needed} bytes, but the memory for adapters is limited to {self._memory} bytes"
            )

    def _make_room(self, entries: Sequence[_Entry]) -> bool:
        """Unload the least recently used adapters until these fit; return whether they do."""
        if self._memory is None:
            return True
        others = [each for each in self._entries.values() if each not in entries and self._takes_memory(each)]
        excess = sum(entry.size for entry in [*entries, *others]) - self._memory
        idle = sorted((each for each in others if self._is_idle(each)), key=lambda each: each.used)
        if excess > sum(each.size for each in idle):
            return False
        for entry in idle:
            if excess <= 0:
                break
            self._leave(entry)
            excess -= entry.size
        return True

    def _takes_memory(self, entry: _Entry) -> bool:
        return entry.holders > 0 or self._loaded(entry) is not None

    def _is_idle(self, entry: _Entry) -> bool:
        known = self._users(entry.name)
        return entry.holders == 0 and known is not None and known[1] == 0

    def _leave(self, entry: _Entry) -> None:
        with suppress(AdapterNameError):  # somebody else may have just unloaded it
            self._host.unload(entry.name)
        entry.adapter = None

    def _bring(self, entry: _Entry, path: Path) -> None:
        """Load an adapter unless what is loaded has the content of its files."""
        signature, loaded = _signature(path), self._loaded(entry)
        if loaded and signature == entry.signature:
            return
        content = _content(path)
        if not loaded or content != entry.content:
            try:
                entry.adapter = self._host.load(path, entry.name, replace=loaded is not None)
            except EngineClosedError:
                raise
            except (GgufloraError, OSError) as error:
                raise RequestError(f"the adapter {entry.name!r} cannot be loaded: {error}") from error
            entry.size = entry.adapter.size
        entry.signature, entry.content = signature, content


def _is_name(name: str) -> bool:
    """Return whether requests can name an adapter of the folder so; no name leads out of the folder."""
    if name.startswith(".") or "\0" in name or "/" in name or os.sep in name:
        return False
    try:
        check_name(name)
        return len(name.encode()) <= _MAX_NAME
    except (AdapterNameError, UnicodeEncodeError):
        return False


def _is_adapter_folder(path: Path) -> bool:
    return any((path / mark).exists() for mark in _MARKS)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _signature(path: Path) -> Signature:
    try:
        stats = [(file.name, file.stat()) for file in _files(path)]
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    return tuple((name, each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for name, each in stats)


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            digest.update(f"\0{file.name}\0{sha256_of(file)}".encode())
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
