"""Keys of jobs: hashes of everything that an output depends on, and of the files of inputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.adapters.tokenizer import PIECE_FILES, TEMPLATE_FILES, TEMPLATE_FOLDER, TOKENIZER_FILES
from gguflora.errors import GgufloraError
from gguflora.files import remote
from gguflora.files.checksum import sha256_of
from gguflora.files.shard_names import part_names
from gguflora.files.strict_json import to_json
from gguflora.files.visible import visible_files
from gguflora.pipeline.job import PipelineJob, RecipePlan
from gguflora.pipeline.locations import Location
from gguflora.pipeline.state import inside, read_json, write_json

HASHES: Final = "hashes.json"
"""Name of the file of hashes in a pipeline's own folder."""

_TICK: Final = 20_000_000
"""Longest step of a file system's clock in nanoseconds: two ticks of a kernel with 100 a second."""
_READ: Final = {
    "adapter": re.compile(
        "|".join(
            [
                r"adapter_config\.json|adapter_model.*|adapters\..*",
                *map(re.escape, TOKENIZER_FILES + PIECE_FILES + TEMPLATE_FILES),
            ]
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
        plan: the jobs and metadata of their inputs.
    """

    def __init__(self, plan: RecipePlan) -> None:
        self._plan, self._file = plan, inside(plan.folder, HASHES)
        self._jobs = {job.out: job for job in plan.jobs}
        self._known: dict[str, list[Any]] = read_json(self._file) or {}
        self._origins: dict[Location, dict[str, Any]] = {}
        self._keys: dict[Location, str] = {}
        self._contents: dict[tuple[Location, remote.Kind], str] = {}
        self._is_changed = False

    def key_of(self, job: PipelineJob) -> str:
        """Return the key of a job: a hash of its origin."""
        if job.out not in self._keys:
            self.origin_of(job)
        return self._keys[job.out]

    def known_key(self, job: PipelineJob) -> str:
        """Return the key of a job if it was computed, else an empty text."""
        return self._keys.get(job.out, "")

    def origin_of(self, job: PipelineJob) -> dict[str, Any]:
        """Return everything that the output of a job depends on, ready for JSON.

        Raises:
            RemoteError: if a remote input cannot be read.
            OSError: if a local one cannot.
        """
        waiting = [job]
        while waiting:
            made = [self._plan.made[item] for item in waiting[-1].inputs if item in self._plan.made]
            before = [self._jobs[out] for out in made if out not in self._keys]
            if before:
                waiting += before
                continue
            job = waiting.pop()
            origin = self._origin(job)
            text = to_json({**origin, "locations": None}, sort_keys=True, default=str)
            self._origins[job.out], self._keys[job.out] = origin, hashlib.sha256(text.encode()).hexdigest()
        return self._origins[job.out]

    def _origin(self, job: PipelineJob) -> dict[str, Any]:
        names = {str(location): f"input {number}" for number, location in enumerate(job.inputs, 1)}
        arguments = {name: _renamed(item, names) for name, item in job.arguments.items() if name != "threads"}
        return {
            "version": __version__,
            "action": job.action,
            "target": job.step.target,
            "name": remote.file_name(str(job.out)),
            "arguments": json.loads(to_json(arguments, default=str)),
            "names": [_name_of(item, self._plan.made.get(item)) for item in job.inputs],
            "inputs": [
                self._keys[self._plan.made[item]] if item in self._plan.made else self._known_content(item, kind)
                for item, kind in job.inputs.items()
            ],
        }

    def _known_content(self, location: Location, kind: remote.Kind) -> str:
        """Return the hash of an input, which is looked up once in a run, because many jobs may share it."""
        if (location, kind) not in self._contents:
            self._contents[location, kind] = self._content(location, kind)
        return self._contents[location, kind]

    def _content(self, location: Location, kind: remote.Kind) -> str:
        if isinstance(location, str):
            return self._plan.found[location].content or self._content(remote.fetch(location, kind), kind)
        files = _files_read(location, kind)
        if files == [location]:
            return self.hash_of(location)
        digest = hashlib.sha256()
        for file in files:
            digest.update(
                f"{file.relative_to(location.parent)} {self.hash_of(file)}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def hash_of(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is read only if it may have changed."""
        resolved, stamp = str(path.resolve()), _stamp_of(path)
        known = self._known.get(resolved, [])
        if not isinstance(known, list) or known[:-1] != stamp:  # a damaged file may hold anything
            known = [*stamp, sha256_of(path)]
            self._known[resolved], self._is_changed = known, True
        return str(known[-1])

    def save(self) -> None:
        """Save the hashes for the next run. Where they cannot be written, it reads the files again."""
        if self._is_changed:
            with suppress(GgufloraError):
                write_json(self._file, dict(self._known))


def _stamp_of(path: Path) -> list[int]:
    """Return what differs once a file has changed: size, times, and which file it is.

    A write right after another may have its time, so it waits until the clock of the file system has gone on.
    """
    while 0 <= time.time_ns() - (stat := path.stat()).st_ctime_ns < _TICK:
        time.sleep(_TICK / 1e9)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _name_of(location: Location, made: Location | None) -> str:
    """Return the name of an input, which commands write into their outputs; of a file in an output, its way there."""
    if made is not None and str(location).startswith(f"{made}/"):
        return str(location).removeprefix(f"{str(made).rpartition('/')[0]}/")
    return remote.file_name(location) if isinstance(location, str) else Path(os.path.abspath(location)).name  # noqa: PTH100


def _files_read(path: Path, kind: remote.Kind) -> list[Path]:
    """Return the files of an input that a command reads."""
    if kind == "adapter" and path.suffix in {".safetensors", ".bin", ".json", ".npz"} and path.is_file():
        path = path.parent
    if not path.is_dir():
        return [file for file in files_of(path) if file.exists()]
    if kind == "file":  # training data, in folders of folders
        return visible_files(path)
    files = files_of(path)
    if pattern := _READ.get(kind):
        files = [file for file in files if pattern.fullmatch(file.name)] or files
    return files + (sorted((path / TEMPLATE_FOLDER).glob("*.jinja")) if kind == "adapter" else [])


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder or of a split model, or a single file."""
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.is_file())
    return [path.with_name(name) for name in part_names(path.name)]


def _renamed(item: Any, names: Mapping[str, str]) -> Any:  # noqa: ANN401  (an argument)
    """Return an argument in which locations of inputs are numbers, so that a copied folder stays done."""
    if isinstance(item, Mapping):
        return {key: _renamed(entry, names) for key, entry in item.items()}
    if isinstance(item, list | tuple):
        return [_renamed(entry, names) for entry in item]
    return names.get(item, item) if isinstance(item, str) else item
