"""What a pipeline remembers between runs: hashes of inputs, and what each output was made from."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.files import remote
from gguflora.files.atomic import atomic_output
from gguflora.files.checksum import sha256_of
from gguflora.files.shard_names import part_names
from gguflora.pipeline.plan import STATE, Location, PipelineJob, identity

_HASHES: Final = "hashes.json"


class Keys:
    """The keys of jobs: hashes of all that their outputs depend on.

    Of remote inputs the store's own hashes count, where it has any. Hashes of files are remembered with their size and
    time, so that an unchanged model is not read again.

    Args:
        folder: of the outputs.
        found: what stores say of the remote inputs.
    """

    def __init__(self, folder: Location, found: Mapping[str, remote.Found]) -> None:
        self._file, self._found = inside(folder, _HASHES), found
        self._known: dict[str, list[Any]] = _read_json(self._file) or {}
        self._keys: dict[Location, str] = {}

    def key_of(self, job: PipelineJob) -> str:
        """The key of a job, whose inputs' jobs have been asked for before.

        Raises:
            RemoteError: if an input cannot be read.
        """
        inputs = [self._keys.get(identity(one)) or self._content(one, kind) for one, kind in job.inputs.items()]
        names = {str(location): f"input {number}" for number, location in enumerate(job.inputs)}
        what = {"version": __version__, "action": job.action, "inputs": inputs}
        name = remote.file_name(str(job.out))
        text = json.dumps({**what, "arguments": job.arguments, "name": name}, sort_keys=True, default=str)
        for path, label in sorted(names.items(), key=lambda entry: -len(entry[0])):
            text = text.replace(json.dumps(path), json.dumps(label))
        self._keys[job.out] = hashlib.sha256(text.encode()).hexdigest()
        return self._keys[job.out]

    def _content(self, location: Location, kind: remote.Kind) -> str:
        if isinstance(location, str):
            return self._found[location].content or self._content(remote.fetch(location, kind), kind)
        files = [file for file in _files_of(location) if file.exists()]
        if files == [location]:
            return self._hash(location)
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {self._hash(file)}\n".encode())
        return digest.hexdigest()

    def _hash(self, path: Path) -> str:
        place, stat = str(path.resolve()), path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self._known.get(place, [])[:2] != stamp:
            self._known[place] = [*stamp, sha256_of(path)]
        return str(self._known[place][2])

    def save(self) -> None:
        """Remember the hashes for the next run."""
        write_json(self._file, self._known)


class Records:
    """What each output was made from, kept in the output folder."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._packed: dict[str, bytes] = {}
        self._stamps: dict[str, dict[str, str]] = {}
        if isinstance(folder, str):  # all at once: asking for each would take a request or two each
            records = remote.read_all(remote.join(folder, STATE), ".json")
            self._packed = {name: zlib.compress(content, 1) for name, content in records}
            self._add_stamps(remote.stamps_of(folder))

    def kept_report(self, job: PipelineJob, key: str) -> dict[str, Any] | None:
        """The report with which a job's output was made, if that output is there and nothing has changed since."""
        place = inside(self._folder, _record(job))
        packed = self._packed.get(_record(job))
        record = _read_json(place) if isinstance(place, Path) else packed and _as_object(zlib.decompress(packed))
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
        write_json(inside(self._folder, _record(job)), content)

    def forget(self, job: PipelineJob) -> None:
        """Let a job be done again, whatever becomes of its output."""
        if isinstance(self._folder, Path) or self._packed.pop(_record(job), None) is not None:
            discard(inside(self._folder, _record(job)))
        self._stamps.pop(job.name, None)

    def _add_stamps(self, stamps: Mapping[str, str]) -> None:
        """Stamps of files below the output folder, held by the folder that each is in."""
        for path, stamp in stamps.items():
            folder, _, name = path.rpartition("/")
            self._stamps.setdefault(folder, {})[name] = stamp

    def _stamp(self, job: PipelineJob) -> list[list[Any]] | None:
        """Names, sizes and times of an output's files; None if it is not there."""
        if isinstance(job.out, str):
            folder, _, name = job.name.rpartition("/")
            beside = self._stamps.get(folder, {})
            own = {part: beside[part] for part in part_names(name) if part in beside}
            stamps = own if len(own) == len(part_names(name)) else self._stamps.get(job.name, {})
            return [list(item) for item in sorted(stamps.items())] or None
        if not job.out.exists():
            return None
        files = _files_of(job.out)
        if not all(file.exists() for file in files):
            return None
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _files_of(path: Path) -> list[Path]:
    """The files of a folder, or of a split model; any other file alone."""
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.is_file())
    return [path.with_name(name) for name in part_names(path.name)]


def _record(job: PipelineJob) -> str:
    return f"{hashlib.sha256(job.name.encode()).hexdigest()[:24]}.json"


def inside(folder: Location, name: str) -> Location:
    """A place in a pipeline's own folder, which is in its output folder."""
    return folder / STATE / name if isinstance(folder, Path) else remote.join(folder, f"{STATE}/{name}")


def discard(place: Location) -> None:
    """Remove a file, if it is there."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
    else:
        remote.remove(place)


def part_places(folder: Location, key: str, count: int) -> list[Location]:
    """Where the parts of a merge lie until they are assembled."""
    return [inside(folder, f"{key[:32]}-{number}.part") for number in range(1, count + 1)]


def discard_parts(folder: Location) -> None:
    """Remove the parts of merges that a run which was killed has left."""
    own = inside(folder, "")
    names = [path.name for path in own.iterdir()] if isinstance(own, Path) else remote.stamps_of(own)
    for name in names:
        if name.endswith(".part"):
            discard(inside(folder, name))


def _read_json(place: Location) -> dict[str, Any] | None:
    if isinstance(place, str):
        return _as_object(remote.read_bytes(place) or b"")
    with suppress(OSError):
        return _as_object(place.read_bytes())
    return None


def _as_object(content: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else None
    return None


def write_json(place: Location, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    text = json.dumps(content, indent=2).encode()
    if isinstance(place, str):
        remote.write_bytes(place, text)
        return
    with atomic_output(place) as file:
        file.write(text)
