"""``doctor``: describe the machine and the installed packages, for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from gguflora._version import __version__
from gguflora.files.remote.cache import cache_folder
from gguflora.quants._lib import compiler, current_isa, isa_names
from gguflora.quants.types import TYPES
from gguflora.system.cpus import usable_cpus
from gguflora.system.memory import available_memory, total_memory
from gguflora.system.processor import processor_name

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
        compiler: what compiled the kernels.
        libc: C library of this Python; empty where it does not say.
        memory: bytes of memory of the machine, or of the control group that limits this process.
        available_memory: how many of them this process could take now.
        cache: directory of fetched files and converted adapters.
        settings: environment variables of gguflora that are set; a key only as ``set``.
        runtime: what llama-cpp-python, which the extra ``runtime`` installs, would need here; empty if it is installed.
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
    compiler: str
    libc: str
    memory: int
    available_memory: int
    cache: str
    settings: dict[str, str]
    runtime: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return asdict(self)


def doctor() -> DoctorReport:
    """Describe the machine and the installed packages."""
    return DoctorReport(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=processor_name(),
        usable_cores=usable_cpus(),
        cores=os.cpu_count(),
        isa=current_isa(),
        isas=tuple(isa_names()),
        types=tuple(
            QuantType(kind.name, kind.block_weights, kind.block_bytes, kind.needs_imatrix, kind.supports_stochastic)
            for kind in TYPES.values()
        ),
        packages=(packages := {package: _installed_version(package) for package in PACKAGES}),
        compiler=compiler(),
        libc=" ".join(filter(None, platform.libc_ver())),
        memory=total_memory(),
        available_memory=available_memory(),
        cache=str(cache_folder()),
        settings={
            name: "set" if "KEY" in name else value
            for name, value in sorted(os.environ.items())
            if name.startswith("GGUFLORA_")
        },
        runtime=() if packages["llama-cpp-python"] else _needs_of_runtime(),
    )


def build_line() -> str:
    """Return what was built for what, in one line."""
    tag = "free-threaded " if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    libc = " ".join(filter(None, platform.libc_ver()))
    system = " ".join(filter(None, (platform.system(), platform.machine(), libc)))
    return (
        f"{tag}Python {platform.python_version()} on {system}; kernels {current_isa()} of {', '.join(isa_names())}, "
        f"compiled by {compiler()}"
    )


def _needs_of_runtime() -> tuple[str, ...]:
    """Return what pip does to install llama-cpp-python, what it needs, and what was found of that here."""
    found = next((path for name in ("c++", "g++", "clang++", "cl") if (path := shutil.which(name))), None)
    compiled = f"found {found}" if found else "not found: apt install g++, dnf install gcc-c++, xcode-select --install"
    return (
        "PyPI has no wheel: pip install 'gguflora[runtime]' compiles it, about 17 CPU minutes once",
        f"a C++ compiler: {compiled}; CMake and Ninja come from PyPI while it is built",
        "its project offers prebuilt wheels for some Python versions: pip install llama-cpp-python --extra-index-url "
        "https://abetlen.github.io/llama-cpp-python/whl/cpu (not checked by gguflora)",
        "conda-forge has a package llama-cpp-python (not checked by gguflora)",
        "convert, merge, quantize, patch, combine and export do without it",
    )


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
