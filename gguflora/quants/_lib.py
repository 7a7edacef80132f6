"""The only importer of the compiled extension, and the choice of an instruction set."""

from __future__ import annotations

import os
from functools import cache

from gguflora._gguflora import ffi, lib
from gguflora.errors import NativeError

__all__ = ["choose_isa", "compiler", "current_isa", "ffi", "isa_names", "lib"]


def isa_names() -> list[str]:
    """Names of the instruction sets this machine can run, slowest first."""
    return list(_available())


@cache
def _available() -> tuple[str, ...]:
    return tuple(_isa_name(isa) for isa in range(lib.gfl_isa_count()) if lib.gfl_isa_available(isa))


def _isa_name(isa: int) -> str:
    name: str = ffi.string(lib.gfl_isa_name(isa)).decode()
    return name


def current_isa() -> str:
    """The instruction set in use: ``GGUFLORA_ISA`` if that is set, else the fastest this machine has.

    Raises:
        NativeError: ``GGUFLORA_ISA`` names no instruction set of this machine.
    """
    return _isa_name(_isa_number(os.environ.get("GGUFLORA_ISA") or _available()[-1]))


@cache
def _isa_number(name: str) -> int:
    for isa in range(lib.gfl_isa_count()):
        if _isa_name(isa) == name and lib.gfl_isa_available(isa):
            return isa
    raise NativeError(f"instruction set {name!r} is not available here; GGUFLORA_ISA may be {', '.join(isa_names())}")


def compiler() -> str:
    """Name and version of the compiler that made the extension."""
    made = getattr(lib, "gfl_compiler", None)  # an extension that was compiled in place before has none
    name: str = ffi.string(made()).decode() if made else "an unknown compiler"
    return name.strip()


def choose_isa(isa: str | None) -> int:
    """The number of the instruction set of this name; by default that of `current_isa`."""
    return _isa_number(isa or current_isa())
