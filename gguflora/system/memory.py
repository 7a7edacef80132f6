"""How much memory this process may use, on the machine and under the limits of its control groups."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gguflora.errors import UsageError
from gguflora.system.cgroups import ControlGroup, control_groups

_UNKNOWN = 1 << 40
"""Bytes that a system is taken to have if it does not say."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def read_bytes(text: str, name: str = "memory") -> int:
    """Return the bytes of a size such as ``6G``.

    Args:
        text: a number, with K, M, G or T for powers of 1024.
        name: what the size is for, in the message of an error.

    Raises:
        UsageError: if it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise UsageError(f"{name} is {text!r:.80}, expected a size, for example 6G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def available_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process could take now without swapping.

    Caches of files that the system drops when memory is short count as available. A limit of a control group counts
    less what its processes use.

    Args:
        root: where the file system of the machine begins; only tests have another.
    """
    limits = [limit for group in control_groups("memory", root) if (limit := _left(group)) is not None]
    return max(0, min([_machine_memory(root, "MemAvailable"), *limits]))


def held_memory(process: int, root: Path = Path("/")) -> int:
    """Return how many bytes a process holds that no other one has; 0 if it has ended, or the system does not say.

    Args:
        process: its id.
        root: where the file system of the machine begins; only tests have another.
    """
    with suppress(OSError):
        found = re.search(
            r"^RssAnon:\s+(\d+) kB", (root / f"proc/{process}/status").read_text("ascii", "replace"), re.M
        )
        return int(found[1]) * 1024 if found else 0
    return 0


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory of the machine, or the lowest limit of this process's control groups."""
    limits = [limit for group in control_groups("memory", root) if (limit := _limit(group)) is not None]
    return min([_machine_memory(root, "MemTotal"), *limits])


def forget_pages(mapped: mmap.mmap, start: int = 0, stop: int | None = None) -> None:
    """Let the system take a mapped file's pages out of this process's memory; they are mapped again when read.

    Args:
        mapped: a file mapped read-only.
        start: first byte.
        stop: byte after the last; by default the end.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, (len(mapped) if stop is None else stop) - first)


def _limit(group: ControlGroup) -> int | None:
    """Version 1 has no word for "no limit": it stores a number near 2**63, which no machine has."""
    if not group.is_v2:
        return group.read_number("memory.limit_in_bytes")
    limits = [group.read_number(name) for name in ("memory.max", "memory.high")]
    return min((limit for limit in limits if limit is not None), default=None)


def _left(group: ControlGroup) -> int | None:
    limit = _limit(group)
    used = group.read_number("memory.current" if group.is_v2 else "memory.usage_in_bytes")
    if limit is None or used is None:
        return limit
    cached = group.read_row("memory.stat", "inactive_file" if group.is_v2 else "total_inactive_file") or 0
    return limit - max(0, used - cached)


def _machine_memory(root: Path, row: str) -> int:
    with suppress(OSError):
        found = re.search(rf"^{row}:\s+(\d+) kB", (root / "proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return _windows_memory()[row]
    with suppress(OSError, ValueError):  # macOS says how much it has, not how much is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _windows_memory() -> dict[str, int]:
    """GlobalMemoryStatusEx; MEMORYSTATUSEX is two 32-bit and seven 64-bit numbers."""

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("bytes", ctypes.c_uint64 * 7)]

    status = Status(length=ctypes.sizeof(Status))
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009  (mypy knows it on Windows only)
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return {"MemTotal": _UNKNOWN, "MemAvailable": _UNKNOWN}
    return {"MemTotal": status.bytes[0], "MemAvailable": status.bytes[1]}


def bound_free_memory() -> bool:
    """Let this process keep at most a megabyte of free memory at the end of each heap; whether the C library can.

    glibc raises its limits to 32 MB for blocks with a mapping of their own and to 64 MB for what stays free at the end
    of a heap as soon as such a block is freed, unless they are set. Each thread may get a heap, up to 8 for each core,
    and `give_back_memory` does not reach their ends.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20) and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 20))


def give_back_memory() -> bool:
    """Return memory that this process has freed to the system; whether the C library can (glibc can).

    These are pages between blocks in use, which no heap gives back by itself; for its end see `bound_free_memory`.
    """
    libc = _glibc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return True


@cache
def _glibc() -> Any:  # noqa: ANN401  (a library of ctypes)
    """Return the C library if it is glibc, else None."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        return libc if libc is not None and (libc.malloc_trim, libc.mallopt) else None  # musl has neither
    return None
