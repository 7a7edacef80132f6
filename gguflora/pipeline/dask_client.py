"""Jobs on a Dask cluster: an `Engine` whose jobs are tasks of a scheduler."""

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
from distributed.scheduler import KilledWorker

from gguflora.pipeline import dask_worker
from gguflora.pipeline.local_workers import Answer, Request
from gguflora.pipeline.plan import Location

_LOG = logging.getLogger("gguflora.pipeline")
_TIMEOUT: Final = 10
"""Seconds within which the scheduler must answer, and a worker be there."""
_RETRIES: Final = 2
"""How often a job is tried again whose process died. Of workers that die Dask's ``allowed-failures`` decides."""


class DaskEngine:
    """Does jobs on the workers of a scheduler.

    Args:
        address: of the scheduler, such as ``tcp://host:8786``.
        at_a_time: how many jobs; by default as many as the workers have threads.
        memory: what running jobs may need together, in MB; by default what the workers have.
        store: a folder that the workers must see as this machine does.

    Raises:
        ClusterError: if the scheduler cannot be reached or has no workers, or they cannot do the jobs.
    """

    def __init__(self, address: str, *, max_concurrency: int | None, memory: int | None, store: Location) -> None:
        self._address, self._run = address, secrets.token_hex(4)
        self._lock, self._futures, self._closed = threading.Lock(), set[Future](), False
        self._client = _connected(address)
        try:
            workers = self._checked_workers(store)
        except BaseException:
            self._client.close()
            raise
        self._most = max((facts["declared"] for facts in workers if facts["declared"]), default=None)
        self.max_concurrency = max_concurrency or sum(facts["threads"] for facts in workers)
        self.memory, self.threads = memory or _memory_of(workers), 1  # a worker's thread stands for a core
        _LOG.info("%s: %d workers, %d jobs at a time", address, len(workers), self.max_concurrency)

    def run(self, request: Request) -> Answer:
        """The answer to a job; waits for it, and may be called from several threads.

        A merge with ``parts`` is done in as many tasks, which write there, and one that assembles them.
        """
        if "parts" not in request:
            return self._answers([request])[0]
        answers = self._answers(_part_requests(request))
        failed = [answer for answer in answers if "report" not in answer]
        return failed[0] if failed else self._answers([_assembling_request(request)])[0]

    def close(self) -> None:
        """Cancel what is running, and leave the scheduler."""
        with self._lock:
            self._closed = True
            futures = list(self._futures)
        try:
            self._client.cancel(futures)
        finally:
            self._client.close()

    def _checked_workers(self, store: Location) -> list[dict[str, Any]]:
        try:
            self._client.wait_for_workers(1, timeout=_TIMEOUT)
        except TimeoutError as error:
            raise ClusterError(
                f"{self._address}: the scheduler has no workers; start some: dask worker {self._address}"
            ) from error
        with _probe(store) as file:
            found = self._client.run(dask_worker.facts, file, on_error="return")
        for worker, facts in found.items():
            if isinstance(facts, GgufloraError):
                raise ClusterError(f"{worker}: {facts}")
            if isinstance(facts, BaseException):
                said = f"has no gguflora {__version__} ({facts}); install the same version on all workers"
                raise ClusterError(f"{worker}: {said}")
            if facts["version"] != __version__:
                raise ClusterError(f"{worker}: {dask_worker.version_error(facts['version'], __version__)}")
            if not facts["shares"]:
                raise ClusterError(
                    f"{worker}: does not see {store} as this machine does; all machines must have the output folder "
                    "under the same path, or it must be a URL such as s3://bucket/folder"
                )
        return list(found.values())

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to jobs that are done at the same time; the first failure cancels those that go on."""
        futures = [self._submitted(request) for request in requests]
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

    def _submitted(self, request: Request) -> Future | None:
        """The task of a job; None if the run is over."""
        need = None if self._most is None else {dask_worker.MEMORY: min(request["memory"], self._most)}
        with self._lock:
            if self._closed:
                return None
            future = self._client.submit(
                dask_worker.run_job,
                {**request, "version": __version__},
                key=f"{request['action']}-{request['key'][:32]}-{self._run}",
                resources=need,
                retries=_RETRIES,
                pure=False,
            )
            self._futures.add(future)
        return future


@contextmanager
def _probe(store: Location) -> Iterator[str]:
    """A file that all who share the store can see."""
    if isinstance(store, Path):
        with tempfile.NamedTemporaryFile(dir=store) as file:
            yield file.name
        return
    place = remote.join(store, secrets.token_hex(8))
    remote.write_bytes(place, b"")
    try:
        yield place
    finally:
        remote.remove(place)


class _Client(Client):  # type: ignore[misc]  # Dask has no types
    """One that stops its thread and closes if it cannot connect.

    Left to the garbage collector it would be closed at any moment, with a lock that every client holds while it
    starts its thread: if that was the moment, it would wait for ever.
    """

    def __init__(self, address: str) -> None:
        try:
            super().__init__(address, timeout=_TIMEOUT, set_as_default=False)
        except BaseException:
            self.close()
            self._loop_runner.stop()
            raise


def _connected(address: str) -> Client:
    try:
        return _Client(address)
    except (OSError, ValueError, TypeError, ImportError) as error:  # of a wrong address ValueError, of tls:// TypeError
        raise ClusterError(f"{address}: no Dask scheduler can be reached: {error}") from error


def _memory_of(workers: Sequence[dict[str, Any]]) -> int:
    """What the workers have together, in MB. Where they declare it as a resource, Dask sees to it."""
    known = [facts["memory"] for facts in workers]
    if None in known or any(facts["declared"] for facts in workers):
        return sys.maxsize
    return sum(known)


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


def _assembling_request(request: Request) -> Request:
    arguments = {**request["arguments"], "parts": request["parts"]}
    own = {name: item for name, item in request.items() if name != "parts"}
    return {**own, "action": "assemble", "arguments": arguments}


def _answer(future: Future) -> Answer:
    try:
        answer: Answer = future.result()
    except CancelledError:
        return {"error": "interrupted: its task was cancelled, or the scheduler is gone"}
    except KilledWorker as error:
        return {"error": f"{error.allowed_failures + 1} workers died of it, the last was {error.last_worker.address}"}
    except Exception as error:  # whatever a worker raised
        return {"error": str(error) or type(error).__name__}
    return answer
