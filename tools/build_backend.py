"""Build backend: setuptools, preceded by writing the cffi wrapper's C source from ``csrc/gguflora.h``.

The header is the only description of the C interface: cffi parses it as it stands, without its preprocessor lines.

For development ``python tools/build_backend.py --inplace`` compiles ``gguflora/_gguflora.abi3.so`` into the checkout
(with the sources and flags of pyproject.toml), after which ``PYTHONPATH=.`` is an installation.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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
HEADERS = ("gguflora.h", "llama_hook.h")
"""The C interface."""


COMPILER = """
static const char *gfl_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "an unknown compiler";
#endif
}
"""
"""A function of the wrapper alone: what compiled it."""


def check_compiler() -> None:
    """Stop with one sentence if this Python or its compiler cannot build the extension."""
    if sys.version_info < (3, 11):  # noqa: UP036  (a build from the sources that checks nothing, as conda does)
        sys.exit(f"gguflora needs Python 3.11 or later: this is {sys.version.split()[0]}")
    if sys.maxsize <= 2**32:
        sys.exit("gguflora needs a 64-bit Python: this one has 32 bits")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit(
            "gguflora cannot be built for a free-threaded Python: its extension uses the limited API, which this one "
            "does not have; take the ordinary build of the same version"
        )
    if sys.platform == "win32":  # setuptools finds Microsoft's compiler by itself, but the kernels are GNU C
        return
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if not shutil.which(compiler):
        sys.exit(
            f"gguflora's kernels are compiled from C, and there is no compiler {compiler!r}: install gcc or clang "
            "(Debian: apt install gcc; macOS: xcode-select --install), or set CC to the one you have"
        )


def write_wrapper() -> Path:
    """Write ``build/_gguflora.c`` and return its path."""
    ffi = FFI()
    for name in HEADERS:
        header = (ROOT / "csrc" / name).read_text(encoding="utf-8")
        ffi.cdef("\n".join("" if line.startswith("#") else line for line in header.splitlines()))
    ffi.cdef("const char *gfl_compiler(void);")
    includes = "\n".join(f'#include "{name}"' for name in HEADERS)
    ffi.set_source("gguflora._gguflora", f"{includes}\n{COMPILER}", py_limited_api=True)
    target = ROOT / "build" / "_gguflora.c"
    target.parent.mkdir(exist_ok=True)
    ffi.emit_c_code(str(target))
    return target


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: ANN001, ANN201, D103
    check_compiler()
    write_wrapper()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # noqa: ANN001, ANN201, D103
    check_compiler()
    write_wrapper()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):  # noqa: ANN001, ANN201, D103
    write_wrapper()
    return _setuptools.build_sdist(sdist_directory, config_settings)


def build_in_place() -> Path:
    """Compile the extension beside the Python sources; a running process keeps the old file (rename)."""
    import tomllib  # noqa: PLC0415  (3.11; only developers come here)

    write_wrapper()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extension = settings["tool"]["setuptools"]["ext-modules"][0]
    flags = [
        *shlex.split(os.environ.get("CFLAGS", "")),
        *extension["extra-compile-args"],
        "-fPIC",
        "-DPy_LIMITED_API=0x030a0000",
    ]
    include = [f"-I{ROOT / folder}" for folder in extension["include-dirs"]] + [f"-I{sysconfig.get_path('include')}"]
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    scratch = ROOT / "build" / f"inplace-{os.getpid()}"
    scratch.mkdir(parents=True)

    def compile_one(source: str) -> Path:
        target = scratch / (source.replace("/", "-") + ".o")
        subprocess.run([*compiler, *flags, *include, "-c", str(ROOT / source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, extension["sources"])]
    linker_flags = shlex.split(os.environ.get("LDFLAGS", ""))
    fresh = scratch / "_gguflora.abi3.so"
    subprocess.run([*compiler, "-shared", *objects, *linker_flags, "-lm", "-o", str(fresh)], check=True)
    target = ROOT / "gguflora" / "_gguflora.abi3.so"
    fresh.replace(target)
    for path in objects:
        Path(path).unlink()
    scratch.rmdir()
    return target


if __name__ == "__main__":
    print(build_in_place() if "--inplace" in sys.argv[1:] else write_wrapper())
