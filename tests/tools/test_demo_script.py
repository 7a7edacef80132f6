"""``tools/demo`` shows what works without llama.cpp before it compiles that, and nothing twice."""

import os
import shutil
import subprocess

import pytest

from support import ROOT

VENV = """#!/bin/sh
echo "venv $*"
mkdir -p .venv-demo/bin
cp gguflora .venv-demo/bin/gguflora
cp python .venv-demo/bin/python
"""
PYTHON = """#!/bin/sh
case "$*" in
  "-c import llama_cpp") [ -e llama_cpp ] ;;
  *) echo "python $*"; touch llama_cpp ;;
esac
"""
SHOWN = [
    *("Setting up .venv-demo ...", "venv .venv-demo"),
    "demo without",
    "Compiling llama-cpp-python, which takes some minutes, once; then the demo shows the answers of the model, too ...",
    "python -m pip install --quiet gguflora[runtime]",
    "demo with",
]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose virtual environment only says what is done."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/demo", tmp_path / "tools/demo")
    demo = '#!/bin/sh\n[ -e llama_cpp ] && echo "$* with" || echo "$* without"\n'
    for name, text in {"tools/venv": VENV, "python": PYTHON, "gguflora": demo}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(checkout, *arguments):
    command = [checkout / "tools/demo", *arguments]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_first_run_shows_converting_and_merging_first(checkout):
    assert run(checkout) == SHOWN


def test_later_runs_show_the_demo_once(checkout):
    run(checkout)
    assert run(checkout) == [*SHOWN[:2], *SHOWN[4:]]


def test_the_output_of_options_is_not_mixed(checkout):
    assert run(checkout, "--json") == [*SHOWN[:2], *SHOWN[3:5], "demo --json with"]


def test_the_real_demo(checkout):
    assert run(checkout, "--real", "--threads", "2")[-1] == "python -m tools.real_demo --threads 2"
