"""Every C header opens alone: in an editor, before or after any other one, and for every instruction set."""

import platform
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from support import ROOT

CSRC = ROOT / "csrc"
EXTENSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
HEADERS = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.h"))
KERNELS = [name for name in HEADERS if name.startswith("kernels/")]
ISAS = {path.stem: path for path in sorted((CSRC / "isa").glob("*.c"))}
COMPILERS = {"x86_64": "gcc", "aarch64": "gcc" if platform.machine() == "aarch64" else "aarch64-linux-gnu-gcc"}
PROCESSORS = {"avx2": "x86_64", "avx512": "x86_64", "neon": "aarch64"}


def compiler_for(name: str) -> str:
    """The compiler for a simd header or an instruction set; plain C is compiled for this machine."""
    compiler = COMPILERS[PROCESSORS[name]] if name in PROCESSORS else "gcc"
    if shutil.which(compiler) is None or (
        compiler == "gcc" and PROCESSORS.get(name, "") not in {"", platform.machine()}
    ):
        pytest.skip(f"needs a compiler for {PROCESSORS[name]} (Debian: gcc-aarch64-linux-gnu)")
    return compiler


def check_syntax(compiler: str, arguments: list[str], source: str | None = None) -> None:
    flags = [*EXTENSION["extra-compile-args"], "-fsyntax-only", "-Wno-unused-function", "-xc"]  # functions come unused
    done = subprocess.run([compiler, *flags, *arguments], input=source, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("header", HEADERS)
def test_editor_opens_header(header, tmp_path):
    """As clangd does: the header itself is the file to compile, and nothing tells where others lie."""
    check_syntax(compiler_for(Path(header).stem), [str(CSRC / header)])


@pytest.mark.parametrize("header", HEADERS)
def test_header_may_be_included_twice(header):
    check_syntax(compiler_for(Path(header).stem), [f"-I{CSRC}", "-"], f'#include "{header}"\n' * 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("header", KERNELS)
def test_kernel_needs_nothing_but_instruction_set(header, isa):
    source = ISAS[isa].read_text()
    assert source.count('"../kernels/all.h"') == 1
    check_syntax(compiler_for(isa), [f"-I{CSRC / 'isa'}", "-"], source.replace("kernels/all.h", header))


def test_all_headers_make_the_extension_compile_again():
    """A header that setuptools does not know of would leave an old object in place."""
    assert sorted(EXTENSION["depends"]) == sorted([f"csrc/{name}" for name in HEADERS] + ["csrc/types.def"])
