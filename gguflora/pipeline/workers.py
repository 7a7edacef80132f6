"""Processes that do jobs: each does many, one after the other, and its death takes only its job with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any


class Workers:
    """As many processes of `worker` as there are jobs at a time; `close` ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a job: its ``report``, or an ``error``; see `do`."""
        if "memory://" in json.dumps(job):  # which is this process's own
            from gguflora.pipeline.worker import do  # noqa: PLC0415  (so that it can be run as a program)

            return do(job)
        with self._lock:
            if self._closed:
                return {"error": "interrupted"}
            worker = self._idle.pop() if self._idle else _Worker()
            self._all.add(worker)
        answer = worker.ask(job)
        with self._lock:
            if answer is not None:
                self._idle.append(worker)
                return answer
            self._all.discard(worker)
        return {"error": worker.last_words()}

    def close(self) -> None:
        """Stop all processes; jobs that run are cut short and leave nothing behind."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
            self._all.clear()
            self._idle.clear()
        for worker in workers:
            worker.stop()


class _Worker:
    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gguflora.pipeline.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The answer; None if the process has died."""
        if self._process.stdin is None or self._process.stdout is None:
            return None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            return None
        return answer

    def last_words(self) -> str:
        """How the process ended."""
        code = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        self._close()
        return f"its process ended with code {code}: {(lines or ['no message'])[-1]}"

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            if stream is not None:
                stream.close()
