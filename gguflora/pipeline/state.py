"""What a pipeline remembers between runs: hashes of inputs, and what each output was made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.errors import OutputError
from gguflora.files.output import atomic_output
from gguflora.pipeline.plan import STATE, Job

_LOCK: Final = "lock"
_HASHES: Final = "hashes.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an output folder, which is made if it is missing.

    Raises:
        OutputError: if another run holds it, or it cannot be written.
    """
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / STATE / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            raise OutputError(f"{folder}: another pipeline (process {holder}) is writing to it") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


class Keys:
    """The keys of jobs: hashes of all that their outputs depend on.

    Hashes of files are remembered with their size and time, so that an unchanged model is not read again.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / STATE / _HASHES
        self._known: dict[str, list[Any]] = _read_json(self._file) or {}
        self._keys: dict[Path, str] = {}

    def of(self, job: Job) -> str:
        """The key of a job, whose inputs' jobs have been asked for before."""
        inputs = [self._keys.get(path.resolve()) or self._content(path) for path in job.inputs]
        names = {str(path): f"input {number}" for number, path in enumerate(job.inputs)}
        what = {"version": __version__, "action": job.step.model_dump()["action"], "inputs": inputs}
        text = json.dumps({**what, "arguments": job.arguments, "name": job.out.name}, sort_keys=True, default=str)
        for path, name in sorted(names.items(), key=lambda entry: -len(entry[0])):
            text = text.replace(json.dumps(path), json.dumps(name))
        self._keys[job.out] = hashlib.sha256(text.encode()).hexdigest()
        return self._keys[job.out]

    def _content(self, path: Path) -> str:
        if not path.is_dir():
            return self._hash(path)
        digest = hashlib.sha256()
        for file in sorted(entry for entry in path.iterdir() if entry.is_file()):
            digest.update(f"{file.name} {self._hash(file)}\n".encode())
        return digest.hexdigest()

    def _hash(self, path: Path) -> str:
        place, stat = str(path.resolve()), path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        if self._known.get(place, [])[:2] != stamp:
            with path.open("rb") as file:
                self._known[place] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        return str(self._known[place][2])

    def save(self) -> None:
        """Remember the hashes for the next run."""
        write_json(self._file, self._known)


def kept_report(folder: Path, job: Job, key: str) -> dict[str, Any] | None:
    """The report with which a job's output was made, if that output is there and nothing has changed since."""
    record = _read_json(_record(folder, job))
    if record is None or record.get("key") != key or record.get("stamp") != _stamp(job.out):
        return None
    report = record.get("report")
    return report if isinstance(report, dict) else None


def remember(folder: Path, job: Job, key: str, report: Mapping[str, Any]) -> None:
    """Record a finished job."""
    write_json(_record(folder, job), {"key": key, "out": str(job.out), "stamp": _stamp(job.out), "report": report})


def forget(folder: Path, job: Job) -> None:
    """Let a job be done again, whatever becomes of its output."""
    _record(folder, job).unlink(missing_ok=True)


def _record(folder: Path, job: Job) -> Path:
    return folder / STATE / f"{hashlib.sha256(str(job.out.relative_to(folder)).encode()).hexdigest()[:24]}.json"


def _stamp(out: Path) -> list[list[Any]] | None:
    """Names, sizes and times of an output's files; None if it is not there."""
    if not out.exists():
        return None
    files = sorted(entry for entry in out.iterdir() if entry.is_file()) if out.is_dir() else [out]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_output(path) as file:
        file.write(json.dumps(content, indent=2).encode())
