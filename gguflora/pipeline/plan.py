"""From a recipe to jobs: matrices multiplied out, templates filled in, outputs and inputs checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.errors import RecipeError
from gguflora.pipeline.recipe import RecipeFile, Step, validated

STATE: Final = ".gguflora"
"""Folder of what a pipeline remembers, in the output folder."""

_VARIABLE: Final = re.compile(r"\{(\w*)\}")
_META: Final = {"name", "for", "for_each", "action", "out", "checks", "memory"}


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a matrix.

    Attributes:
        value: what it stands for in a parameter: a path or a number.
        label: what it stands for in the name of an output.
    """

    value: str | int | float
    label: str


@dataclass(frozen=True, slots=True)
class Job:
    """A step for one combination of its matrix.

    Attributes:
        step: the step, its templates filled in.
        index: of the step in the recipe.
        out: the output.
        inputs: all files and directories that it reads.
    """

    step: Step
    index: int
    out: Path
    inputs: tuple[Path, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the command, but for ``out``."""
        fields = self.step.model_dump(exclude=_META)
        if "adapters" in fields:
            fields["adapters"] = [_use(item) for item in fields["adapters"]]
        return {name: value for name, value in fields.items() if value is not None}


def _use(item: Any) -> tuple[str, float]:  # noqa: ANN401  (a path, or a table of path and scale)
    return (item, 1.0) if isinstance(item, str) else (item["path"], item["scale"])


def plan_jobs(file: RecipeFile) -> tuple[Path, list[Job]]:
    """The output folder and the jobs, each after those that it depends on.

    Raises:
        RecipeError: for cycles, unknown names, missing sources, and outputs that meet or leave the folder.
    """
    folder = (file.path.absolute().parent / file.recipe.output).resolve()
    planner = _Planner(file, folder)
    for index in range(len(file.recipe.steps)):
        planner.plan(index, ())
    jobs = [job for step in planner.order for job in planner.jobs[step]]
    _check_outputs(file, folder, jobs)
    _check_inputs(file, jobs)
    return folder, jobs


class _Planner:
    def __init__(self, file: RecipeFile, folder: Path) -> None:
        self._file, self._folder, self._root = file, folder, file.path.absolute().parent
        self._by_name = {step.name: index for index, step in enumerate(file.recipe.steps)}
        self.jobs: dict[int, list[Job]] = {}
        self.order: list[int] = []

    def plan(self, index: int, above: tuple[int, ...]) -> None:
        """The jobs of a step, after those of the steps it takes its values from."""
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
        where = ("steps", index, "for", variable)
        if not isinstance(given, str):
            return [Value(item, str(item)) for item in given]
        kind, _, name = given.partition(".")
        if kind == "sources" and name in self._file.recipe.sources:
            return [Value(str(path), label_of(path)) for path in self._source(name)]
        if kind == "steps" and name in self._by_name:
            self.plan(self._by_name[name], above)
            return [Value(str(job.out), label_of(job.out)) for job in self.jobs[self._by_name[name]]]
        known = [f"sources.{name}" for name in self._file.recipe.sources] + [f"steps.{name}" for name in self._by_name]
        raise self._file.error(where, f"{given!r} is unknown; expected a list, or one of {', '.join(known)}")

    def _source(self, name: str) -> list[Path]:
        given = self._file.recipe.sources[name]
        found: list[Path] = []
        for pattern in [given] if isinstance(given, str) else given:
            matches = sorted(self._root.glob(pattern)) if re.search(r"[*?\[]", pattern) else [self._root / pattern]
            missing = [path for path in matches if not path.exists()]
            if not matches or missing:
                raise self._file.error(("sources", name), f"{pattern!r}: no such file or directory")
            found += matches
        return found

    def _job(self, index: int, values: Mapping[str, Value]) -> Job:
        step = self._file.recipe.steps[index]
        given = step.model_dump(by_alias=True, exclude_unset=True)
        fields = {
            name: item if name in _META else self._filled(index, name, item, values) for name, item in given.items()
        }
        labels = {name: value.label for name, value in values.items()}
        fields["out"] = self._text(index, "out", step.out, labels)
        for name in step.inputs:
            if fields.get(name) is not None:
                fields[name] = self._located(fields[name])
        filled = validated(self._file, index, fields)
        out = (self._folder / filled.out).resolve()
        return Job(filled, index, out, tuple(_paths(filled)))

    def _filled(self, index: int, name: str, item: Any, values: Mapping[str, Value]) -> Any:  # noqa: ANN401
        if isinstance(item, list):
            return [self._filled(index, name, one, values) for one in item]
        if isinstance(item, dict):
            return {key: self._filled(index, name, one, values) for key, one in item.items()}
        if not isinstance(item, str):
            return item
        whole = _VARIABLE.fullmatch(item)
        if whole and whole[1] in values:
            return values[whole[1]].value
        return self._text(index, name, item, {key: str(value.value) for key, value in values.items()})

    def _text(self, index: int, name: str, template: str, values: Mapping[str, str]) -> str:
        unknown = [variable for variable in _VARIABLE.findall(template) if variable not in values]
        if unknown:
            known = ", ".join(values) or "none"
            raise self._file.error(
                ("steps", index, name), f"{template!r} names {{{unknown[0]}}}; the variables of its matrix: {known}"
            )
        return _VARIABLE.sub(lambda found: values[found[1]], template)

    def _located(self, item: Any) -> Any:  # noqa: ANN401  (a path, a table with a path, or a list of them)
        if isinstance(item, list):
            return [self._located(one) for one in item]
        if isinstance(item, dict):
            return {**item, "path": self._located(item["path"])}
        return str(self._root / str(item))


def label_of(path: Path) -> str:
    """A file's name without its suffix, or a directory's name."""
    return path.name if path.is_dir() or path.suffix not in {".gguf", ".json"} else path.stem


def _paths(step: Step) -> list[Path]:
    found = []
    for name in step.inputs:
        item = getattr(step, name)
        items = item if isinstance(item, list) else [item]
        found += [Path(one if isinstance(one, str) else one.path) for one in items if one is not None]
    return found


def _check_outputs(file: RecipeFile, folder: Path, jobs: Sequence[Job]) -> None:
    by_out: dict[Path, Job] = {}
    for job in jobs:
        where = ("steps", job.index, "out")
        if not job.out.is_relative_to(folder) or job.out == folder or job.out.relative_to(folder).parts[0] == STATE:
            raise file.error(where, f"{job.step.out!r} is not in the output folder {folder}")
        for other in (job.out, *job.out.parents):
            if other in by_out:
                first = by_out[other].step.name
                raise file.error(
                    where, f"writes {job.out}, but so does step {first!r}; put more variables into its name"
                )
        by_out[job.out] = job


def _check_inputs(file: RecipeFile, jobs: Sequence[Job]) -> None:
    made = {job.out for job in jobs}
    for job in jobs:
        for path in job.inputs:
            if path.resolve() == job.out:
                raise file.error(("steps", job.index, "out"), f"{job.out} is also an input of the step")
            if path.resolve() not in made and not path.exists():
                raise _missing(file, job, path)


def _missing(file: RecipeFile, job: Job, path: Path) -> RecipeError:
    for name in job.step.inputs:
        if str(path) in str(getattr(job.step, name)):
            return file.error(("steps", job.index, name), f"{path}: no such file or directory")
    return file.error(("steps", job.index), f"{path}: no such file or directory")
