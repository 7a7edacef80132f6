"""The examples and the pages of docs/ run as they stand, on the demo's model and adapters."""

import functools
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml

import gguflora
from gguflora.cli.app import app
from gguflora.diagnostics import demo
from support import ROOT, serving
from support.cli import run
from support.pages import PAGES, put_commands, put_demo_files, texts

EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Here, the demo's files under the names that the pages use, and ``gguflora`` and ``python`` on the path."""
    put_demo_files(tmp_path)
    monkeypatch.setenv("PATH", f"{put_commands(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # llama.cpp's threads wait busily, which on a busy machine takes very long
    yield tmp_path
    os.sched_setaffinity(0, cores)


def shell(script):
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_makefile(folder):
    for name in demo.ADAPTERS:
        shutil.copytree(folder / name, folder / "adapters" / name)
    make = f"make -f {shlex.quote(str(EXAMPLES / 'Makefile'))}"
    assert shell(f"{make} -j2").count("gguflora ") == 4
    merged = gguflora.merge("base.gguf", "verse", "verse.gguf").output
    assert (folder / "out/merged/verse.gguf").read_bytes() == merged.read_bytes()
    assert json.loads((folder / "out/merged/verse.json").read_text())["total"]["retention"] == pytest.approx(
        1, abs=0.03
    )
    assert "gguflora" not in shell(make)
    later = (folder / "out/merged/verse.gguf").stat().st_mtime + 5
    os.utime(folder / "adapters/verse/adapter_config.json", (later, later))
    commands = shell(f"{make} -n")
    assert "convert 'adapters/verse'" in commands
    assert "merge 'base.gguf' --lora 'adapters/verse'" in commands
    assert "shout" not in commands
    shell(f"{make} clean")
    assert not (folder / "out").exists()


def test_makefile_with_names_that_are_commands(folder):
    for name in ("x$(touch${IFS}owned)", "y`touch${IFS}owned`", "z'&touch${IFS}owned&'", "w$$(touch${IFS}owned)"):
        shutil.copytree(folder / "shout", folder / "adapters" / name)
    make = f"make -f {shlex.quote(str(EXAMPLES / 'Makefile'))}"
    shell(make)
    assert not list(folder.rglob("owned"))
    assert len(list((folder / "out" / "merged").glob("*.gguf"))) == 4
    shutil.copytree(folder / "shout", folder / "adapters" / "v;touch${IFS}owned")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        shell(make)
    assert "rename v;touch" in failed.value.stderr
    assert not list(folder.rglob("owned"))


def test_github_actions(folder, monkeypatch):
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    assert workflow[True] == {"push": {"paths": ["adapter/**"]}}  # YAML takes "on" for true
    [job] = workflow["jobs"].values()
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    [install] = [step["run"] for step in job["steps"] if step.get("name") == "Install"]
    extra = re.fullmatch(r"pip install 'gguflora\[(\w+)\]'", install)[1]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    shutil.copytree(folder / "shout", folder / "adapter")
    (folder / "base.gguf").rename(folder / "elsewhere.gguf")
    monkeypatch.setenv("BASE_URL", (folder / "elsewhere.gguf").as_uri())
    monkeypatch.setenv("BASE_SHA256", "0" * 64)
    [fetch] = [step["run"] for step in job["steps"] if step.get("name") == "Fetch the base model"]
    with pytest.raises(subprocess.CalledProcessError):
        shell(fetch)
    monkeypatch.setenv("BASE_SHA256", hashlib.sha256((folder / "elsewhere.gguf").read_bytes()).hexdigest())
    for step in job["steps"]:
        if "run" in step and step["run"] != install:
            shell(step["run"])
    [kept] = [step["with"]["path"].split() for step in job["steps"] if "upload" in step.get("uses", "")]
    assert all(list(folder.glob(pattern)) for pattern in kept)
    report = json.loads((folder / "merge.json").read_text())
    (folder / "merge.json").write_text(json.dumps(report | {"total": {"retention": 0.5}}))
    [check] = [step["run"] for step in job["steps"] if step.get("name") == "Check"]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        shell(check.partition("\n")[2])
    assert "50.0% of the adapter's change" in failed.value.stderr


def test_new_checkpoints(folder):
    script = f"sh {shlex.quote(str(EXAMPLES / 'new-checkpoints.sh'))} --report report"
    assert "no jobs" in shell(script)
    for place in ("legal/checkpoint-10", "legal/checkpoint-20"):
        shutil.copytree(folder / "verse", folder / "runs" / place)
        assert "1 done" in shell(script)
    (folder / "runs/legal/checkpoint-30").mkdir()  # which training has only begun to write
    with pytest.raises(subprocess.CalledProcessError) as failed:
        shell(script)
    assert "2 kept, 1 failed" in failed.value.stdout
    shutil.copytree(folder / "verse", folder / "runs/legal/checkpoint-30", dirs_exist_ok=True)
    assert "2 kept, 1 done" in shell(script)
    merged = gguflora.merge("base.gguf", "runs/legal/checkpoint-30", "legal-checkpoint-30.gguf").output
    assert (folder / "out/legal-checkpoint-30.gguf").read_bytes() == merged.read_bytes()


def test_train_and_serve(folder, monkeypatch, capsys):
    """In this process, which has torch loaded; the server is one of its own."""
    (folder / "examples.txt").write_text(
        "Q: What does the fox eat?\nA: Nothing but moonlight.\n\nQ: Where does the owl live?\nA: In a house of glass.\n"
    )
    question = "Q: What does the fox eat?\nA:"
    arguments = ["base.gguf", "examples.txt", "--ask", question, "--steps", "20"]
    monkeypatch.setattr(sys, "argv", ["train_and_serve.py", *arguments])
    monkeypatch.setenv("PYTHONPATH", str(Path(gguflora.__file__).parents[1]))  # also where it is not installed
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "train_and_serve.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "tuned: 'Nothing but moonlight.'" in said
    assert f"base: {serving.expected_text().strip()!r}" in said
    assert gguflora.inspect("adapter").method == "LORA"


def test_scripting_sessions(folder):
    """Each command prints one JSON object that holds what the page's jq looks for."""
    sessions = "".join(texts("docs/scripting.md", "console"))
    found = {}
    for command, path in re.findall(r"^\$ gguflora (.+) \| jq (?:-r )?([\w.]+)$", sessions, flags=re.MULTILINE):
        printed = json.loads(run(*shlex.split(command)).stdout)
        found[command.split()[0], path] = functools.reduce(lambda item, key: item[key], path[1:].split("."), printed)
    assert len(found) == sessions.count("$ ") == 5
    assert found["convert", ".size"] > 1e5
    assert found["merge", ".total.retention"] == pytest.approx(1, abs=0.03)
    assert found["inspect", ".error.type"] == "AdapterError"
    [example] = texts("docs/scripting.md", "json")
    shown, told = (json.loads(text)["error"] for text in (example, run("inspect", "missing", "--json").stdout))
    assert told["message"].startswith(shown["message"].removesuffix("..."))
    assert {**shown, "message": ""} == {**told, "message": ""}


@pytest.mark.parametrize("page", ["scripting.md", "serving-elsewhere.md"])
def test_python_in_pages(page, folder):
    """What is asked there of the adapter and of the merged file is what the server's tests ask."""
    files_of_the_page()
    [program] = texts(f"docs/{page}", "python")
    printed = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    if page == "serving-elsewhere.md":
        assert printed.count(serving.expected_text("shout").strip()) == 2
    else:
        assert "AdapterError missing: no such file" in printed


def files_of_the_page():
    [session] = texts("docs/serving-elsewhere.md", "console")
    for command in session.splitlines():
        assert run(*shlex.split(command)[2:]).returncode == 0


def test_llama_server(folder, tmp_path_factory):
    """The page's commands, against llama.cpp's own server where `python -m tools.bench` has built it."""
    binary = next(iter(sorted((Path.home() / ".cache/gguflora").glob("llama.cpp-tools-*/llama-server"))), None)
    if binary is None:
        pytest.skip("no llama-server; `python -m tools.bench serve` builds it")
    (folder / "bin/llama-server").symlink_to(binary)
    files_of_the_page()
    port = str(free_port())
    hot, merged = (text.replace("8080", port).strip() for text in texts("docs/serving-elsewhere.md", "bash"))
    [requests] = texts("docs/serving-elsewhere.md", "sh")
    ready = f"until curl -sf http://127.0.0.1:{port}/health >/dev/null; do sleep 0.1; done"
    quietly = "trap 'kill %1; wait' EXIT\n{} >/dev/null 2>&1 &\n{}\n{}"
    printed = shell(quietly.format(hot, ready, requests.replace("8080", port).replace("}'\n", "}'; echo\n")))
    listed, changed, answer = jsons(printed)
    assert [(item["path"], item["scale"]) for item in listed] == [("shout.gguf", 1.0), ("verse.gguf", 0.0)]
    assert changed == {"success": True}
    assert answer["content"].strip() == serving.expected_text("shout").strip()
    body = json.dumps({"prompt": serving.PROMPT, "n_predict": 40, "temperature": 0})
    plain = f"curl -s http://127.0.0.1:{port}/completion -d {shlex.quote(body)}"
    [answer] = jsons(shell(quietly.format(merged, ready, plain)))
    assert answer["content"].strip() == serving.expected_text("shout").strip()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def jsons(text):
    """The values that follow each other in a text."""
    decoder, values = json.JSONDecoder(), []
    while text.strip():
        value, end = decoder.raw_decode(text.strip())
        values.append(value)
        text = text.strip()[end:]
    return values


def test_modelfiles(folder):
    """Only instructions that Ollama knows, of files that the page has made."""
    files_of_the_page()
    known = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
    for text in texts("docs/serving-elsewhere.md", "dockerfile"):
        lines = [line.split() for line in text.splitlines()]
        assert {words[0] for words in lines} <= known
        assert lines[0][0] == "FROM"
        assert all(Path(words[1]).is_file() for words in lines if words[0] in {"FROM", "ADAPTER"})


def test_links_lead_somewhere():
    """To files that exist, and to headings that they have."""
    for page in PAGES:
        for link, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                assert heading in headings_of(target), f"{page.name}: {link}#{heading}"


def headings_of(page):
    """The fragments of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_own_workflow():
    """It runs what runs everywhere, and keeps the site."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    assert [step["run"] for step in job["steps"] if step.get("name") == "Test"] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    [kept] = [step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", "")]
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_dir"] == kept
    assert "\ntools/docs\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms(form):
    """What GitHub asks of a form; the commands and pages that it names exist."""
    content = yaml.safe_load(form.read_text())
    assert content.keys() == {"name", "description", "body"}
    assert all(item["type"] == "textarea" and item["attributes"]["label"] for item in content["body"])
    ids = [item["id"] for item in content["body"]]
    assert len(set(ids)) == len(ids)
    for name in re.findall(r"gguflora ([\w-]+)", form.read_text()):
        assert name in {"should", "knows"} or name in typer.main.get_command(app).commands
    assert all((ROOT / path).exists() for path in re.findall(r"docs/\w+\.md", form.read_text()))
