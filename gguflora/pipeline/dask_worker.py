"""What a Dask worker does for a pipeline: each job in a process of its own, so that the worker outlives it."""

from __future__ import annotations

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
"""Name of the resource that a worker may declare: what its jobs may need together, in MB."""

_PROCESSES: Final = Workers()


def run_job(request: Request) -> Answer:
    """Do a job; it is ended when Dask cancels the task, or the worker is told to go.

    Raises:
        ClusterError: if its process died, so that Dask tries it again.
    """
    if request["version"] != __version__:  # a worker that came later than the check of all
        return {"error": f"{get_worker().address}: {version_error(__version__, request['version'])}"}
    worker = get_worker()
    key = worker.get_current_task()

    def is_cancelled() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status in {Status.closing, Status.closed}

    answer = _PROCESSES.run(request, is_cancelled)
    if answer.get("died"):
        raise ClusterError(f"{worker.address}: {answer['error']}")
    return answer


def version_error(found: str, expected: str) -> str:
    """What to say of a worker with another version."""
    return f"has gguflora {found}, expected {expected}; install the same version on all workers"


def facts(file: str, dask_worker: Worker) -> dict[str, Any]:
    """What a client must know of a worker.

    Args:
        file: that the client has just made in the store which all should share.
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
