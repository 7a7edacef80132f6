"""Every command in a script: JSON, exit codes, no terminal; and the Python function behind it."""

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
import typer

import gguflora
from gguflora.cli.app import app
from gguflora.diagnostics import demo
from gguflora.errors import GgufloraError
from support.cli import run

CLI = typer.main.get_command(app).commands
FUNCTIONS = {name: name.replace("-", "_") for name in CLI} | {"demo": "run_demo", "pipeline": "run_pipeline"}
# paths and scales are one argument in Python; an option that is given several times has the name of one
LORAS = {
    "--tensor-type": "tensor_types",
    "--lora": "adapters",
    "--lora-scaled": "adapters",
    "--task": "tasks",
    "--alias": "aliases",
    "--from": "from_adapter",
}
ONLY_COMMAND = {
    "merge": {"report": "the result's to_dict()", "plot": "gguflora.merging.plots.plot_report(result)"},
    "pipeline": {"schema": "gguflora.pipeline.recipe_schema()"},
    "serve": {"model": "the same as the argument, as llama-server spells it"},
    "train": {"report": "the result's to_dict()"},
}
ONLY_PYTHON = {"progress", "masks", "write", "ready", "show_plan", "watch"}  # callables

RECIPE = """
output = "out"
[sources]
adapters = ["shout"]
[[steps]]
name = "small"
action = "resize"
for = { adapter = "sources.adapters" }
adapter = "{adapter}"
rank = 2
out = "small-{adapter}"
"""
ARGUMENTS = {
    "convert": "shout --base base.gguf -o made.gguf --force",
    "merge": "base.gguf --lora shout -o made.gguf --force",
    "quantize": "base.gguf -o made.gguf Q8_0 --force",
    "imatrix": "base.gguf --text text.txt --ctx 16 --threads 1 -o made.gguf --force",
    "apply-patch": "base.gguf shout.patch -o made.gguf --force",
    "unmerge": "in-place.gguf",
    "compare": "base.gguf merged.gguf --lora shout.gguf --text text.txt --n-ctx 32 --threads 1",
    "inspect": "shout --base base.gguf --ranks",
    "combine": "shout verse:0.5 -o made --method cat --force",
    "resize": "shout --rank 2 -o made --force",
    "extract": "merged.gguf --base base.gguf --rank 2 --iterations 0 -o made.gguf --force",
    "export": "shout.gguf --base base.gguf -o made --force",
    "diff": "shout verse",
    "train": "base.gguf --data rows.jsonl -o tuned --steps 1 --rank 2 --threads 1 --force",
    "pipeline": "recipe.toml",
    "run": "base.gguf -p Hello --max-tokens 4",
    "serve": "base.gguf --lora shout=shout.gguf --port 0",
    "doctor": "",
    "demo": "--prompt Hello",
}
ENDING = [name for name in ARGUMENTS if name != "serve"]
IN_WORDS = [name for name in ENDING if name not in {"unmerge", "compare", "demo"}]  # test_readme.py does the latter two

FORKS = """
import json, os, sys
import gguflora.cli, gguflora.engine, llama_cpp
for name, words, *files in json.load(open("jobs.json")):
    if not os.fork():
        for number, file in enumerate(files, 1):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, number)
            os.close(handle)
        sys.argv = ["gguflora", *words]
        gguflora.cli.main()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    os.replace(files[0], f"{files[0]}.{code}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripting")
    for name in ("base.gguf", *demo.ADAPTERS):
        source = demo.HERE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path / name)
    (path / "recipe.toml").write_text(RECIPE)
    (path / "rows.jsonl").write_text('{"text": "The fox eats mice."}\n' * 4)
    (path / "text.txt").write_text("The fox eats mice. " * 12)
    base, adapter = path / "base.gguf", path / "shout"
    gguflora.convert(adapter, base, path / "shout.gguf")
    gguflora.merge(base, adapter, path / "merged.gguf")
    gguflora.merge(base, adapter, patch=path / "shout.patch")
    shutil.copy(base, path / "in-place.gguf")
    gguflora.merge(path / "in-place.gguf", adapter, in_place=True)
    return path


@pytest.fixture(scope="module")
def results(folder):
    """Exit code, stdout and stderr of each command, with and without ``--json``, of processes without a terminal."""
    forms = [(name, "--json") for name in ENDING] + [(name, "") for name in IN_WORDS]
    jobs = [
        [name, [name, *ARGUMENTS[name].split(), *form.split()], f"{name}{form}.out", f"{name}{form}.err"]
        for name, form in forms
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "TERM"}
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-P", "-c", FORKS]
    subprocess.run(command, cwd=folder, env=environment, check=True, start_new_session=True, timeout=120)
    found = {}
    for _, words, out, err in jobs:
        [printed] = folder.glob(f"{out}.*")
        result = int(printed.suffix[1:]), printed.read_text(), (folder / err).read_text()
        found[words[0], words[-1] == "--json"] = result
    return found


def test_every_command_is_here():
    assert set(ARGUMENTS) == set(CLI)
    for command in CLI.values():
        assert "--json" in [option for parameter in command.params for option in parameter.opts], command.name


@pytest.mark.llama
@pytest.mark.parametrize("name", ENDING)
def test_json_without_a_terminal(name, results):
    code, out, err = results[name, True]
    assert (code, err) == (0, "")
    result = json.loads(out, parse_constant=pytest.fail)
    fields = {field.name for field in dataclasses.fields(report_class(name))} - {"facts"}  # which stand among the rest
    assert fields <= result.keys()
    assert "error" not in result


@pytest.mark.llama
@pytest.mark.parametrize("name", IN_WORDS)
def test_text_without_a_terminal(name, results):
    code, out, err = results[name, False]
    assert code == 0, err
    assert out.strip()
    assert "\x1b" not in out + err
    assert not err or name == "run"  # which tells its speed there


@pytest.mark.llama
def test_serve_says_when_it_is_ready(folder):
    command = [sys.executable, "-P", "-m", "gguflora", "serve", *ARGUMENTS["serve"].split(), "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TERM"}
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        ready = json.loads(process.stdout.readline())
        assert (ready["model"], ready["adapters"], ready["warnings"]) == ("base", ["shout"], [])
        with urllib.request.urlopen(f"{ready['url']}/health", timeout=20) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == ""


def stopped_by(error, name, monkeypatch, *options):
    """The command while its function raises."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(gguflora, FUNCTIONS[name], fail)
    return run(name, *ARGUMENTS[name].split(), *options)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_errors_and_interrupts(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    failed = stopped_by(GgufloraError("no luck"), name, monkeypatch, "--json")
    assert (failed.returncode, failed.stderr) == (1, "error: no luck\n")
    assert json.loads(failed.stdout) == {"error": {"type": "GgufloraError", "message": "no luck", "exit_code": 1}}
    plain = stopped_by(GgufloraError("no luck"), name, monkeypatch)
    assert (plain.returncode, plain.stdout, plain.stderr) == (1, "", "error: no luck\n")
    interrupted = stopped_by(KeyboardInterrupt(), name, monkeypatch, "--json")
    assert interrupted.returncode == 130
    assert interrupted.stderr.startswith("interrupted; ")
    assert json.loads(interrupted.stdout)["error"]["type"] == "KeyboardInterrupt"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_usage(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    wrong = run(name, *ARGUMENTS[name].split(), "--no-such-option", "--json")
    assert wrong.returncode == 2
    assert "--no-such-option" in wrong.stderr
    error = json.loads(wrong.stdout)["error"]
    assert (error["exit_code"], "--no-such-option" in error["message"]) == (2, True)


def test_other_errors(folder, monkeypatch):
    monkeypatch.chdir(folder)
    error = json.loads(stopped_by(OSError(28, "No space left", "x.gguf"), "merge", monkeypatch, "--json").stdout)
    assert error == {"error": {"type": "OSError", "message": "x.gguf: No space left", "exit_code": 1}}
    assert stopped_by(MemoryError(), "merge", monkeypatch).stderr == "error: not enough memory\n"
    missing = run("inspect", "missing", "--json")
    assert json.loads(missing.stdout)["error"]["type"] == "AdapterError"
    assert run("run", "base.gguf", "--json").returncode == 2  # a chat is no one result


@pytest.mark.parametrize("name", CLI)
def test_options_are_keywords(name):
    """The same names and the same defaults, but for what the tables at the top say."""
    parameters = inspect.signature(function_of(name)).parameters
    options = {option.opts[-1]: option for option in CLI[name].params if option.name not in {"as_json", "help"}}
    given = {LORAS[text] for text in options.keys() & LORAS.keys()}
    shared = {option.name: option for text, option in options.items() if text not in LORAS}
    assert (shared.keys() | given) - ONLY_COMMAND.get(name, {}).keys() == parameters.keys() - ONLY_PYTHON
    for keyword, option in shared.items():
        if keyword in parameters and parameters[keyword].default is not inspect.Parameter.empty:
            assert (option.default or None) == (parameters[keyword].default or None), keyword


@pytest.mark.parametrize("name", CLI)
def test_results_are_frozen_dataclasses(name):
    report = report_class(name)
    assert report.__dataclass_params__.frozen
    assert callable(report.to_dict)
    assert report.__name__ in gguflora.__all__
    assert FUNCTIONS[name] in gguflora.__all__


def function_of(name):
    return getattr(gguflora, FUNCTIONS[name])


def report_class(name):
    return getattr(gguflora, inspect.signature(function_of(name)).return_annotation)


def test_infinities_are_null(folder, monkeypatch):
    monkeypatch.chdir(folder)
    report = gguflora.merge("base.gguf", "shout", "made.gguf", force=True)
    endless = dataclasses.replace(report, total=dataclasses.replace(report.total, snr_db=float("inf")))
    monkeypatch.setattr(gguflora, "merge", lambda *_, **__: endless)
    printed = run("merge", *ARGUMENTS["merge"].split(), "--report", "r.json", "--json").stdout
    for text in (printed, (folder / "r.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail)["total"]["snr_db"] is None


def test_quiet_unless_told(folder):
    """The library logs to nobody; ``--verbose`` shows what it logs, on stderr."""
    code = 'import gguflora; gguflora.convert("shout", "base.gguf", "made.gguf", force=True)'
    quiet = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert quiet.stdout + quiet.stderr == ""
    command = [sys.executable, "-P", "-m", "gguflora", "--verbose", "convert", *ARGUMENTS["convert"].split(), "--json"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["adapter"] == "shout"
    assert "gguflora.adapters.adapter: read shout" in told.stderr
    assert "gguflora.files.atomic: wrote made.gguf" in told.stderr


def test_importing_modules_keeps_the_functions():
    code = """
import gguflora.merging.merge, gguflora.cli, gguflora.lora.inspect
from gguflora.lora.convert import convert
assert gguflora.convert is convert and callable(gguflora.merge) and callable(gguflora.inspect)
assert gguflora.quants.quantize and gguflora.errors.GgufloraError is gguflora.GgufloraError
assert not hasattr(gguflora, "nothing") and not hasattr(gguflora, "__nothing__")
assert set(gguflora.__all__) == set(dir(gguflora))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
