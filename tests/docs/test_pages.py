"""Every command and every program of the pages runs, and prints what the page says (numbers that vary aside)."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import peft
import pytest
import typer

from gguflora.adapters.peft.config import MLX
from gguflora.adapters.peft.registry import READERS, SHAPED_READERS
from gguflora.adapters.peft.unsupported import REFUSED
from gguflora.adapters.soft_prompt import KEYS_AND_VALUES, VIRTUAL_TOKENS
from gguflora.cli.app import app
from gguflora.diagnostics import demo
from gguflora.engine.chat import HELP
from support import ROOT
from support.pages import NAMES, blocks, commands, put_commands, put_demo_files, put_titled_files, texts
from tools import bench

RUN = ["README.md"] + [
    f"docs/{name}.md"
    for name in ("lora-algebra", "merging", "methods", "pipelines", "rounding", "runtime", "server", "training")
]  # fmt: skip
ELSEWHERE = {
    "docs/distributed.md": "test_distributed_page.py",
    "docs/extending.md": "test_extending.py",
    "docs/scripting.md": "test_examples.py",
    "docs/serving-elsewhere.md": "test_examples.py",
}
"""Pages whose blocks another file tests."""
IN_TEXT = {
    "docs/architecture.md": "test_architecture_page.py",
    "CONTRIBUTING.md": "test_scripts_and_extras_exist",
    "docs/install.md": "tests/tools/test_release.py",
    "docs/scaling.md": "tests/server/test_scaling.py",
}
"""Pages that have no sessions and no programs."""
NOT_HERE = ("://", "tonight.toml")
"""What a command names that a test has not: it is only parsed."""
COMMANDS = typer.main.get_command(app)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder for each page, with the demo's files and the page's own."""
    folders = {}

    def folder(page):
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp("page")
            put_demo_files(folders[page])
            put_titled_files(page, folders[page])
        return folders[page]

    return folder


def test_no_block_is_left_out():
    assert set(NAMES) <= {*RUN, *ELSEWHERE, *IN_TEXT, "docs/benchmarks.md"} | {
        name for name in NAMES if name.startswith("docs/api")
    }
    for page in RUN:
        assert {block.language for block in blocks(page)} <= {"console", "python", "bash", "sh", "json", "toml", "text"}
    for page in {*IN_TEXT, "docs/benchmarks.md"}:
        assert {block.language for block in blocks(page)} <= {"text", "sh"}, page
    for file in ELSEWHERE.values():
        assert (ROOT / "tests/docs" / file).exists()


def outside_tables(text):
    """Without the demo's answers, in which another processor's rounding may choose another word (tested below)."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("  "))


def answers(text):
    """What a model says, one space before each line."""
    return [line for line in text.splitlines() if re.match(r" \S", line)]


def without_numbers(text):
    """Words only: timings vary, and the table's columns with them; of a SHA-256 as of a number, any will do."""
    words = [re.sub(r"\b[0-9a-f]{64}\b|[-+]?\d[\d.,e+-]*", "0", word) for word in text.split()]
    return [word for word in words if word.strip("─")]


def in_reach(session):
    return not any(name in session for name in NOT_HERE)


@pytest.mark.parametrize("page", [page for page in RUN if texts(page, "console")])
def test_console_sessions(page, folder_of):
    """In order, as a reader would type them."""
    folder = folder_of(page)
    for session in filter(in_reach, texts(page, "console")):
        for command, expected in commands(session):
            program, *arguments = shlex.split(command)
            assert program == "gguflora"
            result = subprocess.run(
                [sys.executable, "-P", "-m", "gguflora", *arguments],
                cwd=folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert result.returncode == 0, f"{command}\n{result.stderr}"
            if arguments[0] == "run":  # which tells its speed there
                assert answers(result.stdout)[0].isupper() == answers(expected)[0].isupper()
                continue
            assert result.stderr == "", command
            if expected:
                printed = result.stdout.replace(f"{folder}/", "")
                assert without_numbers(outside_tables(printed)) == without_numbers(outside_tables(expected)), command
            else:
                assert "error" not in json.loads(result.stdout), command


@pytest.mark.parametrize("page", [page for page in NAMES if texts(page, "console") and page != "docs/extending.md"])
def test_commands_are_well_formed(page):
    """Also where they cannot run: commands and options exist, and values fit them."""
    said = [command for session in texts(page, "console") for command, _ in commands(session)]
    ours = [shlex.split(command.split(" | ")[0]) for command in said if command.startswith("gguflora ")]
    assert ours
    for _, name, *arguments in ours:
        COMMANDS.commands[name].make_context(name, list(arguments)).close()


@pytest.mark.parametrize("page", [page for page in NAMES if "`python -m tools." in (ROOT / page).read_text()])
def test_tools_are_well_formed(page):
    """Modules of tools/ exist, and benchmarks take the options that they are named with."""
    for words in re.findall(r"`python -m tools\.([^`]+)`", (ROOT / page).read_text()):
        module, *arguments = shlex.split(words)
        assert (ROOT / "tools" / f"{module.replace('.', '/')}.py").exists(), words
        if module == "bench" and arguments:
            command = typer.main.get_command(bench.app).commands[arguments[0]]
            command.make_context(arguments[0], arguments[1:]).close()


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in RUN for number in range(len(texts(page, "python")))]
)
def test_python_programs(page, number, folder_of):
    """With the files that the page's sessions have made; text that follows a program is what it prints."""
    folder = folder_of(page)
    if page == "README.md" and not (folder / "shout.gguf").exists():
        test_console_sessions(page, folder_of)
    program = texts(page, "python")[number]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = [later for block, later in zip(blocks(page), blocks(page)[1:], strict=False) if block.text == program]
    if after and after[0].language == "text":
        assert done.stdout == after[0].text


@pytest.mark.parametrize("page", [page for page in RUN if texts(page, "bash")])
def test_serving(page, folder_of, tmp_path):
    """The shell session on another port, with a wait before the request; then the page's other requests."""
    folder = folder_of(page)
    [session], [shown] = texts(page, "bash"), texts(page, "json")
    made = {"README.md": "shout.gguf", "docs/training.md": "merry.gguf"}
    if page in made and not (folder / made[page]).exists():  # the page's sessions were left out
        test_console_sessions(page, folder_of)
    requests = "".join(text for text in texts(page, "sh") if "curl" in text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ready = f"&\nuntil curl -sf http://127.0.0.1:{port}/health >/dev/null; do sleep 0.1; done\n"
    script = "\n".join([session.replace("&\n", ready), "echo", requests]).replace("8080", port)
    script = script.replace("curl -s ", "curl -sS --fail-with-body ")
    environment = {**os.environ, "PATH": f"{put_commands(tmp_path)}:{os.environ['PATH']}"}
    command = ["bash", "-e", "-c", f"trap 'kill %1' EXIT\n{script}"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answer, said = json.loads(result.stdout.splitlines()[0]), json.loads(shown)
    assert said.keys() <= answer.keys()
    assert {key: answer[key] for key in ("object", "model")} == {key: said[key] for key in ("object", "model")}
    assert [choice.keys() for choice in answer["choices"]] == [choice.keys() for choice in said["choices"]]
    assert answer["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] > 0


def test_the_demo_shows_its_styles(tmp_path):
    report = demo.run_demo(tmp_path)
    answered = {answer.weights: answer.text.strip() for answer in report.answers}
    assert answered["base"] == answered["shout removed"] != answered["shout"]
    assert answered["shout"].isupper()
    assert not answered["shout at 0.5"].isupper()
    assert answered["shout at 0.5"] != answered["base"]
    assert answered["verse"].count("\n") >= 3
    assert answered["shout + verse"].isupper()
    assert answered["shout + verse"].count("\n") >= 3
    assert answered["merged file (shout)"] == answered["shout"]
    assert report.kl < 1e-3 * report.kl_base


def test_the_chat_has_the_commands_of_the_page():
    assert f"{HELP}\n" in texts("docs/runtime.md", "text")


def test_the_methods_are_as_many_as_the_page_says():
    read = {*READERS, *SHAPED_READERS, *VIRTUAL_TOKENS, *KEYS_AND_VALUES} - {MLX}
    known = {kind.value for kind in peft.PeftType}
    for page in ("README.md", "docs/methods.md"):
        text = (ROOT / page).read_text()
        counts = re.search(r"(\d+) methods[\s\S]*?(\d+)(?:\.| \()", text)
        assert [int(count) for count in counts.groups()] == [len(known), len(read)], page
    assert read == known - (REFUSED.keys() - VIRTUAL_TOKENS - KEYS_AND_VALUES)


def test_the_readme_is_short_and_in_order():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 170
    assert [line for line in lines if line.startswith("## ")] == [
        "## Why", "## Install", "## Five commands", "## From Python", "## Which way for me", "## More",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_scripts_and_extras_exist(page):
    """The shell blocks: tools/test runs this test, .ci/run runs tools/demo, and both install an extra."""
    lines = [line.split("#")[0].strip() for text in texts(page, "sh") for line in text.splitlines() if line.strip()]
    assert lines
    for command in lines:
        first, *words = shlex.split(command)
        if first == "pip":
            found = re.fullmatch(r"pip install '?\.(?:\[(\w+)\])?'?", command)
            assert f"\n{found[1] or 'dependencies'} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        elif first.startswith("tools/"):
            subprocess.run(["bash", "-n", ROOT / first], check=True)
            assert all(word in (ROOT / first).read_text() for word in words if word.startswith("-")), command
        else:
            assert re.match(r"(?:PYTHONPATH=\. )?\.venv-test/bin/(?:pytest|python -m pytest) ", command), command
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), command


def test_files_that_pages_name_exist():
    """Paths in backticks, from the root of the repository."""
    for page in NAMES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for path in re.findall(r"`((?:gguflora|csrc|tests|tools|docs|examples)/[\w./*-]+)`", text):
            assert list(ROOT.glob(path.rstrip("/"))), f"{page}: {path}"
