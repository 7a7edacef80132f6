"""The state that a pipeline keeps between runs: hashes of inputs, and what each output was made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.adapters.tokenizer import TEMPLATE_FILES, TEMPLATE_FOLDER, TOKENIZER_FILES
from gguflora.files import remote
from gguflora.files.atomic import atomic_output
from gguflora.files.checksum import sha256_of
from gguflora.files.shard_names import part_names
from gguflora.files.strict_json import strict
from gguflora.pipeline.plan import STATE, Location, PipelineJob, canonical

_HASHES: Final = "hashes.json"
_TICK: Final = 20_000_000
"""Longest step of a file system's clock in nanoseconds: two ticks of a kernel with 100 a second."""
_READ: Final = {
    "adapter": re.compile(
        "|".join(
            [r"adapter_config\.json|adapter_model.*|adapters\..*", *map(re.escape, TOKENIZER_FILES + TEMPLATE_FILES)]
        )
    ),
    "config": re.compile(r"config\.json"),
}
"""Names of the files of a folder that commands read."""


class Keys:
    """Computes the keys of jobs: hashes of everything that their outputs depend on.

    For remote inputs the store's own hashes are used if it has any. Hashes of local files are saved with size and
    modification time, so that unchanged models are not read again.

    Args:
        folder: location of the output folder.
        found: metadata of the remote inputs, by location.
    """

    def __init__(self, folder: Location, found: Mapping[str, remote.Found]) -> None:
        self._file, self._found = inside(folder, _HASHES), found
        self._known: dict[str, list[Any]] = _read_json(self._file) or {}
        self._keys: dict[Location, str] = {}
        self._is_changed = False

    def key_of(self, job: PipelineJob) -> str:
        """Return the key of a job. Call it first for the jobs that make its inputs.

        Raises:
            RemoteError: if an input cannot be read.
        """
        inputs = [self._keys.get(canonical(item)) or self._content(item, kind) for item, kind in job.inputs.items()]
        names = {str(location): f"input {number}" for number, location in enumerate(job.inputs)}
        parts = {
            "version": __version__,
            "action": job.action,
            "inputs": inputs,
            "names": [_name_of(item) for item in job.inputs],
        }
        name = remote.file_name(str(job.out))
        text = json.dumps({**parts, "arguments": job.arguments, "name": name}, sort_keys=True, default=str)
        for path, label in sorted(names.items(), key=lambda entry: -len(entry[0])):
            text = text.replace(json.dumps(path), json.dumps(label))
        self._keys[job.out] = hashlib.sha256(text.encode()).hexdigest()
        return self._keys[job.out]

    def _content(self, location: Location, kind: remote.Kind) -> str:
        if isinstance(location, str):
            return self._found[location].content or self._content(remote.fetch(location, kind), kind)
        files = _files_read(location, kind)
        if files == [location]:
            return self.hash_of(location)
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(location.parent)} {self.hash_of(file)}\n".encode())
        return digest.hexdigest()

    def hash_of(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is read only if it may have changed."""
        resolved, stamp = str(path.resolve()), _stamp_of(path)
        known = self._known.get(resolved, [])
        if known[:-1] != stamp:
            known = [*stamp, sha256_of(path)]
            self._known[resolved], self._is_changed = known, True
        return str(known[-1])

    def save(self) -> None:
        """Save the hashes for the next run."""
        if self._is_changed:
            write_json(self._file, dict(self._known))


class Records:
    """Records in the output folder of what each output was made from."""

    def __init__(self, folder: Location, hash_of: Callable[[Path], str]) -> None:
        self._folder, self._hash_of = folder, hash_of
        self._packed: dict[str, bytes] = {}
        self._stamps: dict[str, dict[str, str]] = {}
        if isinstance(folder, str):  # read all at once: reading each would take one or two requests
            records = remote.read_all(remote.join(folder, STATE), ".json")
            self._packed = {name: zlib.compress(content, 1) for name, content in records}
            self._add_stamps(remote.stamps_of(folder))

    def kept_report(self, job: PipelineJob, key: str) -> dict[str, Any] | None:
        """Return the report of a job whose output exists and is up to date, else None."""
        location = inside(self._folder, _record_name(job))
        packed = self._packed.get(_record_name(job))
        record = _read_json(location) if isinstance(location, Path) else packed and _as_object(zlib.decompress(packed))
        if not record or record.get("key") != key or record.get("stamp") != self._stamp(job):
            return None
        report = record.get("report")
        return report if isinstance(report, dict) else None

    def remember(self, job: PipelineJob, key: str, report: Mapping[str, Any]) -> None:
        """Record a finished job."""
        if isinstance(job.out, str):
            stamps = remote.stamps_of(job.out)
            self._add_stamps({f"{job.name}/{name}".rstrip("/"): stamp for name, stamp in stamps.items()})
        content = {"key": key, "out": str(job.out), "stamp": self._stamp(job), "report": report}
        write_json(inside(self._folder, _record_name(job)), content)

    def forget(self, job: PipelineJob) -> None:
        """Remove a job's record, so that the job runs again even if its output stays."""
        if isinstance(self._folder, Path) or self._packed.pop(_record_name(job), None) is not None:
            discard(inside(self._folder, _record_name(job)))
        self._stamps.pop(job.name, None)

    def _add_stamps(self, stamps: Mapping[str, str]) -> None:
        """Add the stamps of files in the output folder, grouped by directory."""
        for path, stamp in stamps.items():
            folder, _, name = path.rpartition("/")
            self._stamps.setdefault(folder, {})[name] = stamp

    def _stamp(self, job: PipelineJob) -> list[list[Any]] | None:
        """Return names, sizes and times of an output's files, or None if it does not exist."""
        if isinstance(job.out, str):
            folder, _, name = job.name.rpartition("/")
            in_folder = self._stamps.get(folder, {})
            files = {part: in_folder[part] for part in part_names(name) if part in in_folder}
            stamps = files if len(files) == len(part_names(name)) else self._stamps.get(job.name, {})
            return [list(item) for item in sorted(stamps.items())] or None
        if not job.out.exists():
            return None
        paths = _files_of(job.out)
        if not all(path.exists() for path in paths):
            return None
        return [[path.name, path.stat().st_size, self._hash_of(path)] for path in paths]


def _stamp_of(path: Path) -> list[int]:
    """Return what differs once a file has changed: size, times, and which file it is.

    A write right after another may have its time, so it waits until the clock of the file system has gone on.
    """
    while 0 <= time.time_ns() - (stat := path.stat()).st_ctime_ns < _TICK:
        time.sleep(_TICK / 1e9)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _name_of(location: Location) -> str:
    """Return the name of an input, which commands write into their outputs."""
    return remote.file_name(location) if isinstance(location, str) else Path(os.path.abspath(location)).name  # noqa: PTH100


def _files_read(path: Path, kind: remote.Kind) -> list[Path]:
    """Return the files of an input that a command reads."""
    if kind == "adapter" and path.suffix in {".safetensors", ".bin", ".json", ".npz"} and path.is_file():
        path = path.parent
    if not path.is_dir():
        return [file for file in _files_of(path) if file.exists()]
    if kind == "file":  # training data, in folders of folders
        return sorted(entry for entry in path.rglob("*") if entry.is_file())
    files = _files_of(path)
    if pattern := _READ.get(kind):
        files = [file for file in files if pattern.fullmatch(file.name)] or files
    return files + (sorted((path / TEMPLATE_FOLDER).glob("*.jinja")) if kind == "adapter" else [])


def _files_of(path: Path) -> list[Path]:
    """Return the files of a folder or of a split model, or a single file."""
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.is_file())
    return [path.with_name(name) for name in part_names(path.name)]


def _record_name(job: PipelineJob) -> str:
    return f"{hashlib.sha256(job.name.encode()).hexdigest()[:24]}.json"


def inside(folder: Location, name: str) -> Location:
    """Return the location of a file in a pipeline's own folder, which is in its output folder."""
    return folder / STATE / name if isinstance(folder, Path) else remote.join(folder, f"{STATE}/{name}")


def discard(location: Location) -> None:
    """Remove a file if it exists."""
    if isinstance(location, Path):
        location.unlink(missing_ok=True)
    else:
        remote.remove(location)


def part_locations(folder: Location, key: str, count: int) -> list[Location]:
    """Return the locations of a merge's parts until they are assembled."""
    return [inside(folder, f"{key[:32]}-{number}.part") for number in range(1, count + 1)]


def discard_parts(folder: Location) -> None:
    """Remove parts of merges that a killed run has left behind."""
    state = inside(folder, "")
    names = [path.name for path in state.iterdir()] if isinstance(state, Path) else remote.stamps_of(state)
    for name in names:
        if name.endswith(".part"):
            discard(inside(folder, name))


def _read_json(location: Location) -> dict[str, Any] | None:
    if isinstance(location, str):
        return _as_object(remote.read_bytes(location) or b"")
    with suppress(OSError):
        return _as_object(location.read_bytes())
    return None


def _as_object(content: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None
    return None


def write_json(location: Location, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    text = json.dumps(strict(content), indent=2, allow_nan=False).encode()
    if isinstance(location, str):
        remote.write_bytes(location, text)
        return
    with atomic_output(location) as file:
        file.write(text)
