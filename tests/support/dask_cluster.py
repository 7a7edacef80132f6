"""A Dask scheduler and workers as processes, whose jobs can be held just before their output gets its name."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gguflora

PACKAGE = Path(gguflora.__file__).parent
GATE = """
import os, pathlib, time
sync = os.fsync
def held(handle):
    gate = pathlib.Path(os.environ["GATE"])
    if (gate / "closed").exists():
        (gate / f"new-{os.getpid()}").write_text(str(os.getppid()))
        (gate / f"new-{os.getpid()}").rename(gate / str(os.getpid()))
    while (gate / "closed").exists():
        time.sleep(0.02)
    sync(handle)
os.fsync = held
"""
"""Every process of the workers imports this as sitecustomize."""


class Cluster:
    """One scheduler and the workers that `start_worker` adds; all on this machine, without nannies."""

    def __init__(self, folder):
        self.folder, self.gate = folder, folder / "gate"
        self.gate.mkdir()
        (folder / "sitecustomize.py").write_text(GATE)
        address = folder / "address.json"
        self.workers = []
        self.scheduler = self._start("scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", address)
        self.address = wait_for(lambda: address_in(address))

    def _start(self, *command, path=()):
        path = os.pathsep.join(map(str, [*path, self.folder, PACKAGE.parent]))
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "dask", *map(str, command), "--no-dashboard"],
                env={**os.environ, "PYTHONPATH": path, "GATE": str(self.gate)},
                stdout=log,
                stderr=log,
            )

    def start_worker(self, *options, path=()):
        """A process with two threads."""
        worker = self._start("worker", self.address, "--no-nanny", "--nthreads", 2, *options, path=path)
        self.workers.append(worker)
        return worker

    def close_gate(self):
        """Hold jobs that are about to finish."""
        for held in self.gate.iterdir():
            held.unlink()
        (self.gate / "closed").touch()

    def open_gate(self):
        (self.gate / "closed").unlink(missing_ok=True)

    def held(self):
        """The jobs at the gate: their processes, and those of their workers."""
        return {int(path.name): int(path.read_text()) for path in self.gate.glob("[0-9]*") if path.name != "closed"}

    def close(self):
        self.open_gate()
        for process in [*self.workers, self.scheduler]:
            process.kill()
        for process in [*self.workers, self.scheduler]:
            process.wait()


def address_in(file):
    """The scheduler's, once its file is written."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())["address"]


def wait_for(condition, seconds=60):
    """Until something is true; returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def is_alive(pid):
    """Whether the process runs: it is neither gone nor waits for its parent to take note."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the second if it goes between opening and reading
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
