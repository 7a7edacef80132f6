"""Every command and every program in the README runs, and prints what the README says (numbers that vary aside)."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from gguflora.diagnostics import demo
from support import ROOT

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's model and adapters under the names that the README uses."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("base.gguf", *demo.ADAPTERS):
        source = demo.HERE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path / name)
    [recipe] = blocks("toml")
    (path / "nightly.toml").write_text(recipe, encoding="utf-8")
    return path


def outside_tables(text):
    """Without the demo's answers, in which another processor's rounding may choose another word (tested below)."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("  "))


def answers(text):
    """What a model says, one space before each line."""
    return [line for line in text.splitlines() if re.match(r" \S", line)]


def without_numbers(text):
    """Words only: timings vary, and the table's columns with them."""
    words = [re.sub(r"[-+]?\d[\d.,e+-]*", "0", word) for word in text.split()]
    return [word for word in words if word.strip("─")]


def test_console_sessions(folder):
    """In order, as a reader would type them."""
    sessions = blocks("console")
    assert len(sessions) >= 3
    for session in sessions:
        for command, expected in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", session, flags=re.MULTILINE):
            program, *arguments = shlex.split(command)
            assert program == "gguflora"
            result = subprocess.run(
                [sys.executable, "-P", "-m", "gguflora", *arguments],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            if arguments[0] == "run":  # which tells its speed there
                assert answers(result.stdout)[0].isupper() == answers(expected)[0].isupper()
                continue
            assert result.stderr == "", command
            printed = result.stdout.replace(f"{folder}/", "")
            assert without_numbers(outside_tables(printed)) == without_numbers(outside_tables(expected)), command


@pytest.mark.parametrize("program", blocks("python"))
def test_python_programs(program, folder):
    if not (folder / "shout.gguf").exists():
        test_console_sessions(folder)
    subprocess.run([sys.executable, "-P", "-c", program], cwd=folder, check=True, capture_output=True)


def test_serving(folder, tmp_path):
    """The shell session as it stands, on another port, with `gguflora` on the path and a wait before the request."""
    [session] = blocks("bash")
    if not (folder / "shout.gguf").exists():
        test_console_sessions(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "gguflora").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m gguflora "$@"\n', encoding="utf-8")
    (tmp_path / "gguflora").chmod(0o755)
    script = session.replace("8080", port).replace(
        "&\n", f"&\nuntil curl -sf http://127.0.0.1:{port}/health >/dev/null; do sleep 0.1; done\n"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", f"trap 'kill %1' EXIT\n{script}"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["text"].strip()
    assert answer["usage"]["completion_tokens"] > 0


def test_the_demo_shows_its_styles(tmp_path):
    report = demo.run_demo(tmp_path)
    texts = {answer.weights: answer.text.strip() for answer in report.answers}
    assert texts["base"] == texts["shout removed"] != texts["shout"]
    assert texts["shout"].isupper()
    assert not texts["shout at 0.5"].isupper()
    assert texts["shout at 0.5"] != texts["base"]
    assert texts["verse"].count("\n") >= 3
    assert texts["shout + verse"].isupper()
    assert texts["shout + verse"].count("\n") >= 3
    assert texts["merged file (shout)"] == texts["shout"]
    assert report.kl < 1e-3 * report.kl_base


def test_scripts_and_extras_exist():
    """The shell blocks: tools/test runs this test, .ci/run runs tools/demo, and both install an extra."""
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
    for command in commands:
        if command.startswith("tools/"):
            subprocess.run(["bash", "-n", ROOT / command], check=True)
        else:
            found = re.fullmatch(r"pip install '?\.(?:\[(\w+)\])?'?", command)
            assert found, command
            assert f"\n{found[1] or 'dependencies'} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
