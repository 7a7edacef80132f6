"""Run the jobs of a plan: start each when its inputs are ready and there is enough memory."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Final

from gguflora.errors import GgufloraError, OutputError
from gguflora.pipeline.checks import failed_checks
from gguflora.pipeline.job import PipelineJob, RecipePlan
from gguflora.pipeline.keys import Keys
from gguflora.pipeline.local_workers import JobBackend, Request
from gguflora.pipeline.locations import Location, to_location
from gguflora.pipeline.lock import FolderLock, LockLostError
from gguflora.pipeline.orphans import remove_aside
from gguflora.pipeline.preview import input_problem, judged
from gguflora.pipeline.publish import publish_alone
from gguflora.pipeline.records import Records, aside_name, aside_of
from gguflora.pipeline.results import Status, StepResult, compress
from gguflora.pipeline.state import DRAFTS, discard, discard_drafts, inside, part_locations
from gguflora.pipeline.steps import Merge

_LOG = logging.getLogger("gguflora.pipeline")
_INTERRUPTED: Final = "interrupted"
_LOOK_SECONDS: Final = 1.0
"""Seconds between looks whether memory has become free for a job that waits, and whether a store's lock is held."""


class Runner:
    """Runs jobs.

    Args:
        plan: the plan of all jobs.
        graph: the outputs to make, and the outputs that each is made from.
        keys: computes keys of jobs.
        records: what was made before.
        backend: runs single jobs.
        lock: the lock of the output folder.
        watch: called with each result.
        force: replace outputs that no record names.
        adopt: keep them if they are the same as what the jobs make.

    Attributes:
        is_interrupted: whether Ctrl+C or SIGTERM stopped it.
    """

    def __init__(
        self,
        plan: RecipePlan,
        graph: Mapping[Location, set[Location]],
        keys: Keys,
        records: Records,
        backend: JobBackend,
        lock: FolderLock,
        watch: Callable[[StepResult], None],
        *,
        force: bool = False,
        adopt: bool = False,
    ) -> None:
        self._plan, self._dependencies = plan, graph
        self._jobs = {job.out: job for job in plan.jobs if job.out in graph}
        self._keys, self._records, self._backend, self._watch = keys, records, backend, watch
        self._lock, self._force, self._adopt = lock, force, adopt
        self._why: dict[Location, str] = {}
        self._replaces: dict[Location, bool] = {}
        self._results: dict[Location, StepResult] = {}
        self._has_failed = self.is_interrupted = False

    def run(self, *, keep_going: bool, resume: bool) -> list[StepResult]:
        """Run all jobs and return their results in the order of the jobs."""
        running: dict[Future[StepResult], Location] = {}
        stopped = ""
        with ThreadPoolExecutor(min(self._backend.max_concurrency, len(self._jobs) or 1)) as pool:
            try:
                discard_drafts(self._plan.folder)
                self._check_space()
                self._run_all(pool, running, keep_going=keep_going, resume=resume)
            except KeyboardInterrupt:
                self.is_interrupted, stopped = True, _INTERRUPTED
            except LockLostError as error:
                stopped = str(error)
            finally:
                self._backend.close()
        if self._lock.problem() is None:  # else the folder is another run's
            self._keys.save()
            discard_drafts(self._plan.folder)
        if stopped:
            self._finish_stopped(running, stopped)
        return [self._results[out] for out in self._jobs]

    def _run_all(
        self, pool: ThreadPoolExecutor, running: dict[Future[StepResult], Location], *, keep_going: bool, resume: bool
    ) -> None:
        sorter = TopologicalSorter(self._dependencies)
        sorter.prepare()
        waiting: list[Location] = []
        while sorter.is_active():
            waiting += sorter.get_ready()
            self._lock.check()
            for out in self._to_start(waiting, list(running.values())):
                waiting.remove(out)
                result = self._result_without_running(self._jobs[out], keep_going=keep_going, resume=resume)
                if result is None:
                    running[pool.submit(self._run_job, self._jobs[out])] = out
                else:
                    self._finish(result)
                    sorter.done(out)
            if running:
                is_waiting = bool(waiting) and len(running) < self._backend.max_concurrency
                is_watched = is_waiting or isinstance(self._lock.location, str)
                finished, _ = wait(running, _LOOK_SECONDS if is_watched else None, FIRST_COMPLETED)
                for future in finished:
                    self._finish(future.result())
                    sorter.done(running.pop(future))

    def _finish_stopped(self, running: Mapping[Future[StepResult], Location], why: str) -> None:
        """Collect what was done before a run was stopped; all else is left."""
        for future, out in running.items():
            done = future.result() if future.done() and not future.cancelled() else None
            if done is not None and done.status == "done":
                self._finish(done)
            else:
                self._finish(self._result(self._jobs[out], "left", error=why))
        for out, job in self._jobs.items():
            if out not in self._results:
                self._finish(self._result(job, "left", error=why))

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

    def _result_without_running(self, job: PipelineJob, *, keep_going: bool, resume: bool) -> StepResult | None:
        """Return the result of a job that need not or cannot run, or None if it must run."""
        unmade = [out for out in self._dependencies[job.out] if self._results[out].status in {"failed", "left"}]
        if unmade:
            return self._result(job, "left", error=f"needs {unmade[0]}, which was not made")
        if self._has_failed and not keep_going:
            return self._result(job, "left", error="another step failed; use --keep-going to run the other steps")
        missing = [self._plan.missing[location] for location in job.inputs if location in self._plan.missing]
        if missing:
            return self._result(job, "failed", error=missing[0])
        try:
            self._keys.key_of(job)
            state = self._records.state_of(job)
            if state.report is not None and resume:
                return judged(job, state.report, self._records)
            self._why[job.out] = state.why or "all outputs are made again"
            self._replaces[job.out] = self._records.check_place(job, force=self._force, adopt=self._adopt)
            return self._settle_put_aside(job) if resume else None
        except (GgufloraError, OSError) as error:
            return self._result(job, "failed", error=input_problem(error))

    def _settle_put_aside(self, job: PipelineJob) -> StepResult | None:
        """Return the result of a job whose output was put aside: it fails still, or takes its place now."""
        report = self._records.put_aside(job)
        if report is None:
            return None
        failed, aside = failed_checks(report, job.checks), aside_of(self._plan.folder, job.name)
        if failed:
            return self._result(job, "failed", report=report, error=_failure(failed, aside, job))
        if isinstance(aside, str) or isinstance(job.out, str):  # a store cannot rename; the job runs again
            return None
        files = self._records.files_made(aside_name(job.name))
        self._records.claim(job)
        drafts, claim = Path(str(inside(self._plan.folder, DRAFTS))), self._records.claim_of(job)
        publish_alone(aside, job.out, drafts, force=self._replaces[job.out], claim=claim)
        self._records.remember(job, report, files)
        self._records.disclaim(job)
        self._records.forget(aside_name(job.name))
        return self._result(job, "done", report=report)

    def _run_job(self, job: PipelineJob) -> StepResult:
        try:
            return self._make(job)
        except GgufloraError as error:  # while writing to the output folder
            return self._result(job, "failed", error=str(error))
        except OSError as error:
            return self._result(job, "failed", error=input_problem(error))

    def _make(self, job: PipelineJob) -> StepResult:
        started = time.perf_counter()
        _LOG.info("%s: making %s", job.step.name, job.out)
        self._records.claim(job)
        self._records.forget_stamps(job.name)
        request = self._request(job)
        answer = self._backend.run(request)
        may_be_stored = isinstance(job.out, str) and answer.get("died", False)
        if not ("report" in answer or may_be_stored or self._records.is_claimed(job)):  # made just before it died
            self._records.disclaim(job)  # what comes to its place after this is not the pipeline's
        self._lock.check()
        for part in request.get("parts", ()):
            discard(to_location(part))
        seconds = time.perf_counter() - started
        if "report" not in answer:
            return self._result(job, "failed", seconds=seconds, error=answer["error"])
        report, failed = answer["report"], answer.get("failed", [])
        self._records.remember(job, report, answer["files"], is_aside=bool(failed))
        self._records.disclaim(job)
        if failed:
            error = _failure(failed, answer["aside"], job)
            return self._result(job, "failed", seconds=seconds, report=report, error=error)
        remove_aside(self._plan.folder, self._records, job.name)
        return self._result(job, "done", seconds=seconds, report=report)

    def _request(self, job: PipelineJob) -> Request:
        """Return the request for a job; commands with threads get the backend's number of threads."""
        step, arguments = job.step, job.arguments
        key = hashlib.sha256(f"{self._keys.key_of(job)} {job.out}".encode(errors="surrogateescape")).hexdigest()
        if "threads" in type(step).model_fields:
            arguments.setdefault("threads", self._backend.threads)
        request = {
            "action": job.action,
            "arguments": arguments,
            "out": str(job.out),
            "target": step.target,
            "drafts": str(inside(self._plan.folder, DRAFTS)),
            "aside": str(aside_of(self._plan.folder, job.name)),
            "checks": job.checks,
            "key": key,
            "memory": step.memory,
            "permit": [str(self._lock.location), self._lock.token],
            "replace": self._replaces[job.out],
        }
        if (claim := self._records.claim_of(job)) is not None:
            request["claim"] = str(claim)
        if isinstance(step, Merge) and step.split:
            request["parts"] = [str(part) for part in part_locations(self._plan.folder, key, step.split)]
        return request

    def _check_space(self) -> None:
        """Check the disk space for new merged models, which are about as large as their bases."""
        if not isinstance(self._plan.folder, Path):
            return
        need = 0
        for out, job in self._jobs.items():
            step = job.step
            if isinstance(step, Merge) and step.patch is None and isinstance(out, Path) and not out.exists():
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
        key = self._records.known_key(job)
        why = self._why.get(job.out) if status in {"done", "failed"} else None
        return StepResult(job.step.name, job.out, status, seconds, key, error, compress(report), why, job.name)

    def _finish(self, result: StepResult) -> None:
        level = logging.ERROR if result.status == "failed" else logging.INFO
        _LOG.log(level, "%s: %s %s %s", result.step, result.status, result.out, result.error or "")
        self._results[result.out] = result
        self._has_failed |= result.status == "failed"
        self._watch(result)


def _failure(failed: list[str], aside: Location, job: PipelineJob) -> str:
    """Return which checks an output failed, and where it is."""
    return f"{'; '.join(failed)}; this output is {aside}, and {job.out} stays as it was"
