"""Look ahead: what a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence

from gguflora.errors import GgufloraError
from gguflora.pipeline.checks import failed_checks
from gguflora.pipeline.job import PipelineJob, RecipePlan
from gguflora.pipeline.records import Records
from gguflora.pipeline.results import Status, StepResult, compress


def preview(
    plan: RecipePlan,
    jobs: Sequence[PipelineJob],
    records: Records,
    *,
    stop: bool,
    force: bool = False,
    adopt: bool = False,
) -> list[StepResult] | None:
    """Return what would become of each job: ``kept``, ``planned`` (and why) or ``failed``.

    Args:
        plan: the plan of all jobs.
        jobs: the jobs to look at.
        records: what was made before.
        stop: return None as soon as a job is not kept.
        force: whether files that no record names may be replaced.
        adopt: whether they may be kept, if they are what the job makes.
    """
    results: list[StepResult] = []
    for job in jobs:
        result = _preview(plan, job, records, force=force, adopt=adopt)
        if stop and result.status != "kept":
            return None
        results.append(result)
    return results


def _preview(plan: RecipePlan, job: PipelineJob, records: Records, *, force: bool, adopt: bool) -> StepResult:
    missing = [plan.missing[location] for location in job.inputs if location in plan.missing]
    if missing:
        return StepResult(job.step.name, job.out, "failed", 0.0, "", missing[0], name=job.name)
    try:
        state = records.state_of(job)
        if state.report is None:
            records.check_place(job, force=force, adopt=adopt)
    except (GgufloraError, OSError) as error:
        return StepResult(job.step.name, job.out, "failed", 0.0, "", input_problem(error), name=job.name)
    if state.report is None:
        return StepResult(job.step.name, job.out, "planned", 0.0, "", why=state.why, name=job.name)
    return judged(job, state.report, records)


def judged(job: PipelineJob, report: dict[str, object], records: Records) -> StepResult:
    """Return the result of a job whose output is up to date: kept, or failed if its report breaks a limit."""
    failed = failed_checks(report, job.checks)
    status: Status = "failed" if failed else "kept"
    error = "; ".join(failed) or None
    packed, key = compress(report), records.key_of(job)
    return StepResult(job.step.name, job.out, status, 0.0, key, error, packed, name=job.name)


def input_problem(error: Exception) -> str:
    """Return what is wrong with an input."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: cannot be read: {error.strerror}"
    return str(error)
