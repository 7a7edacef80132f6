"""Check the jobs of a recipe before they run: outputs must not overlap, inputs must be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Final

from gguflora.errors import RecipeError, RemoteError
from gguflora.files import remote
from gguflora.pipeline.job import PipelineJob
from gguflora.pipeline.locations import Location, in_place, to_location
from gguflora.pipeline.recipe import RecipeFile
from gguflora.pipeline.sources import problem_with

_MAX_LOOKUPS: Final = 16
"""Highest number of concurrent lookups of remote inputs."""


def check_outputs(file: RecipeFile, jobs: Sequence[PipelineJob]) -> None:
    """Check that no output is, or lies in, another one.

    Raises:
        RecipeError: if one does.
    """
    by_name: dict[PurePosixPath, PipelineJob] = {}
    for job in jobs:
        names = [PurePosixPath(name) for name in job.names]
        for other in (path for name in names for path in (name, *name.parents)):
            if other in by_name:
                raise file.error(("steps", job.index, job.step.target), _overlap(job, by_name[other]))
        by_name |= dict.fromkeys(names, job)
    for job in jobs:  # an output inside one that comes later
        for other in PurePosixPath(job.name).parents:
            if other in by_name:
                raise file.error(("steps", job.index, job.step.target), _overlap(job, by_name[other]))


def _overlap(job: PipelineJob, first: PipelineJob) -> str:
    """Return which two jobs have one output, made from what, and what to add to its name."""
    text = f"writes {job.out}, but so does step {first.step.name!r}"
    if job.index != first.index:
        return f"{text}; put more variables into its name"
    differing = [item for item in job.inputs if item not in first.inputs]
    others = [item for item in first.inputs if item not in job.inputs]
    if differing and others:
        text += f": once made from {others[0]}, once from {differing[0]}"
    differ = [name for name in job.variables if job.variables[name] != first.variables[name]]
    more = [f"{{{name}}}" for name in differ if f"{{{name}}}" not in job.template]
    if not more and differing:
        more = ["{parent} or {parent2}, the folders of the location"]
    return f"{text}; put more variables into its name{': ' if more else ''}{', '.join(more)}"


def check_inputs(
    file: RecipeFile, jobs: Sequence[PipelineJob], made: Mapping[Location, Location], *, keep_going: bool
) -> tuple[dict[str, remote.Found], dict[Location, str]]:
    """Check the inputs that no job makes.

    Returns:
        Metadata of the remote inputs, and what is wrong with missing inputs, which only ``keep_going`` allows.

    Raises:
        RecipeError: if an input is missing, is the output of its own job, or is a folder that holds outputs and is read
            whole.
    """
    missing: dict[Location, str] = {}
    seen: set[Location] = set()
    holders = {folder: job.out for job in jobs if isinstance(job.out, Path) for folder in job.out.parents}
    for job in jobs:
        for location, kind in job.inputs.items():
            if made.get(location) == job.out:
                raise file.error(("steps", job.index, job.step.target), f"{job.out} is also an input of the step")
            if kind == "file" and isinstance(location, Path) and in_place(location) in holders:
                message = f"{location}: all files in it are inputs, but it holds {holders[in_place(location)]}"
                raise _input_error(file, job, location, message)
            if not isinstance(location, Path) or location in seen:
                continue
            seen.add(location)
            if location not in made and (problem := problem_with(location)):
                missing[location] = problem
                if not keep_going:
                    raise _input_error(file, job, location, problem)
    remote_inputs = {
        location: (kind, job)
        for job in jobs
        for location, kind in job.inputs.items()
        if isinstance(location, str) and location not in made
    }
    found: dict[str, remote.Found] = {}
    with ThreadPoolExecutor(_MAX_LOOKUPS) as pool:
        answers = pool.map(lambda item: _stat_input(item[0], item[1][0]), remote_inputs.items())
        for (location, (_, job)), answer in zip(remote_inputs.items(), answers, strict=True):
            if not isinstance(answer, RemoteError):
                found[location] = answer
                continue
            missing[location] = str(answer)
            if not keep_going:
                raise _input_error(file, job, location, str(answer)) from answer
    return found, missing


def _stat_input(location: str, kind: remote.Kind) -> remote.Found | RemoteError:
    try:
        return remote.stat(location, kind)
    except RemoteError as error:
        return error


def _input_error(file: RecipeFile, job: PipelineJob, location: Location, message: str) -> RecipeError:
    """Return an error about an input, located at the key that names it."""
    for source, given in file.recipe.sources.items():
        if str(location) in ([given] if isinstance(given, str) else given):
            return file.error(("sources", source), message)
    for name in job.step.inputs:
        if location in map(to_location, job.step.texts_of(name)):
            return file.error(("steps", job.index, name), message)
    return file.error(("steps", job.index), message)
