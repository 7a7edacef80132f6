"""Run jobs on a Dask cluster: a `JobBackend` whose jobs are tasks of a scheduler."""

from __future__ import annotations

import importlib.util
import logging
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.errors import ClusterError, GgufloraError, MissingExtraError
from gguflora.files import remote

if not importlib.util.find_spec("distributed"):
    raise MissingExtraError("--scheduler", "Dask", "distributed")

from distributed import CancelledError, Client, Future
from distributed.deploy import Cluster
from distributed.scheduler import KilledWorker

from gguflora.pipeline import dask_worker
from gguflora.pipeline.local_workers import Answer, Request
from gguflora.pipeline.locations import Location

_LOG = logging.getLogger("gguflora.pipeline")
_TIMEOUT: Final = 10
"""Seconds to wait for the scheduler to answer, and for a first worker if nothing is known about it."""
_PATIENCE: Final = 600
"""Seconds to wait for a first worker of a cluster that starts workers when there is work."""
_MAX_TASKS: Final = 1000
"""Tasks that a cluster has at once. It sees them waiting and can grow; each takes a thread here."""
_RETRIES: Final = 2
"""Retries of a job whose process died. For workers that die, Dask's ``allowed-failures`` counts."""


class DaskBackend:
    """Runs jobs on the workers of a scheduler.

    Args:
        scheduler: address of a scheduler, such as ``tcp://host:8786``, a client or a cluster.
        max_concurrency: highest number of concurrent jobs; by default as many as the cluster takes.
        memory: memory for all running jobs together, in MB; by default each worker counts its own.
        store: a folder that this machine and the workers must share.

    Raises:
        ClusterError: if the scheduler cannot be reached, has no workers, or they cannot run the jobs.
    """

    def __init__(
        self, scheduler: str | Client | Cluster, *, max_concurrency: int | None, memory: int | None, store: Location
    ) -> None:
        self._run = secrets.token_hex(4)
        self._lock, self._futures, self._closed = threading.Lock(), set[Future](), False
        self._client, self._is_own = _connect(scheduler)
        self._address = self._client.scheduler.address
        try:
            workers = self._checked_workers(store)
        except BaseException:
            self._disconnect()
            raise
        self._declared_limit = max((facts["declared"] for facts in workers if facts["declared"]), default=None)
        self.max_concurrency = max_concurrency or _MAX_TASKS
        self._memory, self.threads = memory or sys.maxsize, 1  # a worker has one thread per core
        _LOG.info("%s: %d workers, up to %d tasks at once", self._address, len(workers), self.max_concurrency)

    @property
    def memory(self) -> int:
        """Memory for all running jobs together, in MB."""
        return self._memory

    def run(self, request: Request) -> Answer:
        """Run a job and return its answer. Safe to call from several threads.

        A merge with ``parts`` runs as one task for each part, and one that assembles them.
        """
        if "parts" not in request:
            return self._run_all([request])[0]
        answers = self._run_all(_part_requests(request))
        failed = [answer for answer in answers if "report" not in answer]
        return failed[0] if failed else self._run_all([_assemble_request(request)])[0]

    def close(self) -> None:
        """Cancel running jobs and disconnect from the scheduler."""
        with self._lock:
            self._closed = True
            futures = list(self._futures)
        try:
            self._client.cancel(futures)
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._is_own:
            self._client.close()

    def _first_worker(self, file: str) -> dict[str, Any]:
        """Return the facts of some worker. Asking is a task, so that a cluster without workers starts one."""
        patience = _PATIENCE if getattr(self._client.cluster, "_adaptive", None) else _TIMEOUT
        _LOG.info("%s: waiting for a worker", self._address)
        future = self._client.submit(dask_worker.facts_here, file, key=f"facts-{self._run}", pure=False)
        try:
            facts: dict[str, Any] = future.result(timeout=patience)
        except TimeoutError as error:
            future.cancel()
            raise ClusterError(
                f"{self._address}: the scheduler has no workers; start some: dask worker {self._address}"
            ) from error
        except GgufloraError as error:
            raise ClusterError(f"{self._address}: a worker: {error}") from error
        except Exception as error:  # any error of the worker: it cannot load this module, for example
            raise ClusterError(
                f"{self._address}: a worker has no gguflora {__version__} ({error}); install the same version on all"
            ) from error
        return facts

    def _checked_workers(self, store: Location) -> list[dict[str, Any]]:
        with _probe(store) as file:
            first = self._first_worker(file) if not self._client.scheduler_info()["workers"] else None
            replies = self._client.run(dask_worker.facts, file, on_error="return")
            if not replies and first is not None:  # it was only started for the question
                replies = {first["address"]: first}
            if not replies:
                replies = {"a worker": self._first_worker(file)}
        for worker, facts in replies.items():
            if isinstance(facts, GgufloraError):
                raise ClusterError(f"{worker}: {facts}")
            if isinstance(facts, BaseException):
                raise ClusterError(
                    f"{worker}: has no gguflora {__version__} ({facts}); install the same version on all workers"
                )
            if facts["version"] != __version__:
                raise ClusterError(f"{worker}: {dask_worker.version_error(facts['version'], __version__)}")
            if not facts["shares"]:
                raise ClusterError(
                    f"{worker}: does not see {store} as this machine does; all machines must have the output folder "
                    "under the same path, or it must be a URL such as s3://bucket/folder"
                )
        return list(replies.values())

    def _run_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Run jobs concurrently and return their answers. The first failure cancels the others."""
        futures = [self._submit(request) for request in requests]
        answers = []
        try:
            for future in futures:
                answers.append(_answer(future) if future else {"error": "interrupted"})
                if "report" not in answers[-1]:
                    self._client.cancel([future for future in futures if future])
        finally:
            with self._lock:
                self._futures.difference_update(futures)
        return answers

    def _submit(self, request: Request) -> Future | None:
        """Submit a job as a task; return None if the backend is closed."""
        resources = (
            None if self._declared_limit is None else {dask_worker.MEMORY: min(request["memory"], self._declared_limit)}
        )
        with self._lock:
            if self._closed:
                return None
            future = self._client.submit(
                dask_worker.run_job,
                {**request, "version": __version__},
                key=f"{request['action']}-{request['key'][:32]}-{self._run}",
                resources=resources,
                retries=_RETRIES,
                pure=False,
            )
            self._futures.add(future)
        return future


@contextmanager
def _probe(store: Location) -> Iterator[str]:
    """Create a temporary file in the store, to test that workers share it."""
    if isinstance(store, Path):
        with tempfile.NamedTemporaryFile(dir=store) as file:
            yield file.name
        return
    location = remote.join(store, secrets.token_hex(8))
    remote.write_bytes(location, b"")
    try:
        yield location
    finally:
        remote.remove(location)


class _Client(Client):  # type: ignore[misc]  # Dask has no types
    """A client that stops its thread and closes if it cannot connect.

    Otherwise the garbage collector closes it at any time. Closing needs a lock that every client holds while it starts
    its thread, so closing at that moment would deadlock.
    """

    def __init__(self, address: str | Cluster) -> None:
        try:
            super().__init__(address, timeout=_TIMEOUT, set_as_default=False)
        except BaseException:
            self.close()
            self._loop_runner.stop()
            raise


def _connect(scheduler: str | Client | Cluster) -> tuple[Client, bool]:
    """Return a client, and whether it is to be closed here: a client of the caller is not."""
    if isinstance(scheduler, Client):
        if scheduler.asynchronous:
            raise ClusterError("the client is asynchronous; give one that is not, or the scheduler's address")
        return scheduler, False
    address = getattr(scheduler, "scheduler_address", scheduler)
    try:
        return _Client(scheduler), True
    except (OSError, ValueError, TypeError, ImportError) as error:  # ValueError for a bad address, TypeError for tls://
        raise ClusterError(f"{address}: no Dask scheduler can be reached: {error}") from error


def _part_requests(request: Request) -> list[Request]:
    count = len(request["parts"])
    return [
        {
            "action": "merge_part",
            "arguments": {**request["arguments"], "number": number, "count": count},
            "out": part,
            "key": f"{number}-{request['key']}",
            "memory": request["memory"],
        }
        for number, part in enumerate(request["parts"], 1)
    ]


def _assemble_request(request: Request) -> Request:
    arguments = {**request["arguments"], "parts": request["parts"]}
    others = {name: item for name, item in request.items() if name != "parts"}
    return {**others, "action": "assemble", "arguments": arguments}


def _answer(future: Future) -> Answer:
    try:
        answer: Answer = future.result()
    except CancelledError:
        return {"error": "interrupted: its task was cancelled, or the scheduler is gone"}
    except KilledWorker as error:
        return {"error": f"{error.allowed_failures + 1} workers died of this job, last {error.last_worker.address}"}
    except Exception as error:  # any error of the worker
        return {"error": str(error) or type(error).__name__}
    return answer
