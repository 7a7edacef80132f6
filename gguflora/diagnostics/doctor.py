"""What this machine offers and what is installed, for bug reports: ``doctor``."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from gguflora._version import __version__
from gguflora.quants._lib import current_isa, isa_names
from gguflora.quants.types import TYPES
from gguflora.system.cpus import usable_cpus

PACKAGES: Final = ("numpy", "gguf", "safetensors", "llama-cpp-python", "torch", "peft")


@dataclass(frozen=True, slots=True)
class QuantType:
    """What the kernels can do with a quant type; the same on every instruction set.

    Attributes:
        name: as ggml spells it.
        block_weights: weights of a block.
        block_bytes: bytes of a block.
        needs_imatrix: whether it can be quantized only with an importance matrix.
        dithers: whether the type supports adaptive (stochastic) rounding.
    """

    name: str
    block_weights: int
    block_bytes: int
    needs_imatrix: bool
    dithers: bool


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What `doctor` found.

    Attributes:
        version: of gguflora.
        python: version of Python.
        platform: the operating system, in words.
        cpu: name of the processor.
        usable_cores: cores that this process may use.
        cores: cores of the machine.
        isa: the instruction set of the kernels in use.
        isas: those that this machine could use.
        types: the quant types.
        packages: installed version by name; None if it is not installed.
    """

    version: str
    python: str
    platform: str
    cpu: str
    usable_cores: int
    cores: int | None
    isa: str
    isas: tuple[str, ...]
    types: tuple[QuantType, ...]
    packages: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def doctor() -> DoctorReport:
    """Say what this machine offers and what is installed."""
    return DoctorReport(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_name(),
        usable_cores=usable_cpus(),
        cores=os.cpu_count(),
        isa=current_isa(),
        isas=tuple(isa_names()),
        types=tuple(
            QuantType(kind.name, kind.block_weights, kind.block_bytes, kind.needs_imatrix, kind.supports_stochastic)
            for kind in TYPES.values()
        ),
        packages={package: _installed(package) for package in PACKAGES},
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
