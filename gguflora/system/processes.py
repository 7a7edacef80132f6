"""Limits of this process, what it has used, and whose it is. It imports only the standard library, and quickly."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def most_open_files() -> int | None:
    """Return how many files this process may have open; None if the system does not say, or sets no limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft >= 0 and soft != resource.RLIM_INFINITY else None


def confine(memory: int) -> None:
    """Take from this process what pure computation does not need: more than some memory, files, core dumps.

    Args:
        memory: bytes that it may use more than now. Windows sets no limits.
    """
    if resource is None:
        return
    with suppress(OSError):
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        resource.setrlimit(kind, (0, 0))


def set_alarm(seconds: float) -> None:
    """Let SIGPROF end this process when it has computed for some seconds; 0 for not at all. Not on Windows.

    What it waits for a core does not count: on a busy machine a millisecond of work can take seconds.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def terminate_self() -> None:
    """Send SIGTERM to this process. On Windows it ends at once, and the next output removes its drafts."""
    os.kill(os.getpid(), signal.SIGTERM)


def call_in_forks(action: Callable[[], object]) -> None:
    """Call ``action`` in every process that this one forks, at its beginning."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


def user_key() -> str:
    """Return what tells this user from others of the machine, for the name of a folder that many users share."""
    if hasattr(os, "getuid"):
        return str(os.getuid())
    import getpass  # noqa: PLC0415  (seldom needed)

    try:
        return re.sub(r"[^\w.-]", "_", getpass.getuser())
    except (OSError, ImportError, KeyError):
        return "user"


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory, with mapped files; 0 if the system does not say."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
