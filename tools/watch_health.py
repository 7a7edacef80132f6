"""Ask a server's /health all the time and say how long it was silent: ``python tools/watch_health.py PORT PID``.

It runs in a process of its own, so that clients in Python do not delay it. On a busy machine a server also waits for a
core. Linux counts that time for each thread (schedstat), so it can be taken off: what is left is the server's own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gguflora.files.strict_json import to_json

_EVERY = 0.1
_TIMEOUT = 60.0


@dataclass
class Silences:
    """What was seen.

    Attributes:
        asked: how often /health was asked.
        longest: the longest time without an answer, in seconds.
        longest_own: the longest time of these that the server did not wait for a core.
        lost: why /health was not answered at all, one text for each time.
    """

    asked: int = 0
    longest: float = 0.0
    longest_own: float = 0.0
    lost: list[str] = field(default_factory=list)


def waits(pid: int) -> dict[str, float]:
    """Return the seconds that each thread of a process has waited for a core; none where the system does not count."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            found[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return found


def own_part(seconds: float, pid: int, before: tuple[dict[str, float], float]) -> float:
    """Return the part of some seconds in which neither this process nor the server waited for a core.

    Args:
        seconds: how long an answer took.
        pid: the server's process, whose first thread is the event loop; of the others, one may hold Python's lock.
        before: what `waits` and `my_wait` returned before.
    """
    then, mine = before
    waited = {thread: total - then.get(thread, 0.0) for thread, total in waits(pid).items()}
    loop = waited.pop(str(pid), 0.0)
    return max(seconds - loop - max(waited.values(), default=0.0) - (my_wait() - mine), 0.0)


def my_wait() -> float:
    """Return the seconds that this process has waited for a core."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def watch(port: int, pid: int) -> Silences:
    """Ask until the standard input is closed."""
    seen = Silences()
    while not select.select([sys.stdin], [], [], _EVERY)[0]:
        before, started = (waits(pid), my_wait()), time.monotonic()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
        try:
            client.request("GET", "/health")
            if (status := client.getresponse().status) != http.client.OK:
                seen.lost.append(f"status {status}")
        except (OSError, http.client.HTTPException) as error:
            seen.lost.append(repr(error))
        finally:
            client.close()
        seconds = time.monotonic() - started
        seen.asked += 1
        seen.longest = max(seen.longest, seconds)
        seen.longest_own = max(seen.longest_own, own_part(seconds, pid, before))
    return seen


@contextlib.contextmanager
def watching(port: int, pid: int) -> Iterator[Silences]:
    """Watch a server during the block; what was seen is there when the block has ended."""
    seen = Silences()
    command = [sys.executable, str(Path(__file__)), str(port), str(pid)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield seen
    finally:
        said, _ = process.communicate(timeout=_TIMEOUT + 10)
        vars(seen).update(json.loads(said))


if __name__ == "__main__":
    print(to_json(vars(watch(int(sys.argv[1]), int(sys.argv[2])))))
