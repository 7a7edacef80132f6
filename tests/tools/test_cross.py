"""The C sources compile without a warning for the systems that people run llama.cpp on."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from support import ROOT
from tools import cross

ZIG = "needs the package ziglang, whose clang compiles for all systems"
FOLDERS = ("csrc", "docs", "examples", "gguflora", "tests", "tools")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "NOTICE")


@pytest.mark.full
@pytest.mark.parametrize("target", cross.TARGETS)
def test_target_compiles_without_warning(target, tmp_path):
    if not cross.has_zig():
        pytest.skip(ZIG)
    assert cross.compile_for(target, tmp_path) == {}


@pytest.mark.full
@pytest.mark.parametrize("libc", ["gnu", "musl"])
def test_wheel_for_another_libc(libc, tmp_path):
    """The one for glibc makes the same bytes as everywhere; the one for musl asks for nothing of glibc."""
    if not cross.has_zig():
        pytest.skip(ZIG)
    wheel = cross.build_wheel(f"x86_64-linux-{libc}", tmp_path)
    tag = {"gnu": "manylinux_2_17", "musl": "musllinux_1_2"}[libc]
    assert wheel.name.endswith(f"-cp311-abi3-{tag}_x86_64.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    library = (tmp_path / "installed/gguflora/_gguflora.abi3.so").read_bytes()
    assert (b"GLIBC_" in library, b"libc.so.6\0" in library) == ((True, True) if libc == "gnu" else (False, False))
    if libc == "gnu":
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, "-P", ROOT / "tools/smoke.py", "--check"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_needs_a_target_and_a_folder(capsys):
    assert cross.main(["--wheel", "aarch64-macos", "dist"]) == 2
    assert "--wheel {x86_64-linux-gnu,x86_64-linux-musl," in capsys.readouterr().err


@pytest.mark.full
def test_the_suite_with_clang(tmp_path):
    """The tests of quantizing and merging, with an extension that clang compiled, in a copy of the checkout."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang (Debian: clang)")
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"CC": "clang", "PYTHONPATH": str(tmp_path)}

    def run(*arguments):
        command = [sys.executable, "-P", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        return done.stdout

    run(tmp_path / "tools/build_backend.py", "--inplace")
    assert "compiled by clang" in run("-m", "gguflora", "--version")
    said = run("-m", "pytest", "-p", "no:cacheprovider", "-m", "not full and not slow", "tests/quants", "tests/merging")
    assert int(said.split(" passed")[0].split()[-1]) > 500


def test_unknown_target_is_named(capsys):
    assert cross.main(["vax-vms"]) == 2
    assert "unknown target vax-vms; expected x86_64-linux-gnu" in capsys.readouterr().err


def test_missing_compiler_is_one_sentence():
    code = "import build_backend; build_backend.build_wheel('.')"
    environment = os.environ | {"CC": "no-such-cc -O2", "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no compiler 'no-such-cc': install gcc or clang" in done.stderr


def test_build_without_the_limited_api_is_refused():
    code = "import sysconfig, build_backend; sysconfig.get_config_var = lambda name: name == 'Py_GIL_DISABLED'\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-c", f"{code}build_backend.build_wheel('.')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be built for a free-threaded Python" in done.stderr


def test_build_of_32_bits_is_refused():
    code = "import sys; sys.maxsize = 2**31 - 1; import build_backend; build_backend.build_wheel('.')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "gguflora needs a 64-bit Python: this one has 32 bits\n")
