"""``doctor``: describe the machine and the installed packages, for bug reports."""

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
    """What the kernels support for a quant type; it is the same for every instruction set.

    Attributes:
        name: ggml's name of the type.
        block_weights: number of weights in a block.
        block_bytes: number of bytes in a block.
        needs_imatrix: whether quantizing needs an importance matrix.
        dithers: whether stochastic rounding supports the type.
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
        version: version of gguflora.
        python: version of Python.
        platform: name and version of the operating system.
        cpu: name of the processor.
        usable_cores: number of cores that this process may use.
        cores: number of cores of the machine.
        isa: instruction set that the kernels use.
        isas: instruction sets that the kernels can use on this machine.
        types: the quant types.
        packages: installed version of each package; None if it is not installed.
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
        """Return all fields, ready for JSON."""
        return asdict(self)


def doctor() -> DoctorReport:
    """Describe the machine and the installed packages."""
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
        packages={package: _installed_version(package) for package in PACKAGES},
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
