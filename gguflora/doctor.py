"""What this machine offers and what is installed, for ``gguflora doctor`` and for bug reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from gguflora import _native
from gguflora._version import __version__

PACKAGES: Final = ("numpy", "gguf", "safetensors", "llama-cpp-python", "torch", "peft")


def describe_machine() -> Iterator[str]:
    """Lines of text: versions, processor, instruction sets, quant types."""
    yield f"gguflora {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"cpu: {_cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable"
    yield f"kernels: {_native.current_isa()} (available: {', '.join(_native.isa_names())}; force one with GGUFLORA_ISA)"
    yield from _kernel_table()
    for package in PACKAGES:
        yield f"{package}: {_installed(package)}"


def _kernel_table() -> Iterator[str]:
    """What there is for every quant type, by the same kernels on every instruction set."""
    yield "type       weights bytes  quantize  imatrix   dequantize  dither"
    for kind in _native.TYPES.values():
        imatrix = "required" if kind.needs_imatrix else "yes"
        dither = "yes" if kind.dithers else "no"
        yield (
            f"{kind.name:<10} {kind.block_weights:>7} {kind.block_bytes:>5}  "
            f"{'yes':<8}  {imatrix:<8}  {'yes':<10}  {dither}"
        )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
