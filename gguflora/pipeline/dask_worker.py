"""Run a pipeline's jobs on a Dask worker, in separate processes, so that the worker survives a crash."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distributed import Status, get_worker

from gguflora._version import __version__
from gguflora.errors import ClusterError
from gguflora.files import remote
from gguflora.pipeline.local_workers import Answer, Request, Workers

if TYPE_CHECKING:
    from distributed import Worker

MEMORY: Final = "memory_mb"
"""Name of the Dask resource that a worker may declare: memory for all of its jobs together, in MB."""

_PROCESSES: Final = Workers()
_CLAIMS: Final[list[int]] = []
"""Memory of the jobs that this worker runs, in MB."""

_CHANGE: Final = threading.Condition()
_POLL: Final = 0.5
"""Seconds between looks whether a waiting job was cancelled."""


def run_job(request: Request) -> Answer:
    """Run a job. It is stopped when Dask cancels the task or the worker shuts down.

    Raises:
        ClusterError: if its process died; Dask then retries it.
    """
    if request["version"] != __version__:  # the worker joined after the client had checked all workers
        return {"error": f"{get_worker().address}: {version_error(__version__, request['version'])}"}
    worker = get_worker()
    key = worker.get_current_task()

    def is_cancelled() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status in {Status.closing, Status.closed}

    limit = worker.memory_manager.memory_limit
    is_declared = MEMORY in worker.state.total_resources  # then Dask counts
    with _claim(request["memory"], limit >> 20 if limit and not is_declared else None, is_cancelled):
        answer = _PROCESSES.run(request, is_cancelled)
    if answer.get("died"):
        raise ClusterError(f"{worker.address}: {answer['error']}")
    return answer


@contextmanager
def _claim(memory: int, limit: int | None, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Wait until the jobs of this worker leave enough of its memory, in MB; a job that needs all of it runs alone."""
    if limit is None:
        yield
        return
    with _CHANGE:
        while _CLAIMS and sum(_CLAIMS) + memory > limit and not is_cancelled():
            _CHANGE.wait(_POLL)
        _CLAIMS.append(memory)
    try:
        yield
    finally:
        with _CHANGE:
            _CLAIMS.remove(memory)
            _CHANGE.notify_all()


def version_error(found: str, expected: str) -> str:
    """Return the error message for a worker with another version."""
    return f"has gguflora {found}, expected {expected}; install the same version on all workers"


def facts_here(file: str) -> dict[str, Any]:
    """Return the `facts` of the worker that runs this task, and its ``address``."""
    worker = get_worker()
    return {**facts(file, worker), "address": worker.address}


def facts(file: str, dask_worker: Worker) -> dict[str, Any]:
    """Return what a client must know about a worker: version, threads, memory in MB, and whether it sees ``file``.

    Args:
        file: a file that the client has created in the shared store.
        dask_worker: the worker.
    """
    state = dask_worker.state
    limit = dask_worker.memory_manager.memory_limit
    return {
        "version": __version__,
        "shares": Path(file).exists() if not remote.is_remote(file) else remote.read_bytes(file) is not None,
        "threads": state.nthreads,
        "declared": state.total_resources.get(MEMORY),
        "memory": limit >> 20 if limit else None,
    }
