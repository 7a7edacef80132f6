"""What the system says about the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of the processor, or of its architecture if the system does not say."""
    return next((value for key, value in _rows() if key == "model name"), platform.processor() or platform.machine())


def processor_flags() -> set[str]:
    """Return Linux's names of what an x86 processor can do; empty elsewhere."""
    return set(next((value for key, value in _rows() if key == "flags"), "").split())


def processor_vendor() -> str:
    """Return Linux's name of an x86 processor's vendor, such as ``AuthenticAMD``; empty elsewhere."""
    return next((value for key, value in _rows() if key == "vendor_id"), "")


def _rows() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
