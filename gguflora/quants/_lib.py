"""The only importer of the compiled extension, and the choice of an instruction set."""

from __future__ import annotations

import os
from functools import cache

from gguflora._gguflora import ffi as ffi
from gguflora._gguflora import lib as lib
from gguflora.errors import NativeError


def isa_names() -> list[str]:
    """Names of the instruction sets this machine can run, slowest first."""
    return [_isa_name(isa) for isa in range(lib.gfl_isa_count()) if lib.gfl_isa_available(isa)]


def _isa_name(isa: int) -> str:
    name: str = ffi.string(lib.gfl_isa_name(isa)).decode()
    return name


def current_isa() -> str:
    """The instruction set in use: ``GGUFLORA_ISA`` if that is set, else the fastest this machine has.

    Raises:
        NativeError: ``GGUFLORA_ISA`` names no instruction set of this machine.
    """
    return _isa_name(_isa_number(os.environ.get("GGUFLORA_ISA") or isa_names()[-1]))


@cache
def _isa_number(name: str) -> int:
    for isa in range(lib.gfl_isa_count()):
        if _isa_name(isa) == name and lib.gfl_isa_available(isa):
            return isa
    raise NativeError(f"instruction set {name!r} is not available here; GGUFLORA_ISA may be {', '.join(isa_names())}")


def _choose(isa: str | None) -> int:
    return _isa_number(isa or current_isa())
