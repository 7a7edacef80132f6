"""In continuous integration only listed skips pass; files whose packages are missing are skipped, marked and said."""

import os
import subprocess
import sys

import pytest

from support import ROOT, needs, skips

TESTS = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no such thing here")

@pytest.mark.parametrize("name", ["[a]", "b"])
def test_some(name):
    if name == "[a]":
        pytest.skip("never heard of [a]")

@pytest.mark.xfail
def test_is_expected_to_fail():
    assert False
"""
PLUGIN = """
from pathlib import Path
from support import skips
skips.LIST = Path(__file__).with_name("allowed_skips.txt")
pytest_plugins = ("support.skips",)
"""
LISTED = (
    "# a comment\n\ntest_it.py::test_skips | no such * | because\n*::test_some[[a]] | never heard of [a] | because\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "allowed_skips.txt").write_text(LISTED)
    return tmp_path


def run(folder, ci="true"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_listed_skips_pass(folder):
    done = run(folder)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 2 skipped, 1 xfailed" in done.stdout


@pytest.mark.parametrize("line", [2, 3])
def test_a_skip_that_is_not_listed_fails_the_run(folder, line):
    lines = LISTED.splitlines(keepends=True)
    (folder / "allowed_skips.txt").write_text("".join(lines[:line] + lines[line + 1 :]))
    done = run(folder)
    assert done.returncode == 1
    said = ["test_it.py::test_skips: no such thing here", "test_it.py::test_some[[a]]: never heard of [a]"]
    assert said[line - 2] in done.stdout
    assert said[3 - line] not in done.stdout
    assert run(folder, ci="").returncode == run(folder, ci="false").returncode == 0


def test_another_reason_is_not_listed(folder):
    (folder / "allowed_skips.txt").write_text(LISTED.replace("no such *", "no such thing"))
    assert run(folder).returncode == 1


def test_a_file_that_is_skipped_is_a_skip_too(folder):
    (folder / "test_more.py").write_text("import pytest\npytest.skip('no x', allow_module_level=True)\n")
    assert run(folder).returncode == 1
    (folder / "allowed_skips.txt").write_text(f"{LISTED}test_more.py | no x | because\n")
    assert run(folder).returncode == 0


@pytest.mark.parametrize("line", ["test_it.py::test_skips", "a | b", "a |  | c", "a | b | c | d"])
def test_a_line_that_is_wrong_is_an_error(folder, line):
    (folder / "allowed_skips.txt").write_text(line + "\n")
    done = run(folder)
    assert done.returncode != 0
    assert "line 1: expected `test id | reason | why`" in done.stdout + done.stderr


def test_the_list_is_sound():
    """Every line has its three parts, and names a file that there is."""
    for allowed in skips.read_list(skips.LIST):
        assert any(path.exists() for path in ROOT.glob(allowed.test.partition("::")[0])), allowed


def test_a_file_without_its_package_is_skipped(folder):
    """Imported through another module, inside `if`; not what only a function or a type checker imports."""
    (folder / "test_it.py").write_text("import no_such_module")
    (folder / "conftest.py").write_text(
        "from support import needs\nneeds.PACKAGES['no_such_module'] = None\npytest_plugins = ('support.needs',)\n"
    )
    (folder / "test_more.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_module\n"
        "def later():\n    import no_such_module\ndef test_passes():\n    pass\n"
    )
    done = run(folder)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_what_a_file_needs():
    assert needs.needs(ROOT / "tests/server/test_server.py") >= {"fastapi", "llama_cpp", "openai", "uvicorn"}
    assert needs.needs(ROOT / "tests/tools/test_bench_serve.py") >= {"httpx", "llama_cpp"}
    assert not needs.needs(ROOT / "tests/test_layers.py")
    assert needs.missing(ROOT / "tests/test_layers.py") == []
