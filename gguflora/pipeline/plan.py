"""Turn a recipe into jobs: expand matrices, fill in templates, check outputs and inputs."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote

from gguflora.errors import RecipeError, RemoteError
from gguflora.files import remote
from gguflora.files.shard_names import PART_NAME, part_names, part_paths
from gguflora.pipeline.recipe import Merge, RecipeFile, Step, validate_step

Location = Path | str
"""A local path, or a URL."""

STATE: Final = ".gguflora"
"""Folder of a pipeline's own files, in the output folder."""

_FILE_URL: Final = re.compile(r"file:(?://(?:localhost)?)?(/[^#]*)")
_VARIABLE: Final = re.compile(r"\{(\w*)\}")
_MAX_LOOKUPS: Final = 16
"""Highest number of concurrent lookups of remote inputs."""
_META: Final = {"name", "for", "for_each", "action", "out", "checks", "memory", "split"}


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a matrix.

    Attributes:
        value: text or number to insert in a parameter.
        label: text to insert in the name of an output.
    """

    value: str | int | float
    label: str


@dataclass(frozen=True, slots=True)
class PipelineJob:
    """A step for one combination of its matrix.

    Attributes:
        step: the step with its templates filled in.
        index: index of the step in the recipe.
        name: path of the output relative to the output folder.
        out: location of the output.
        inputs: locations of all inputs, and the kind of each, which says what to fetch of a remote folder.
    """

    step: Step
    index: int
    name: str
    out: Location
    inputs: Mapping[Location, remote.Kind]

    @property
    def action(self) -> str:
        """Name of the command."""
        return str(self.step.model_dump(include={"action"})["action"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the command, except ``out``."""
        fields = self.step.model_dump(exclude=_META)
        if "adapters" in fields:
            fields["adapters"] = [_path_and_scale(item) for item in fields["adapters"]]
        return {name: value for name, value in fields.items() if value is not None}


def _path_and_scale(item: Any) -> tuple[str, float]:  # noqa: ANN401  (a path, or a table of path and scale)
    return (item, 1.0) if isinstance(item, str) else (item["path"], item["scale"])


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """The jobs of a recipe.

    Attributes:
        folder: location of the output folder.
        jobs: the jobs; each comes after those that it depends on.
        found: metadata of the remote inputs, by location.
    """

    folder: Location
    jobs: list[PipelineJob]
    found: Mapping[str, remote.Found]


def plan_jobs(file: RecipeFile) -> RecipePlan:
    """Plan the jobs of a recipe.

    Raises:
        RecipeError: for cycles, unknown names, missing sources, and outputs that overlap or are outside of the folder.
    """
    folder, own = _output_folder(file), frozenset[Location]()
    while True:  # until no glob takes an output, which changes the outputs
        planner = _Planner(file, folder, own)
        for index in range(len(file.recipe.steps)):
            planner.plan(index, ())
        jobs = [job for step in planner.order for job in planner.jobs[step]]
        outs = {job.out for job in jobs}
        taken = {path for path in planner.globbed if isinstance(path, Path) and outs & {path, *path.parents}}
        if not taken:
            break
        own |= taken
    _check_outputs(file, jobs)
    return RecipePlan(planner.folder, jobs, _check_inputs(file, jobs))


def _output_folder(file: RecipeFile) -> Location:
    given = file.recipe.output.removeprefix("file://")
    if not remote.is_remote(given):
        return (file.path.absolute().parent / given).resolve()
    try:
        return remote.writable(given)
    except RemoteError as error:
        raise file.error(("output",), str(error)) from error


def canonical(location: Location) -> Location:
    """Return the canonical form of a location."""
    return location.resolve() if isinstance(location, Path) else location


def to_location(text: str) -> Location:
    """Return the location that a text names: a URL or a path."""
    if (path := local_path(text)) is not None:
        return path
    return text if remote.is_remote(text) else Path(text)


def local_path(text: str) -> Path | None:
    """Return the path that a ``file://`` URL names, percent-decoded; None of any other text."""
    found = _FILE_URL.fullmatch(text)
    return Path(unquote(found[1])) if found else None


class _Planner:
    def __init__(self, file: RecipeFile, folder: Location, own: frozenset[Location]) -> None:
        self._own, self.globbed = own, set[Location]()
        self._file, self.folder, self._root = file, folder, file.path.absolute().parent
        self._by_name = {step.name: index for index, step in enumerate(file.recipe.steps)}
        self.jobs: dict[int, list[PipelineJob]] = {}
        self.order: list[int] = []

    def plan(self, index: int, above: tuple[int, ...]) -> None:
        """Plan the jobs of a step, after those of the steps that its matrix refers to."""
        if index in self.jobs:
            return
        step = self._file.recipe.steps[index]
        if index in above:
            names = [self._file.recipe.steps[number].name for number in (*above[above.index(index) :], index)]
            raise self._file.error(("steps", index, "for"), f"the steps wait for each other: {' -> '.join(names)}")
        axes = {
            variable: self._values(index, variable, given, (*above, index)) for variable, given in step.for_each.items()
        }
        self.jobs[index] = [
            self._job(index, dict(zip(axes, chosen, strict=True))) for chosen in itertools.product(*axes.values())
        ]
        self.order.append(index)

    def _values(
        self, index: int, variable: str, given: str | Sequence[str | int | float], above: tuple[int, ...]
    ) -> list[Value]:
        key = ("steps", index, "for", variable)
        if not isinstance(given, str):
            return [Value(item, str(item)) for item in given]
        kind, _, name = given.partition(".")
        if kind == "sources" and name in self._file.recipe.sources:
            return [Value(str(path), label_of(path)) for path in self._source(name)]
        if kind == "steps" and name in self._by_name:
            self.plan(self._by_name[name], above)
            return [Value(str(job.out), label_of(job.out)) for job in self.jobs[self._by_name[name]]]
        known = [f"sources.{name}" for name in self._file.recipe.sources] + [f"steps.{name}" for name in self._by_name]
        raise self._file.error(key, f"{given!r} is unknown; expected a list, or one of {', '.join(known)}")

    def _source(self, name: str) -> list[Location]:
        given = self._file.recipe.sources[name]
        locations: list[Location] = []
        for pattern in [given] if isinstance(given, str) else given:
            try:
                matches = self._matches(pattern)
            except RemoteError as error:
                raise self._file.error(("sources", name), str(error)) from error
            missing = [path for path in matches if isinstance(path, Path) and not path.exists()]
            if not matches or missing:
                raise self._file.error(("sources", name), f"{pattern!r}: no such file or directory")
            locations += matches
        return locations

    def _matches(self, pattern: str) -> Sequence[Location]:
        pattern = str(local_path(pattern) or pattern)
        if remote.is_remote(pattern):  # in a web address a question mark is not a wildcard
            is_web = pattern.startswith(("http://", "https://"))
            return remote.list_matching(pattern) if re.search(r"[*\[]" if is_web else r"[*?\[]", pattern) else [pattern]
        if not re.search(r"[*?\[]", pattern):
            return [self._root / pattern]
        names = glob.glob(pattern, root_dir=self._root, recursive=True)  # noqa: PTH207  (patterns may be absolute)
        paths = [path for name in names if not self._is_own(path := self._root / name)]
        self.globbed |= {path.resolve() for path in paths}
        return _without_later_parts(paths)

    def _is_own(self, path: Path) -> bool:
        """Whether a match is an output of this recipe, or the folder of all outputs; a glob leaves them out."""
        path = path.resolve()
        return path == self.folder or not self._own.isdisjoint((path, *path.parents))

    def _job(self, index: int, values: Mapping[str, Value]) -> PipelineJob:
        step = self._file.recipe.steps[index]
        given = step.model_dump(by_alias=True, exclude_unset=True)
        fields = {
            name: item if name in _META else self._fill(index, name, item, values) for name, item in given.items()
        }
        labels = {name: value.label for name, value in values.items()}
        fields["out"] = self._fill_text(index, "out", step.out, labels)
        for name in step.inputs:
            if fields.get(name) is not None:
                fields[name] = self._resolve(fields[name])
        filled = validate_step(self._file, index, fields)
        name, out = self._output(index, _first_part(filled))
        return PipelineJob(filled, index, name, out, _inputs(filled))

    def _output(self, index: int, text: str) -> tuple[str, Location]:
        """Return an output's path relative to the output folder, and its location."""
        name = os.path.normpath(text)
        out: Location | None = None
        if isinstance(self.folder, str):
            out = remote.join(self.folder, name)
        elif (path := (self.folder / text).resolve()).is_relative_to(self.folder):
            name, out = str(path.relative_to(self.folder)), path
        if out is None or PurePosixPath(name).parts[:1] in {(), ("..",), ("/",), (STATE,)}:
            raise self._file.error(("steps", index, "out"), f"{text!r} is not in the output folder {self.folder}")
        return name, out

    def _fill(self, index: int, name: str, item: Any, values: Mapping[str, Value]) -> Any:  # noqa: ANN401
        if isinstance(item, list):
            return [self._fill(index, name, entry, values) for entry in item]
        if isinstance(item, dict):
            return {key: self._fill(index, name, entry, values) for key, entry in item.items()}
        if not isinstance(item, str):
            return item
        whole = _VARIABLE.fullmatch(item)
        if whole and whole[1] in values:
            return values[whole[1]].value
        return self._fill_text(index, name, item, {key: str(value.value) for key, value in values.items()})

    def _fill_text(self, index: int, name: str, template: str, values: Mapping[str, str]) -> str:
        unknown = [variable for variable in _VARIABLE.findall(template) if variable not in values]
        if unknown:
            known = ", ".join(values) or "none"
            raise self._file.error(
                ("steps", index, name), f"{template!r} uses {{{unknown[0]}}}; the variables of its matrix: {known}"
            )
        return _VARIABLE.sub(lambda match: values[match[1]], template)

    def _resolve(self, item: Any) -> Any:  # noqa: ANN401  (a path, a table with a path, or a list of them)
        if isinstance(item, list):
            return [self._resolve(entry) for entry in item]
        if isinstance(item, dict):
            return {**item, "path": self._resolve(item["path"])}
        item = str(local_path(str(item)) or item)
        return item if remote.is_remote(item) else str(self._root / str(item))


def _first_part(step: Step) -> str:
    """Return the name of a step's output; for a split model, of its first file."""
    count = len(part_names(remote.file_name(step.base))) if isinstance(step, Merge) else 1
    return str(part_paths(Path(step.out), count)[0])


def _without_later_parts(paths: Sequence[Path]) -> list[Path]:
    """Sort paths, and keep only the first file of a split model."""
    all_paths = set(paths)
    firsts = {path: path.with_name(part_names(path.name)[0]) for path in paths}
    return sorted(path for path, first in firsts.items() if path == first or first not in all_paths)


def label_of(location: Location) -> str:
    """Return a file's name without suffix and without the number of a split model's file, or a directory's name."""
    name = PurePosixPath(PART_NAME.sub(r"\1.gguf", remote.file_name(str(location))))
    is_folder = isinstance(location, Path) and location.is_dir()
    return name.stem if name.suffix in {".gguf", ".json"} and not is_folder else name.name


def _inputs(step: Step) -> dict[Location, remote.Kind]:
    inputs: dict[Location, remote.Kind] = {}
    for name, kind in step.inputs.items():
        item = getattr(step, name)
        items = item if isinstance(item, list) else [item]
        paths = [entry if isinstance(entry, str) else entry.path for entry in items if entry is not None]
        inputs |= {to_location(path): kind for path in paths}
    return inputs


def _check_outputs(file: RecipeFile, jobs: Sequence[PipelineJob]) -> None:
    by_name: dict[PurePosixPath, PipelineJob] = {}
    for job in jobs:
        name = PurePosixPath(job.name)
        for other in (name, *name.parents):
            if other in by_name:
                first = by_name[other].step.name
                raise file.error(
                    ("steps", job.index, "out"),
                    f"writes {job.out}, but so does step {first!r}; put more variables into its name",
                )
        by_name[name] = job


def _check_inputs(file: RecipeFile, jobs: Sequence[PipelineJob]) -> dict[str, remote.Found]:
    """Check the inputs that no job makes; return metadata of the remote ones."""
    outputs = {job.out for job in jobs}
    for job in jobs:
        for location in job.inputs:
            if canonical(location) == job.out:
                raise file.error(("steps", job.index, "out"), f"{job.out} is also an input of the step")
            if isinstance(location, Path) and canonical(location) not in outputs and not location.exists():
                raise _input_error(file, job, location, f"{location}: no such file or directory")
    remote_inputs = {
        location: (kind, job)
        for job in jobs
        for location, kind in job.inputs.items()
        if isinstance(location, str) and location not in outputs
    }
    with ThreadPoolExecutor(_MAX_LOOKUPS) as pool:
        found = pool.map(lambda item: _stat_input(file, item[0], *item[1]), remote_inputs.items())
        return dict(zip(remote_inputs, found, strict=True))


def _stat_input(file: RecipeFile, location: str, kind: remote.Kind, job: PipelineJob) -> remote.Found:
    try:
        return remote.stat(location, kind)
    except RemoteError as error:
        raise _input_error(file, job, location, str(error)) from error


def _input_error(file: RecipeFile, job: PipelineJob, location: Location, message: str) -> RecipeError:
    """Return an error about an input, located at the key that names it."""
    for source, given in file.recipe.sources.items():
        if str(location) in ([given] if isinstance(given, str) else given):
            return file.error(("sources", source), message)
    for name in job.step.inputs:
        if str(location) in str(getattr(job.step, name)):
            return file.error(("steps", job.index, name), message)
    return file.error(("steps", job.index), message)
