"""Turn a recipe into jobs: expand matrices, fill in templates."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from gguflora.errors import RemoteError
from gguflora.files import remote
from gguflora.files.shard_names import part_names, part_paths
from gguflora.pipeline.job import PipelineJob, RecipePlan, places_of
from gguflora.pipeline.locations import STATE, Location, folder_label, label_of, made_by, to_location
from gguflora.pipeline.option_checks import check_options
from gguflora.pipeline.plan_checks import check_inputs, check_outputs
from gguflora.pipeline.recipe import RecipeFile, validate_step
from gguflora.pipeline.sources import Sources
from gguflora.pipeline.steps import META, Merge, Step
from gguflora.pipeline.variables import BRACES

_PARENT: Final = re.compile(r"parent([1-9]?)")


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a matrix.

    Attributes:
        value: text or number to insert in a parameter.
        label: text to insert in the name of an output.
        location: the location that it names, if it comes from a source or a step.
    """

    value: str | int | float
    label: str
    location: Location | None = None


def plan_jobs(file: RecipeFile, *, keep_going: bool = False, allow_empty: bool = False) -> RecipePlan:
    """Plan the jobs of a recipe.

    Args:
        file: the recipe.
        keep_going: whether missing inputs are for the jobs that need them to report; otherwise they are errors.
        allow_empty: whether globs may match nothing and steps may have no jobs.

    Raises:
        RecipeError: for cycles, unknown names, missing sources, and outputs that overlap or are outside of the folder.
    """
    folder, own = _output_folder(file), frozenset[Location]()
    while True:  # until no glob takes an output, which changes the outputs
        sources = Sources(file, folder, own, allow_empty=allow_empty, keep_missing=keep_going)
        planner = _Planner(file, folder, sources)
        for index in range(len(file.recipe.steps)):
            planner.plan(index, ())
        jobs = [job for step in planner.order for job in planner.jobs[step]]
        places = {place: job.out for job in jobs for place in places_of(folder, job)}
        taken = {path for path in sources.globbed if not places.keys().isdisjoint((path, *path.parents))}
        if not taken:
            break
        own |= taken
    check_outputs(file, jobs)
    made = {location: made_by(location, places) for location in {item for job in jobs for item in job.inputs}}
    known = {location: out for location, out in made.items() if out is not None}
    found, missing = check_inputs(file, jobs, known, keep_going=keep_going)
    warnings = () if allow_empty else tuple(planner.warnings)
    return RecipePlan(folder, jobs, known, found, missing, warnings)


def _output_folder(file: RecipeFile) -> Location:
    given = str(remote.local_path(file.recipe.output) or file.recipe.output)
    if not remote.is_remote(given):
        return (file.root / given).resolve()
    try:
        return remote.writable(given)
    except RemoteError as error:
        raise file.error(("output",), str(error)) from error


class _Planner:
    def __init__(self, file: RecipeFile, folder: Location, sources: Sources) -> None:
        self._file, self._folder, self._sources = file, folder, sources
        self._by_name = {step.name: index for index, step in enumerate(file.recipe.steps)}
        self._parents: dict[Path, Path] = {}
        self.jobs: dict[int, list[PipelineJob]] = {}
        self.order: list[int] = []
        self.warnings: list[str] = []

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
        empty = [variable for variable, values in axes.items() if not values]
        if empty:
            given = step.for_each[empty[0]]
            why = f"{given} is empty" if isinstance(given, str) else f"its list {empty[0]!r} is empty"
            self.warnings.append(f"step {step.name!r} has no jobs: {why}; --allow-empty takes that for right")
        given_fields = step.model_dump(by_alias=True, exclude_unset=True)
        self.jobs[index] = [
            self._job(index, given_fields, dict(zip(axes, chosen, strict=True)))
            for chosen in itertools.product(*axes.values())
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
            return [Value(str(path), label_of(path), path) for path in self._sources.locations(name)]
        if kind == "steps" and name in self._by_name:
            self.plan(self._by_name[name], above)
            return [Value(str(job.out), label_of(job.out), job.out) for job in self.jobs[self._by_name[name]]]
        known = [f"sources.{name}" for name in self._file.recipe.sources] + [f"steps.{name}" for name in self._by_name]
        known += [f"vars.{name}" for name in self._file.recipe.vars]
        raise self._file.error(key, f"{given!r} is unknown; expected a list, or one of {', '.join(known)}")

    def _job(self, index: int, given: Mapping[str, Any], values: Mapping[str, Value]) -> PipelineJob:
        step = self._file.recipe.steps[index]
        texts = {key: str(value.value) for key, value in values.items()}
        fields = {
            name: item if name in META else self._fill(index, name, item, values, texts) for name, item in given.items()
        }
        template = getattr(step, step.target)
        if template is not None:
            fields[step.target] = self._fill_text(index, step.target, template, _labels(template, values))
        for name in step.inputs:
            if fields.get(name) is not None:
                fields[name] = self._resolve(fields[name])
        filled = validate_step(self._file, index, fields)
        check_options(self._file, index, filled)
        name, out = self._output(index, filled.target, _first_part(filled))
        variables = {name: value.label for name, value in values.items()}
        return PipelineJob(filled, index, name, out, _inputs(filled), variables, template or "")

    def _output(self, index: int, key: str, text: str) -> tuple[str, Location]:
        """Return an output's path relative to the output folder, and its location."""
        name = os.path.normpath(text)
        out: Location | None = None
        if isinstance(self._folder, str):
            out = remote.join(self._folder, name)
        else:
            path = self._folder / name
            if path.parent not in self._parents:
                self._parents[path.parent] = path.parent.resolve()
            path = self._parents[path.parent] / path.name
            if path.is_relative_to(self._folder):
                name, out = str(path.relative_to(self._folder)), path
        if out is None or PurePosixPath(name).parts[:1] in {(), ("..",), ("/",), (STATE,)}:
            raise self._file.error(("steps", index, key), f"{text!r} is not in the output folder {self._folder}")
        return name, out

    def _fill(
        self,
        index: int,
        name: str,
        item: Any,  # noqa: ANN401  (TOML)
        values: Mapping[str, Value],
        texts: Mapping[str, str],
    ) -> Any:  # noqa: ANN401
        if isinstance(item, list):
            return [self._fill(index, name, entry, values, texts) for entry in item]
        if isinstance(item, dict):
            return {key: self._fill(index, name, entry, values, texts) for key, entry in item.items()}
        if not isinstance(item, str) or "{" not in item:
            return item
        whole = BRACES.fullmatch(item)
        if whole and whole[1] in values:
            return values[whole[1]].value
        return self._fill_text(index, name, item, texts)

    def _fill_text(self, index: int, name: str, template: str, values: Mapping[str, str]) -> str:
        unknown = [variable for variable in BRACES.findall(template) if variable not in values]
        if unknown:
            known = ", ".join(name for name in values if "parent" not in name) or "none"
            hint = f"; give the recipe's own variables in vars or with --var {unknown[0]}=VALUE"
            if "parent" in unknown[0]:
                hint = "; {parent} is for the one variable that names a location, {NAME.parent} for any of them"
            raise self._file.error(
                ("steps", index, name),
                f"{template!r} uses {{{unknown[0]}}}; the variables of its matrix: {known}{hint}",
            )
        return BRACES.sub(lambda match: values[match[1]], template)

    def _resolve(self, item: Any) -> Any:  # noqa: ANN401  (a path, a table with a path, or a list of them)
        if isinstance(item, list):
            return [self._resolve(entry) for entry in item]
        if isinstance(item, dict):
            return {**item, "path": self._resolve(item["path"])}
        item = str(remote.local_path(str(item)) or item)
        return item if remote.is_remote(item) else str(self._file.root / str(item))


def _labels(template: str, values: Mapping[str, Value]) -> dict[str, str]:
    """Return what stands for each variable of a template for names, folders of locations included."""
    labels = {name: value.label for name, value in values.items()}
    located = {name: value.location for name, value in values.items() if value.location is not None}
    for name in BRACES.findall(template):
        variable, _, folder = name.rpartition(".")
        level = _PARENT.fullmatch(folder)
        if name in labels or not level:
            continue
        location = located.get(variable) if variable else next(iter(located.values())) if len(located) == 1 else None
        label = None if location is None else folder_label(location, int(level[1] or 1))
        if label is not None:
            labels[name] = label
    return labels


def _first_part(step: Step) -> str:
    """Return the name of a step's output; for a split model, of its first file."""
    target: str = getattr(step, step.target)
    is_split = isinstance(step, Merge) and step.target == "out"
    count = len(part_names(remote.file_name(step.base))) if isinstance(step, Merge) and is_split else 1
    return str(part_paths(Path(target), count)[0])


def _inputs(step: Step) -> dict[Location, remote.Kind]:
    inputs: dict[Location, remote.Kind] = {}
    for name, kind in step.inputs.items():
        inputs |= {to_location(path): kind for path in step.texts_of(name)}
    return inputs
