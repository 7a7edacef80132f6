"""``run_pipeline``: run a recipe."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from gguflora.errors import GgufloraError, OutputError, RecipeError, RemoteError
from gguflora.pipeline.checks import failed_checks
from gguflora.pipeline.html import write_html
from gguflora.pipeline.local_workers import JobBackend, Request, Workers
from gguflora.pipeline.lock import locked
from gguflora.pipeline.plan import Location, PipelineJob, RecipePlan, canonical, plan_jobs, to_location
from gguflora.pipeline.recipe import Merge, RecipeFile, read_recipe
from gguflora.pipeline.results import PipelineReport, Status, StepResult, compress
from gguflora.pipeline.state import Keys, Records, discard, discard_parts, inside, part_locations, write_json

_LOG = logging.getLogger("gguflora.pipeline")


def run_pipeline(
    recipe: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    dry_run: bool = False,
    keep_going: bool = False,
    resume: bool = True,
    report: str | os.PathLike[str] | None = None,
    memory: int | None = None,
) -> PipelineReport:
    """Run the steps of a recipe. Outputs that are up to date are kept.

    Args:
        recipe: TOML file, see `gguflora.pipeline.recipe`; its paths are relative to its folder.
        jobs: highest number of concurrent jobs, each in its own process; by default 1, or with a scheduler the number
            of its workers' threads.
        scheduler: address of a Dask scheduler, such as ``tcp://host:8786``, whose workers run the jobs.
        dry_run: check everything but run nothing.
        keep_going: after a failure, continue with jobs that do not depend on it.
        resume: keep outputs that are up to date; False makes all of them again.
        report: folder for ``report.json`` and ``report.html``.
        memory: memory in MB that running jobs may claim together (the ``memory`` of their steps); by default the free
            memory, or the workers' memory.

    Raises:
        RecipeError: if the recipe is invalid; nothing has run then.
        OutputError: if another run is using the output folder, or the disk has too little space for the outputs.
        ClusterError: if the scheduler cannot be reached, or its workers cannot run the jobs.
    """
    started, file = time.perf_counter(), read_recipe(Path(recipe))
    if jobs is not None and jobs < 1:
        raise RecipeError(f"jobs is {jobs}, expected a positive whole number")
    plan = plan_jobs(file)
    graph = _dependencies(file, plan.jobs)
    if dry_run:
        results = [StepResult(job.step.name, job.out, "planned", 0.0, "") for job in plan.jobs]
    else:
        with locked(plan.folder):
            runner = _Runner(plan, graph, _open_backend(plan.folder, scheduler, jobs, memory))
            results = runner.run(keep_going=keep_going, resume=resume)
    done = PipelineReport(Path(recipe), plan.folder, tuple(results), time.perf_counter() - started)
    if report is not None:
        _write_report(Path(report), done)
    return done


def _dependencies(file: RecipeFile, jobs: list[PipelineJob]) -> dict[Location, set[Location]]:
    """Return the outputs that each output is made from.

    Raises:
        RecipeError: if jobs depend on each other in a cycle.
    """
    made = {job.out for job in jobs}
    graph = {job.out: {canonical(location) for location in job.inputs} & made for job in jobs}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
        job = next(job for job in jobs if job.out == cycle[0])
        path = " -> ".join(str(out) for out in cycle)
        raise file.error(("steps", job.index), f"outputs are made from each other: {path}") from None
    return graph


def _open_backend(folder: Location, scheduler: str | None, jobs: int | None, memory: int | None) -> JobBackend:
    if scheduler is None:
        return Workers(jobs or 1, memory)
    from gguflora.pipeline.dask_client import DaskBackend  # noqa: PLC0415  (needs Dask)

    return DaskBackend(scheduler, max_concurrency=jobs, memory=memory, store=inside(folder, ""))


def _write_report(folder: Path, report: PipelineReport) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error
    write_json(folder / "report.json", report.to_dict())
    write_html(folder / "report.html", report)


class _Runner:
    """Starts jobs when their inputs are ready and there is enough memory."""

    def __init__(self, plan: RecipePlan, graph: dict[Location, set[Location]], backend: JobBackend) -> None:
        self._plan, self._jobs, self._dependencies = plan, {job.out: job for job in plan.jobs}, graph
        self._backend, self._has_failed = backend, False
        self._keys: dict[Location, str] = {}
        self._results: dict[Location, StepResult] = {}
        self._hashes = Keys(plan.folder, plan.found)
        self._records = Records(plan.folder, self._hashes.hash_of)

    def run(self, *, keep_going: bool, resume: bool) -> list[StepResult]:
        """Run all jobs and return their results in the order of the jobs."""
        order = list(TopologicalSorter(self._dependencies).static_order())
        keys = self._hashes
        sorter = TopologicalSorter(self._dependencies)
        sorter.prepare()
        waiting: list[Location] = []
        running: dict[Future[StepResult], Location] = {}
        with ThreadPoolExecutor(self._backend.max_concurrency) as pool:
            try:
                discard_parts(self._plan.folder)
                self._check_space(order)
                while sorter.is_active():
                    waiting += sorter.get_ready()
                    for out in self._to_start(waiting, list(running.values())):
                        waiting.remove(out)
                        result = self._result_without_running(out, keys, keep_going=keep_going, resume=resume)
                        if result is None:
                            running[pool.submit(self._run_job, self._jobs[out])] = out
                        else:
                            self._finish(result)
                            sorter.done(out)
                    if running:
                        self._collect(running, sorter)
            finally:
                self._backend.close()
                keys.save()
        return [self._results[out] for out in self._jobs]

    def _collect(self, running: dict[Future[StepResult], Location], sorter: TopologicalSorter[Location]) -> None:
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            self._finish(future.result())
            sorter.done(running.pop(future))

    def _to_start(self, waiting: list[Location], running: list[Location]) -> list[Location]:
        """Choose jobs that fit into memory. A job that needs more memory than there is runs alone."""
        free = self._backend.memory - sum(self._jobs[out].step.memory for out in running)
        chosen: list[Location] = []
        for out in waiting:
            if len(running) + len(chosen) == self._backend.max_concurrency:
                break
            need = self._jobs[out].step.memory
            alone = not running and not chosen
            if need <= free or alone:
                chosen.append(out)
                free -= need
        return chosen

    def _result_without_running(
        self, out: Location, keys: Keys, *, keep_going: bool, resume: bool
    ) -> StepResult | None:
        """Return the result of a job that need not or cannot run, or None if it must run."""
        job = self._jobs[out]
        missing = [path for path in self._dependencies[out] if self._results[path].status in {"failed", "left"}]
        if missing:
            return self._result(job, "left", error=f"needs {missing[0]}, which was not made")
        if self._has_failed and not keep_going:
            return self._result(job, "left", error="another step failed; use --keep-going to run the other steps")
        try:
            self._keys[out] = keys.key_of(job)
        except RemoteError as error:
            return self._result(job, "failed", error=str(error))
        report = self._records.kept_report(job, self._keys[out]) if resume else None
        if report is None:
            return None
        failed = failed_checks(report, job.step.checks)
        return self._result(job, "failed" if failed else "kept", report=report, error="; ".join(failed) or None)

    def _run_job(self, job: PipelineJob) -> StepResult:
        try:
            return self._make(job)
        except GgufloraError as error:  # while writing to the output folder
            return self._result(job, "failed", error=str(error))

    def _make(self, job: PipelineJob) -> StepResult:
        started = time.perf_counter()
        _LOG.info("%s: making %s", job.step.name, job.out)
        self._records.forget(job)
        request = self._request(job)
        answer = self._backend.run(request)
        for part in request.get("parts", ()):
            discard(to_location(part))
        seconds = time.perf_counter() - started
        if "report" not in answer:
            return self._result(job, "failed", seconds=seconds, error=answer["error"])
        self._records.remember(job, self._keys[job.out], answer["report"])
        failed = failed_checks(answer["report"], job.step.checks)
        status: Status = "failed" if failed else "done"
        return self._result(job, status, seconds=seconds, report=answer["report"], error="; ".join(failed) or None)

    def _request(self, job: PipelineJob) -> Request:
        """Return the request for a job; commands with threads get the backend's number of threads."""
        step, arguments = job.step, job.arguments
        key = hashlib.sha256(f"{self._keys[job.out]} {job.out}".encode()).hexdigest()
        if "threads" in type(step).model_fields:
            arguments.setdefault("threads", self._backend.threads)
        request = {"action": job.action, "arguments": arguments, "out": str(job.out), "key": key, "memory": step.memory}
        if isinstance(step, Merge) and step.split:
            request["parts"] = [str(part) for part in part_locations(self._plan.folder, key, step.split)]
        return request

    def _check_space(self, order: list[Location]) -> None:
        """Check the disk space for new merged models, which are about as large as their bases."""
        if not isinstance(self._plan.folder, Path):
            return
        need = 0
        for out in order:
            step = self._jobs[out].step
            if isinstance(step, Merge) and isinstance(out, Path) and not out.exists():
                found = self._plan.found.get(step.base)
                need += found.size or 0 if found else Path(step.base).stat().st_size if Path(step.base).is_file() else 0
        free = shutil.disk_usage(self._plan.folder).free
        if need > free:
            raise OutputError(f"{self._plan.folder}: the merged models need {need:,} bytes, but only {free:,} are free")

    def _result(
        self,
        job: PipelineJob,
        status: Status,
        *,
        seconds: float = 0.0,
        report: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> StepResult:
        return StepResult(job.step.name, job.out, status, seconds, self._keys.get(job.out, ""), error, compress(report))

    def _finish(self, result: StepResult) -> None:
        level = logging.ERROR if result.status == "failed" else logging.INFO
        _LOG.log(level, "%s: %s %s %s", result.step, result.status, result.out, result.error or "")
        self._results[result.out] = result
        self._has_failed |= result.status == "failed"
