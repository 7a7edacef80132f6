"""What a command costs: wall and CPU seconds, peak memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Of one run: seconds, CPU seconds (user and system), most bytes of memory at once."""

    wall: float
    cpu: float
    memory: int

    def then(self, other: Usage) -> Usage:
        """Both runs, one after the other."""
        return Usage(self.wall + other.wall, self.cpu + other.cpu, max(self.memory, other.memory))


def run(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command, which must end well.

    The peak is the process's own high-water mark, read every 10 ms: the one that wait4 reports begins with the
    memory of the process that started it.

    Raises:
        SystemExit: with its output, if it does not.
    """
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
        )
        memory, pid = 0, 0
        while not pid:
            memory = max(memory, _peak(child.pid))
            time.sleep(0.01)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{text}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, memory)


def _peak(pid: int) -> int:
    """High-water mark of the resident memory in bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
