"""Records in the output folder: what each output was made from, and whether it still is."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gguflora.errors import OutputError, RemoteError
from gguflora.files import remote
from gguflora.files.output_rule import check_regular
from gguflora.files.shard_names import part_names
from gguflora.files.small_files import read_small
from gguflora.files.strict_json import to_json
from gguflora.pipeline.changes import describe_changes
from gguflora.pipeline.job import PipelineJob, places_of
from gguflora.pipeline.keys import HASHES, Keys, files_of
from gguflora.pipeline.locations import STATE, Location
from gguflora.pipeline.publish import stamps_in
from gguflora.pipeline.state import ASIDE, as_object, discard, inside, read_json, write_json
from gguflora.system.descriptors import open_file


class State(NamedTuple):
    """The state of an output.

    Attributes:
        report: the command's report if the output is up to date, else None.
        why: why it is not.
    """

    report: dict[str, Any] | None
    why: str


class Records:
    """Records in the output folder of what each output was made from.

    A record holds the job's ``key`` and ``origin`` (see `Keys`), the ``name`` of its output, the ``recipe``, the
    ``stamp`` of the output's files, the names of the ``files`` that the job made (a folder may hold the user's own
    beside them), and the command's ``report``.

    Args:
        folder: location of the output folder.
        recipe: name of the recipe; None if it has none, so that it cannot be known again.
        keys: computes keys, and hashes of files.

    Raises:
        OutputError: if a store cannot be read.
    """

    def __init__(self, folder: Location, recipe: str | None, keys: Keys) -> None:
        self._folder, self._recipe, self._keys = folder, recipe, keys
        self._stamps: dict[str, dict[str, str]] = {}
        try:
            self._packed = {name: zlib.compress(content, 1) for name, content in _read_all(folder)}
            if isinstance(folder, str):
                self._add_stamps(remote.stamps_of(folder))
        except RemoteError as error:
            raise OutputError(str(error)) from error

    def key_of(self, job: PipelineJob) -> str:
        """Return the key of a job; see `Keys`."""
        return self._keys.key_of(job)

    def known_key(self, job: PipelineJob) -> str:
        """Return the key of a job if it was computed, else an empty text."""
        return self._keys.known_key(job)

    def state_of(self, job: PipelineJob) -> State:
        """Return whether the output of a job is up to date.

        Raises:
            RemoteError: if a remote input cannot be read.
            OSError: if a local one cannot.
        """
        record = self.read(job.name)
        if record is None or not isinstance(record.get("report"), dict):
            return State(None, "not made before")
        if record.get("key") != self._keys.key_of(job):
            old = record.get("origin")
            return State(None, describe_changes(old if isinstance(old, dict) else {}, self._keys.origin_of(job), job))
        stamp = self.stamp_of(job.name, job.out)
        if stamp is None:
            return State(None, "its output is missing")
        return State(None, "its output was changed") if record.get("stamp") != stamp else State(record["report"], "")

    def put_aside(self, job: PipelineJob) -> dict[str, Any] | None:
        """Return the report of an output that failed its checks and was put aside, if it is up to date."""
        record = self.read(aside_name(job.name))
        if record is None or record.get("key") != self._keys.key_of(job):
            return None
        stamp = self.stamp_of(aside_name(job.name), aside_of(self._folder, job.name))
        report = record.get("report")
        return report if stamp is not None and record.get("stamp") == stamp and isinstance(report, dict) else None

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of an output, by its path relative to the output folder."""
        packed = self._packed.get(_record_name(name))
        return None if packed is None else as_object(zlib.decompress(packed))

    def others(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the records that runs of this recipe made of outputs with other names, by name."""
        known = {_record_name(name) for name in names}
        found: dict[str, dict[str, Any]] = {}
        if self._recipe is None:
            return found
        for file in sorted(set(self._packed) - known):
            record = as_object(zlib.decompress(self._packed[file])) or {}
            name = record.get("name")
            if isinstance(name, str) and record.get("recipe") == self._recipe and file == _record_name(name):
                found[name] = record
        return found

    def files_made(self, name: str) -> list[str]:
        """Return the names of the files that a job made, by its output's path relative to the output folder."""
        record = self.read(name) or {}
        stamp, made = record.get("stamp"), record.get("files")
        entries = stamp if isinstance(stamp, list) else []  # a damaged record may hold anything
        names = [str(entry[0]) for entry in entries if isinstance(entry, list) and entry]
        return [name for name in names if name in made] if isinstance(made, list) else names

    def remember(
        self, job: PipelineJob, report: Mapping[str, Any], files: Sequence[str], *, is_aside: bool = False
    ) -> None:
        """Record a finished job.

        Args:
            job: the job.
            report: the report of its command.
            files: names of the files that it made.
            is_aside: whether its output failed a check and was put aside.
        """
        name = aside_name(job.name) if is_aside else job.name
        out = aside_of(self._folder, job.name) if is_aside else job.out
        if isinstance(out, str):
            stamps = remote.stamps_of(out)
            self._add_stamps({f"{name}/{file}".rstrip("/"): stamp for file, stamp in stamps.items()})
        content = {
            "key": self._keys.key_of(job),
            "name": name,
            "recipe": self._recipe,
            "stamp": self.stamp_of(name, out),
            "files": list(files),
            "origin": self._keys.origin_of(job),
            "report": report,
        }
        self._write(name, content)

    def claim(self, job: PipelineJob) -> None:
        """Note that an output is being made. `publish` adds what it moves to its place.

        So the next run knows an output for its own if this one is killed. What else is there is the user's.
        """
        if (url := self._store_claim_of(job)) is not None and not self._is_in_store(job):
            remote.write_bytes(url, b"{}")
        if (claim := self.claim_of(job)) is not None:
            os.close(open_file(claim, write=True, create=True, follow=False, mode=0o666))

    def disclaim(self, job: PipelineJob) -> None:
        """Remove the note of `claim`."""
        if (url := self._store_claim_of(job)) is not None:
            remote.remove(url)
        if (claim := self.claim_of(job)) is not None:
            claim.unlink(missing_ok=True)

    def claim_of(self, job: PipelineJob) -> Path | None:
        """Return the file of a claim; None in a store."""
        claim = inside(self._folder, _record_name(job.name).replace(".json", ".claim"))
        return claim if isinstance(claim, Path) else None

    def check_place(self, job: PipelineJob, *, force: bool, adopt: bool = False) -> bool:
        """Check that an output may take its place: nothing is there, or what a record names.

        Args:
            job: the job.
            force: whether it may replace files that no record names.
            adopt: whether such files may be there; they are kept if they are the same as the output.

        Returns:
            Whether the output may replace what is, or will be, there when it is done.

        Raises:
            OutputError: if a device, a FIFO or a socket is there; a link, unless the pipeline's output was there; or,
                without ``force`` and ``adopt``, a file that no record names; in a store, an object without ``force``.
        """
        is_recorded = self.read(job.name) is not None
        if isinstance(job.out, Path) and not (job.out.is_symlink() and is_recorded):
            check_regular(job.out)
        if force or is_recorded or self.is_claimed(job):
            return True
        if (url := self._store_claim_of(job)) is not None:
            if self._is_in_store(job) and remote.read_bytes(url) is None:
                raise OutputError(
                    f"{job.out}: exists, and no record of this pipeline names it; move it away, or let --force "
                    "replace it"
                )
            return True
        assert isinstance(job.out, Path)
        there = next(iter(self._stamps_at(job)), None)
        if there is not None and not adopt:
            raise OutputError(
                f"{job.out.parent / there}: exists, and no record of this pipeline names it; --adopt keeps it "
                "if it is what the recipe makes, byte for byte; else move it away, or let --force replace it"
            )
        return False

    def is_claimed(self, job: PipelineJob) -> bool:
        """Return whether a local output is at its place, and is what a run that was killed was about to put there."""
        claim, there = self.claim_of(job), self._stamps_at(job)
        claimed = None if claim is None else read_json(claim)
        return bool(there) and claimed is not None and all(claimed.get(name) == stamp for name, stamp in there.items())

    def _stamps_at(self, job: PipelineJob) -> dict[str, list[int]]:
        """Return sizes and times of the files at the place of a local output, by name."""
        return stamps_in([path for path in places_of(self._folder, job) if isinstance(path, Path)])

    def _store_claim_of(self, job: PipelineJob) -> str | None:
        """Return the object of a claim in a store; None on disk."""
        claim = inside(self._folder, _record_name(job.name).replace(".json", ".claim"))
        return claim if isinstance(claim, str) else None

    def _is_in_store(self, job: PipelineJob) -> bool:
        """Return whether the store held something at the place of an output when it was listed."""
        for name in job.names:
            folder, _, file = name.rpartition("/")
            if self._stamps.get(name) or any(part in self._stamps.get(folder, {}) for part in part_names(file)):
                return True
        return False

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(inside(self._folder, _record_name(name)), content)
        self._packed[_record_name(name)] = zlib.compress(to_json(content).encode(), 1)

    def forget(self, name: str) -> None:
        """Remove the record of an output."""
        if self._packed.pop(_record_name(name), None) is not None:
            discard(inside(self._folder, _record_name(name)))
        self.forget_stamps(name)

    def forget_stamps(self, name: str) -> None:
        """Forget what a store said about an output that is about to change."""
        folder, _, file = name.rpartition("/")
        self._stamps.pop(name, None)
        for part in part_names(file):
            self._stamps.get(folder, {}).pop(part, None)

    def _add_stamps(self, stamps: Mapping[str, str]) -> None:
        """Add the stamps of files in the output folder, grouped by directory."""
        for path, stamp in stamps.items():
            folder, _, name = path.rpartition("/")
            self._stamps.setdefault(folder, {})[name] = stamp

    def stamp_of(self, name: str, out: Location) -> list[list[Any]] | None:
        """Return names, sizes and hashes of an output's files, or None if it does not exist.

        Args:
            name: its path relative to the output folder.
            out: its location.
        """
        if isinstance(out, str):
            folder, _, file = name.rpartition("/")
            in_folder = self._stamps.get(folder, {})
            files = {part: in_folder[part] for part in part_names(file) if part in in_folder}
            stamps = files if len(files) == len(part_names(file)) else self._stamps.get(name, {})
            return [list(item) for item in sorted(stamps.items())] or None
        try:
            paths = files_of(out) if out.exists() else []
            return [[path.name, path.stat().st_size, self._keys.hash_of(path)] for path in paths] or None
        except FileNotFoundError:
            return None


def _read_all(folder: Location) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of all records. From a store, reading each alone would take one or two requests."""
    if isinstance(folder, str):
        yield from remote.read_all(remote.join(folder, STATE), ".json")
    elif (folder / STATE).is_dir():
        for path in (folder / STATE).glob("*.json"):
            if path.name != HASHES:
                with suppress(OSError):
                    yield path.name, read_small(path)


def _record_name(name: str) -> str:
    return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}.json"


def aside_name(name: str) -> str:
    """Return the name of an output that failed its checks, relative to the output folder."""
    return f"{STATE}/{ASIDE}/{name}"


def aside_of(folder: Location, name: str) -> Location:
    """Return where an output is put that failed its checks."""
    return inside(folder, f"{ASIDE}/{name}")
