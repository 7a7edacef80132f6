"""``run_pipeline``: run a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from gguflora.errors import OutputError, RecipeError
from gguflora.files.output_rule import check_text_targets
from gguflora.pipeline.html import write_html
from gguflora.pipeline.job import RecipePlan, places_of
from gguflora.pipeline.keys import Keys
from gguflora.pipeline.local_workers import JobBackend, Workers
from gguflora.pipeline.locations import Location
from gguflora.pipeline.lock import locked
from gguflora.pipeline.orphans import find_orphans, remove_orphans
from gguflora.pipeline.plan import plan_jobs
from gguflora.pipeline.preview import preview
from gguflora.pipeline.recipe import STDIN, RecipeFile, read_recipe
from gguflora.pipeline.records import Records
from gguflora.pipeline.results import PipelineInterrupted, PipelineReport, StepResult, warnings_of
from gguflora.pipeline.runner import Runner
from gguflora.pipeline.scheduler_address import warn_of_plain_address
from gguflora.pipeline.selection import select_jobs
from gguflora.pipeline.state import check_own_folder, inside, read_json, write_json

if TYPE_CHECKING:
    from distributed import Client
    from distributed.deploy import Cluster


P = ParamSpec("P")
T = TypeVar("T")


def _telling_of_paths(run: Callable[P, T]) -> Callable[P, T]:
    """Let what the system says of a recipe's paths, such as names that are too long, be an error of the recipe's."""

    @wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return run(*args, **kwargs)
        except OSError as error:
            raise RecipeError(f"{error.filename or 'the recipe'}: {error.strerror or error}") from error
        except RuntimeError as error:  # of Path.resolve, before Python 3.13
            if "Symlink loop" not in str(error):
                raise
            raise RecipeError(f"{error}; remove the link") from error

    return wrapped


@_telling_of_paths
def run_pipeline(
    recipe: str | os.PathLike[str],
    *,
    targets: Sequence[str] = (),
    var: Mapping[str, str | int | float] | None = None,
    jobs: int | None = None,
    scheduler: str | Client | Cluster | None = None,
    dry_run: bool = False,
    keep_going: bool = False,
    allow_empty: bool = False,
    resume: bool = True,
    prune: bool = False,
    force: bool = False,
    adopt: bool = False,
    allow_outside: bool = False,
    report: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    watch: Callable[[StepResult], None] = lambda _: None,
) -> PipelineReport:
    """Run the steps of a recipe. Outputs that are up to date are kept.

    Args:
        recipe: TOML file, see `gguflora.pipeline.recipe`; its paths are relative to its folder. ``-`` is stdin, with
            paths relative to the working directory.
        targets: make only these, and what they need: names of steps, outputs, or globs of outputs.
        var: values of the recipe's variables; they take precedence over its ``vars``.
        jobs: highest number of concurrent jobs, each in its own process; by default 1, or on a cluster as many as it
            takes.
        scheduler: a Dask cluster whose workers run the jobs: an address such as ``tcp://host:8786``, a
            ``distributed.Client`` or a cluster.
        dry_run: check everything and say for each job whether it would run, and why; write nothing.
        keep_going: after a failure, continue with jobs that do not depend on it. Inputs that cannot be found or read
            are failures of the jobs that need them.
        allow_empty: let globs match nothing, and steps have no jobs.
        resume: keep outputs that are up to date; False makes all of them again.
        prune: remove outputs that former runs of this recipe made and that it no longer names; not after a run that did
            not do all its jobs, since an old output may be the last good one.
        force: replace files that no record of the pipeline names; they may be the user's own.
        adopt: where such a file is in an output's place, make the output, and keep the file for it if it is the same,
            byte for byte. So a pipeline goes on after its records were lost.
        allow_outside: let the recipe's output folder lie outside of the recipe's own folder.
        report: folder for ``report.json`` and ``report.html``.
        memory: memory in MB that running jobs may claim together (the ``memory`` of their steps); by default what is
            available when a job could start, or the workers' memory.
        watch: called with the result of each job as it ends.

    Raises:
        RecipeError: if the recipe is invalid, or writes outside of its folder without ``allow_outside``; then nothing
            has run.
        OutputError: if another run is using the output folder, the disk has too little space for the outputs, or the
            report cannot be written.
        ClusterError: if the scheduler cannot be reached, or its workers cannot run the jobs.
        PipelineInterrupted: a KeyboardInterrupt with the ``report`` of what was done.
    """
    started = time.perf_counter()
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected a positive whole number")
    if report is not None:
        _check_report(Path(report), recipe, force=force)
    file = read_recipe(Path(recipe), var)
    plan = plan_jobs(file, keep_going=keep_going, allow_empty=allow_empty)
    _check_apart(plan, report)
    check_own_folder(plan.folder)
    if not allow_outside:
        _check_inside(file, plan.folder)
    needs = _dependencies(file, plan)
    chosen = select_jobs(plan, targets, needs, file.root)
    graph = {job.out: needs[job.out] for job in chosen}
    keys, name = Keys(plan), _recipe_name(file, plan.folder)
    if prune and name is None:
        raise file.error((), 'a recipe from stdin needs a name for --prune, as in name = "nightly"')
    records = Records(plan.folder, name, keys)
    orphans = find_orphans(plan, records)
    is_interrupted, pruned = False, []
    results = None
    if dry_run or resume:
        results = preview(plan, chosen, records, stop=not dry_run, force=force, adopt=adopt)
    if results is None or (prune and orphans and not dry_run):
        with locked(plan.folder) as lock:
            records = Records(plan.folder, name, keys)
            backend = _open_backend(plan.folder, scheduler, jobs, memory)
            runner = Runner(plan, graph, keys, records, backend, lock, watch, force=force, adopt=adopt)
            results = runner.run(keep_going=keep_going, resume=resume)
            is_interrupted = runner.is_interrupted
            if prune and not any(result.status in {"failed", "left"} for result in results):
                pruned, orphans = find_orphans(plan, records), []
                remove_orphans(plan.folder, records, pruned)
    else:
        for result in results:
            watch(result)
        if not dry_run:
            keys.save()
    done = PipelineReport(
        Path(recipe),
        plan.folder,
        tuple(results),
        time.perf_counter() - started,
        warnings=(
            *warn_of_plain_address(scheduler),
            *plan.warnings,
            *(text for result in results for text in warnings_of(result)),
        ),
        orphans=tuple(orphans),
        pruned=tuple(pruned),
        interrupted=is_interrupted,
    )
    if report is not None:
        _write_report(Path(report), done)
    if is_interrupted:
        raise PipelineInterrupted(done)
    return done


def _check_inside(file: RecipeFile, folder: Location) -> None:
    """Check that a recipe, which may come from elsewhere, writes beside itself, or to a store that it names.

    Raises:
        RecipeError: if its output folder is another local folder.
    """
    if isinstance(folder, Path) and not folder.is_relative_to(file.root.resolve()):
        raise file.error(
            ("output",),
            f"{folder} is outside of the recipe's own folder; run it with --allow-outside if it may write there",
        )


def _recipe_name(file: RecipeFile, folder: Location) -> str | None:
    """Return what tells a recipe from others in records: its own name, or else where it lies; None for one from stdin.

    The way from the outputs to the recipe stays the same when both are moved together.
    """
    if file.recipe.name is not None:
        return f"name {file.recipe.name}"
    if os.fspath(file.path) == STDIN:
        return None
    return os.path.relpath(file.path.absolute(), folder) if isinstance(folder, Path) else str(file.path.absolute())


def _dependencies(file: RecipeFile, plan: RecipePlan) -> dict[Location, set[Location]]:
    """Return the outputs that each output is made from.

    Raises:
        RecipeError: if jobs depend on each other in a cycle.
    """
    graph = {job.out: {plan.made[location] for location in job.inputs if location in plan.made} for job in plan.jobs}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
        job = next(job for job in plan.jobs if job.out == cycle[0])
        path = " -> ".join(str(out) for out in cycle)
        raise file.error(("steps", job.index), f"outputs are made from each other: {path}") from None
    return graph


def _open_backend(
    folder: Location,
    scheduler: str | Client | Cluster | None,
    jobs: int | None,
    memory: int | None,
) -> JobBackend:
    if scheduler is None:
        return Workers(jobs or 1, memory)
    from gguflora.pipeline.dask_client import DaskBackend  # noqa: PLC0415  (needs Dask)

    return DaskBackend(scheduler, max_concurrency=jobs, memory=memory, store=inside(folder, ""))


def _report_files(folder: Path) -> tuple[Path, Path]:
    return folder / "report.json", folder / "report.html"


def _check_report(folder: Path, recipe: str | os.PathLike[str], *, force: bool) -> None:
    """Check, before the work, that a report can be written. It replaces the report of another run, and nothing else.

    Raises:
        OutputError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    old = read_json(folder / "report.json") or {}
    is_report = {"recipe", "output", "results", "totals"} <= old.keys()
    check_text_targets(_report_files(folder), [recipe], force=force or is_report)


def _check_apart(plan: RecipePlan, report: str | os.PathLike[str] | None) -> None:
    """Check that the report replaces no input and no output of the recipe.

    Raises:
        OutputError: if it does.
    """
    if report is not None:
        places = [place for job in plan.jobs for place in (*places_of(plan.folder, job), *job.inputs)]
        paths = {place for place in places if isinstance(place, Path)}
        check_text_targets(_report_files(Path(report)), paths, force=True)


def _write_report(folder: Path, report: PipelineReport) -> None:
    as_json, as_html = _report_files(folder)
    write_json(as_json, report.to_dict())
    write_html(as_html, report)
