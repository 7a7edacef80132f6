"""Build backend: setuptools, preceded by writing the cffi wrapper's C source from ``csrc/gguflora.h``.

The header is the only description of the C interface: cffi parses it as it stands, without its preprocessor lines.
"""

from pathlib import Path

from cffi import FFI
from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  (hooks of PEP 517 that need nothing of ours)
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parent.parent


def write_wrapper() -> Path:
    """Write ``build/_gguflora.c`` and return its path."""
    header = (ROOT / "csrc" / "gguflora.h").read_text(encoding="utf-8")
    ffi = FFI()
    ffi.cdef("\n".join("" if line.startswith("#") else line for line in header.splitlines()))
    ffi.set_source("gguflora._gguflora", '#include "gguflora.h"', py_limited_api=True)
    target = ROOT / "build" / "_gguflora.c"
    target.parent.mkdir(exist_ok=True)
    ffi.emit_c_code(str(target))
    return target


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: ANN001, ANN201, D103
    write_wrapper()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: ANN001, ANN201, D103
    write_wrapper()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):  # noqa: ANN001, ANN201, D103
    write_wrapper()
    return _setuptools.build_sdist(sdist_directory, config_settings)


if __name__ == "__main__":
    print(write_wrapper())
