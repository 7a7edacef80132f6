"""Processes that do jobs: each does many, one after the other, and its death takes only its job with it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, Protocol

from gguflora.system.cpus import usable_cpus

Request = dict[str, Any]
"""A job, ready for JSON: ``action``, ``arguments`` and ``out`` are for `worker`, the rest is for an `JobBackend`.

That is ``key``, a hash of the output's place and of all that it depends on; ``memory``, its peak in MB; and, for a
merge that may be done in parts, where these go, ``parts``.
"""
Answer = dict[str, Any]
"""``report``, or ``error``; ``died`` if that was the end of a process."""

_POLL_MILLISECONDS: Final = 200


class JobBackend(Protocol):
    """Where jobs are done.

    Attributes:
        at_a_time: how many jobs at a time.
        memory: what they may need together, in MB.
        threads: how many threads a job should use.
    """

    max_concurrency: int
    memory: int
    threads: int

    def run(self, request: Request) -> Answer:
        """The answer to a job; waits for it, and may be called from several threads."""

    def close(self) -> None:
        """Stop; jobs that run are cut short and leave nothing behind."""


class Workers:
    """As many processes of `worker` on this machine as there are jobs at a time; `close` ends them."""

    def __init__(self, max_concurrency: int = 1, memory: int | None = None) -> None:
        self.max_concurrency, self.memory = max_concurrency, memory or _free_memory()
        self.threads = max(1, usable_cpus() // max_concurrency)
        self._lock = threading.Lock()
        self._all: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False

    def run(self, request: Request, is_cancelled: Callable[[], bool] = lambda: False) -> Answer:
        """The answer to a job, which is ended when it is found to be cancelled."""
        if "memory://" in json.dumps(request):  # which is this process's own
            from gguflora.pipeline.job_process import run_job  # noqa: PLC0415  (so that it can be run as a program)

            answer_here: Answer = json.loads(json.dumps(run_job(request)))
            return answer_here
        with self._lock:
            if self._closed:
                return {"error": "interrupted"}
            worker = self._idle.pop() if self._idle else _Worker()
            self._all.add(worker)
        answer = worker.ask(request, is_cancelled)
        with self._lock:
            if answer is not None:
                self._idle.append(worker)
                return answer
            self._all.discard(worker)
        return {"error": worker.last_words(), "died": True}

    def close(self) -> None:
        """Stop all processes; jobs that run are cut short and leave nothing behind."""
        with self._lock:
            self._closed = True
            every, idle = list(self._all), list(self._idle)
            self._all.clear()
            self._idle.clear()
        for worker in every:
            worker.terminate()
        for worker in every:
            worker.wait()
        for worker in idle:  # the others are closed by those who have asked them
            worker.close()


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


class _Worker:
    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gguflora.pipeline.job_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._answered = select.poll()
        if self._process.stdout is not None:
            self._answered.register(self._process.stdout)

    def ask(self, request: Request, is_cancelled: Callable[[], bool]) -> Answer | None:
        """The answer; None if the process has died."""
        if self._process.stdin is None or self._process.stdout is None:
            return None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            while not self._answered.poll(_POLL_MILLISECONDS):
                if is_cancelled():
                    self._process.terminate()
            answer: Answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            return None
        return answer

    def last_words(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        self.close()
        return f"its process ended with code {code}: {(lines or ['no message'])[-1]}"

    def terminate(self) -> None:
        """Let the process end."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()

    def close(self) -> None:
        """Close its streams."""
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            if stream is not None:
                stream.close()
