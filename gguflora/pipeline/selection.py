"""Choose the jobs that a run is asked for, and those that they need."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gguflora.errors import RecipeError
from gguflora.files import remote
from gguflora.pipeline.job import PipelineJob, RecipePlan
from gguflora.pipeline.locations import Location, in_place


def select_jobs(
    plan: RecipePlan, targets: Sequence[str], needs: Mapping[Location, set[Location]], root: Path
) -> list[PipelineJob]:
    """Return the jobs that make the targets and what these need, in the order of the plan.

    Args:
        plan: all jobs.
        targets: names of steps, outputs or globs of outputs; none stands for everything. Outputs are named as in the
            recipe, or by a path from the working directory or the recipe's folder.
        needs: the outputs that each output is made from.
        root: the recipe's folder.

    Raises:
        RecipeError: if a target names nothing.
    """
    if not targets:
        return plan.jobs
    waiting = [job.out for target in targets for job in _named(plan, target, root)]
    chosen: set[Location] = set()
    while waiting:
        out = waiting.pop()
        if out not in chosen:
            chosen.add(out)
            waiting += needs[out]
    return [job for job in plan.jobs if job.out in chosen]


def _named(plan: RecipePlan, target: str, root: Path) -> list[PipelineJob]:
    by_step = [job for job in plan.jobs if job.step.name == target]
    if by_step:
        return by_step
    patterns = {target.removeprefix("./").rstrip("/")}
    if isinstance(plan.folder, str):
        patterns.add(target.removeprefix(f"{plan.folder}/"))
    elif not remote.is_remote(target):
        paths = [in_place(Path(target)), in_place(root / target)]
        patterns |= {str(path.relative_to(plan.folder)) for path in paths if path.is_relative_to(plan.folder)}
    found = [job for job in plan.jobs if not patterns.isdisjoint(job.names)]
    found = found or [job for job in plan.jobs if _matches(job, patterns)]
    if found:
        return found
    steps = ", ".join(dict.fromkeys(job.step.name for job in plan.jobs)) or "none"
    raise RecipeError(
        f"{target!r} names no output; give a step ({steps}), an output such as {_example(plan)}, or a glob"
    )


def _matches(job: PipelineJob, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for name in job.names for form in patterns)


def _example(plan: RecipePlan) -> str:
    return repr(plan.jobs[-1].name) if plan.jobs else "a path"
