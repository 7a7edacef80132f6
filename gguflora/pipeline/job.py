"""A job of a pipeline, and the plan of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gguflora.files import remote
from gguflora.files.shard_names import part_names
from gguflora.pipeline.checks import Bounds
from gguflora.pipeline.locations import Location
from gguflora.pipeline.steps import META, Step, Train


@dataclass(frozen=True, slots=True)
class PipelineJob:
    """A step for one combination of its matrix.

    Attributes:
        step: the step with its templates filled in.
        index: index of the step in the recipe.
        name: path of the output relative to the output folder.
        out: location of the output.
        inputs: locations of all inputs, and the kind of each, which says what to fetch of a remote folder.
        variables: the values of its matrix, as they stand in names.
        template: the name of its output as the recipe has it.
    """

    step: Step
    index: int
    name: str
    out: Location
    inputs: Mapping[Location, remote.Kind]
    variables: Mapping[str, str]
    template: str

    @property
    def action(self) -> str:
        """Name of the command."""
        return str(getattr(self.step, "action"))  # noqa: B009  (each kind of step has its own)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of all that it writes, relative to the output folder: beside a trained LoRA lies its GGUF file."""
        if not isinstance(self.step, Train) or self.step.method != "lora":
            return (self.name,)
        folder = self.name.removesuffix(".gguf")
        return folder, f"{folder}.gguf"

    @property
    def checks(self) -> dict[str, Bounds]:
        """Limits of numbers in the report, by path."""
        return {path: Bounds(limits.min, limits.max) for path, limits in self.step.checks.items()}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the command, except for its output."""
        fields = self.step.model_dump(exclude={*META, "patch"})
        if "adapters" in fields:
            fields["adapters"] = [_path_and_scale(item) for item in fields["adapters"]]
        return {name: value for name, value in fields.items() if value is not None}


def places_of(folder: Location, job: PipelineJob) -> list[Location]:
    """Return the locations of all that a job writes, in an output folder: each part of a split model has its own."""
    paths = [PurePosixPath(name) for name in job.names]
    names = [str(path.with_name(part)) for path in paths for part in part_names(path.name)]
    return [folder / name if isinstance(folder, Path) else remote.join(folder, name) for name in names]


def _path_and_scale(item: Any) -> tuple[str, float]:  # noqa: ANN401  (a path, or a table of path and scale)
    return (item, 1.0) if isinstance(item, str) else (item["path"], item["scale"])


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """The jobs of a recipe.

    Attributes:
        folder: location of the output folder.
        jobs: the jobs; each comes after those that it depends on by its matrix.
        made: the output that an input is, for inputs that jobs make.
        found: metadata of the remote inputs, by location.
        missing: what is wrong with inputs that cannot be found, by location.
        warnings: what is likely a mistake.
    """

    folder: Location
    jobs: list[PipelineJob]
    made: Mapping[Location, Location]
    found: Mapping[str, remote.Found]
    missing: Mapping[Location, str]
    warnings: tuple[str, ...]
