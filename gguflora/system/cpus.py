"""The number of CPUs and threads to use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from gguflora.system.cgroups import ControlGroup, control_groups


def usable_cpus() -> int:
    """Return the number of CPUs this process may use, which can be fewer than the machine has.

    It is the smaller of the CPUs that its affinity allows and the quota of its control groups (``docker run --cpus``,
    a Kubernetes limit), rounded up.
    """
    return min([_allowed_cpus(), *_own_quotas()])


def cpu_quotas(root: Path = Path("/")) -> list[int]:
    """Return the CPU quotas of the control groups that hold this process, in CPUs, rounded up."""
    quotas = map(_quota, control_groups("cpu", root))
    return [max(1, -(-quota // period)) for quota, period in quotas if quota and period and quota > 0]


@cache  # asked for before every kernel call
def _own_quotas() -> list[int]:
    return cpu_quotas()


def thread_count(threads: int | None) -> int:
    """Return ``threads``, or one thread per usable CPU if it is None or 0."""
    return threads or usable_cpus()


def _allowed_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity; Windows has one that Python cannot read before 3.13


def _quota(group: ControlGroup) -> tuple[int | None, int | None]:
    """Return quota and period of a group in microseconds; None where there is no limit."""
    if group.is_v2:
        numbers = group.read_numbers("cpu.max")
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (None, None)
    return group.read_number("cpu.cfs_quota_us"), group.read_number("cpu.cfs_period_us")
