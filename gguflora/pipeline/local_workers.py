"""Run jobs in processes on this machine. Each process runs many jobs in turn; if it dies, only its job fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Protocol

from gguflora.files.strict_json import to_json
from gguflora.system.cpus import usable_cpus
from gguflora.system.memory import available_memory, held_memory
from gguflora.system.pipes import PipeReader

Request = dict[str, Any]
"""A job, ready for JSON. `gguflora.pipeline.job_process` uses ``action``, ``arguments`` and ``out``.

A `JobBackend` uses ``key``, a hash of the output's location and everything that it depends on; ``memory``, the job's
peak memory in MB; and, for a merge that may run in parts, ``parts``, the locations of the parts.
"""
Answer = dict[str, Any]
"""The ``report`` of a job, or its ``error``; ``died`` is set if the process died."""

_POLL_SECONDS: Final = 0.2


class JobBackend(Protocol):
    """Runs jobs.

    Attributes:
        max_concurrency: highest number of concurrent jobs.
        threads: number of threads that a job should use.
    """

    max_concurrency: int
    threads: int

    @property
    def memory(self) -> int:
        """Memory for all running jobs together, in MB. It may change while jobs run and end."""

    def run(self, request: Request) -> Answer:
        """Run a job and return its answer. Safe to call from several threads."""

    def close(self) -> None:
        """Stop all jobs. They remove their temporary files."""


class Workers:
    """Runs jobs in up to ``max_concurrency`` processes on this machine."""

    def __init__(self, max_concurrency: int = 1, memory: int | None = None) -> None:
        self.max_concurrency, self._memory = max_concurrency, memory
        self.threads = max(1, usable_cpus() // max_concurrency)
        self._lock = threading.Lock()
        self._all: set[_Worker] = set()
        self._claims: dict[_Worker, int] = {}
        self._idle: list[_Worker] = []
        self._closed = False

    @property
    def memory(self) -> int:
        """Memory for all jobs together, in MB: what was given, or what is available now and what they hold already.

        A job that holds more than it claimed has taken that from the others, so only its claim counts.
        """
        if self._memory is not None:
            return self._memory
        with self._lock:
            claims = {worker.process_id: self._claims.get(worker) for worker in self._all}
        held = [_counted(held_memory(process), claim) for process, claim in claims.items()]
        return (available_memory() + sum(held)) >> 20

    def run(self, request: Request, is_cancelled: Callable[[], bool] = lambda: False) -> Answer:
        """Run a job and return its answer; stop it when ``is_cancelled`` returns true."""
        # such a store exists in this process only; a program that embeds Python has no interpreter to start
        if "memory://" in to_json(request) or not sys.executable:
            from gguflora.pipeline.job_process import run_job  # noqa: PLC0415  (a program of its own, too)

            answer_here: Answer = json.loads(to_json(run_job(request)))
            return answer_here
        with self._lock:
            if self._closed:
                return {"error": "interrupted"}
            worker = self._idle.pop() if self._idle else _Worker()
            self._all.add(worker)
            self._claims[worker] = request.get("memory", 0) << 20
        answer = worker.ask(request, is_cancelled)
        with self._lock:
            del self._claims[worker]
            if answer is not None:
                self._idle.append(worker)
                return answer
            self._all.discard(worker)
        return {"error": worker.describe_end(), "died": True}

    def close(self) -> None:
        """Stop all processes. Running jobs remove their temporary files."""
        with self._lock:
            self._closed = True
            workers, idle = list(self._all), list(self._idle)
            self._all.clear()
            self._idle.clear()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        for worker in idle:  # the threads that use the others close them
            worker.close()


def _counted(held: int, claim: int | None) -> int:
    """Return what counts of the bytes that a process holds; one without a job gives all of them to its next one."""
    return held if claim is None else min(held, claim)


class _Worker:
    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gguflora.pipeline.job_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        self._answers = PipeReader(self._process.stdout)

    @property
    def process_id(self) -> int:
        """Id of the process."""
        return self._process.pid

    def ask(self, request: Request, is_cancelled: Callable[[], bool]) -> Answer | None:
        """Send a request and return the answer, or None if the process has died."""
        if self._process.stdin is None:
            return None
        try:
            self._process.stdin.write(to_json(request) + "\n")
            self._process.stdin.flush()
            answer: Answer = json.loads(self._read_line(is_cancelled))
        except (OSError, ValueError):
            return None
        return answer

    def _read_line(self, is_cancelled: Callable[[], bool]) -> bytes:
        """Return one line, without its end if the process has died."""
        line = bytearray()
        while not line.endswith(b"\n"):
            try:
                part = self._answers.read(_POLL_SECONDS)
            except TimeoutError:
                if is_cancelled():
                    self._process.terminate()
                continue
            if not part:
                break
            line += part
        return bytes(line)

    def describe_end(self) -> str:
        """Describe how the process ended, for an error message."""
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        return f"its process ended with code {code}: {(lines or ['no message'])[-1]}"

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def close(self) -> None:
        """Close the streams of the process, which ends it."""
        if self._process.stdin is not None:
            with suppress(OSError):  # what it did not read
                self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._stderr.close()
