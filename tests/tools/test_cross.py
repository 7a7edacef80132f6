"""The C sources compile without a warning for the systems that people run llama.cpp on."""

import os
import subprocess
import sys

import pytest

from support import ROOT
from tools import cross


@pytest.mark.full
@pytest.mark.parametrize("target", cross.TARGETS)
def test_target_compiles_without_warning(target, tmp_path):
    if not cross.has_zig():
        pytest.skip("needs the package ziglang, whose clang compiles for all systems")
    assert cross.compile_for(target, tmp_path) == {}


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


def test_build_of_32_bits_is_refused():
    code = "import sys; sys.maxsize = 2**31 - 1; import build_backend; build_backend.build_wheel('.')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "gguflora needs a 64-bit Python: this one has 32 bits\n")
