"""What a new user meets: no llama.cpp, no home, one CPU, an ASCII terminal, strange names, a shell that completes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gguflora
from gguflora.diagnostics import demo, doctor
from gguflora.errors import MissingExtraError, OutputError
from gguflora.files.output_rule import check_regular
from gguflora.system import names
from support import ROOT

WITHOUT = "import sys; sys.modules['llama_cpp'] = None; sys.argv[0] = 'gguflora'\n"
COMMAND = "from gguflora.cli import main; main()"
LONG = "x" * 240 + ".gguf"
STRANGE = "Größe 中文 (copy) 'q' $HOME;.gguf"


def start(*arguments, code=COMMAND, **options):
    """Run a command line in a process of its own."""
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, **options)


def one_cpu():
    known = getattr(os, "sched_getaffinity", lambda _: {0})  # hidden by GGUFLORA_TEST_HIDE
    os.sched_setaffinity(0, {min(known(0))})


def test_the_demo_converts_and_merges_without_llama_cpp(tmp_path):
    code = f"{WITHOUT}import importlib.util as u; find = u.find_spec\n"
    code += f"u.find_spec = lambda name, *more: None if name == 'llama_cpp' else find(name, *more)\n{COMMAND}"
    done = start("demo", "--keep", tmp_path / "kept", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "convert shout" in done.stdout
    assert "need llama-cpp-python: pip install 'gguflora[runtime]'" in done.stdout
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "base-shout.gguf",
        "shout.gguf",
        "verse.gguf",
    ]
    report = json.loads(start("demo", "--json", code=code).stdout)
    assert (report["answers"], report["kl"], report["merge"]["weights"] > 0) == ([], None, True)


def test_a_missing_llama_cpp_is_explained(monkeypatch):
    said = str(MissingExtraError("serve", "llama-cpp-python", "runtime"))
    assert "pip compiles it" in said
    assert "gguflora doctor" in said
    monkeypatch.setattr(doctor, "_installed_version", lambda package: None if package == "llama-cpp-python" else "1")
    monkeypatch.setenv("PATH", "/nowhere")
    found = gguflora.doctor().runtime
    assert "17 CPU minutes" in found[0]
    assert "not found: apt install g++" in found[1]
    assert all("not checked" in line for line in found if "prebuilt" in line or "conda" in line)


def test_doctor_is_a_report_of_a_fault(monkeypatch):
    monkeypatch.setenv("GGUFLORA_API_KEY", "secret")
    monkeypatch.setenv("GGUFLORA_ISA", "scalar")
    done = start("doctor")
    assert done.returncode == 0, done.stderr
    for part in ("compiled by", "memory:", "cache:", "kernels: scalar", "GGUFLORA_ISA=scalar", "GGUFLORA_API_KEY=set"):
        assert part in done.stdout
    assert "secret" not in done.stdout
    report = gguflora.doctor().to_dict()
    assert json.loads(json.dumps(report))["compiler"]
    assert report["available_memory"] <= report["memory"]


def test_version_says_what_was_built():
    first, second = start("--version").stdout.splitlines()
    assert first == f"gguflora {gguflora.__version__}"
    assert f"Python {sys.version.split()[0]} on " in second
    assert "kernels " in second
    assert "compiled by " in second


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_a_shell_completes(shell):
    assert "_GGUFLORA_COMPLETE" in start("--completion", shell).stdout


def test_bash_completes_commands(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(start("--completion", "bash").stdout)
    (tmp_path / "gguflora").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m gguflora "$@"\n')
    (tmp_path / "gguflora").chmod(0o755)
    call = "_gguflora_completion gguflora me gguflora"
    test = f'. {script}; COMP_WORDS=(gguflora me); COMP_CWORD=1; {call}; echo "${{COMPREPLY[@]}}"'
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", test], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["merge"], done.stderr


def test_an_unknown_shell_is_named():
    done = start("--completion", "tcsh")
    assert done.returncode == 1
    assert "expected bash, zsh, fish" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/proc/nowhere"},
        {"HOME": None, "USER": None, "LOGNAME": None},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"GGUFLORA_ISA": "scalar"},
        {"TERM": "dumb", "COLUMNS": "1"},
    ],
    ids=["read-only home", "no home", "ascii", "no avx2", "narrow"],
)
def test_environments(environment, tmp_path):
    """Convert and merge, with a strange name, on one CPU."""
    env = {name: value for name, value in (os.environ | environment).items() if value is not None}
    shout = demo.HERE / "shout"
    for command in (("convert", shout, "--base", demo.BASE), ("merge", demo.BASE, "--lora", shout)):
        out = tmp_path / f"{command[0]} {STRANGE}"
        done = start(*command, "--out", out, env=env, preexec_fn=one_cpu)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert out.stat().st_size > 1000
    assert start("doctor", env=env, preexec_fn=one_cpu).returncode == 0


@pytest.mark.parametrize("name", [STRANGE, LONG, "-x.gguf", "a.b.c", " x.gguf"])
def test_names(name, tmp_path):
    base, adapter = tmp_path / f"b{name}"[-200:], tmp_path / f"f {name}"[:200]
    base = tmp_path / f"b{name}"
    shutil.copyfile(demo.BASE, base)
    shutil.copytree(demo.HERE / "shout", adapter)
    report = gguflora.merge(base, adapter, tmp_path / name, force=True)
    assert report.path == tmp_path / name if hasattr(report, "path") else (tmp_path / name).exists()
    gguflora.convert(adapter, base, tmp_path / f"l{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([base.name, adapter.name, name, f"l{name}"])


@pytest.mark.parametrize(
    "name", ["NUL", "con.gguf", "COM1.gguf", "lpt9", "a:b.gguf", "x?.gguf", "x.gguf.", "x ", "AUX .txt"]
)
def test_names_that_windows_does_not_take(name, monkeypatch):
    assert names.problem_of_name(name)
    check_regular(Path(name))
    monkeypatch.setattr(names, "CHECKS_NAMES", True)
    with pytest.raises(OutputError, match="choose another name"):
        check_regular(Path(name))


@pytest.mark.parametrize("name", ["null.gguf", "console", "COM10", "com.gguf", ".x", "größe 中文.gguf"])
def test_names_that_windows_takes(name):
    assert names.problem_of_name(name) is None


def test_an_output_that_differs_from_an_input_in_case(tmp_path, monkeypatch):
    """A file system that ignores case finds the base under the output's name, and so it is an input."""
    base = tmp_path / "base.gguf"
    shutil.copyfile(demo.BASE, base)
    assert names.ignores_case(tmp_path) == (tmp_path / "BASE.gguf").exists()
    os.link(base, tmp_path / "BASE.gguf")  # what such a file system shows: both names, one file
    with pytest.raises(OutputError, match="is also an input"):
        gguflora.merge(base, demo.HERE / "shout", tmp_path / "BASE.gguf", force=True)
    real = Path.samefile
    monkeypatch.setattr(
        Path, "samefile", lambda self, other: str(self).lower() == str(other).lower() or real(self, other)
    )
    assert names.ignores_case(tmp_path)


@pytest.mark.parametrize(("attribute", "value", "said"), [
    ("version_info", "(3, 10, 4)", "gguflora needs Python 3.11 or later"),
    ("maxsize", "2**31 - 1", "gguflora needs a 64-bit Python"),
])  # fmt: skip
def test_old_and_small_pythons_are_refused(attribute, value, said):
    code = f"import sys, build_backend; sys.{attribute} = {value}; build_backend.build_wheel('.')"
    done = start(code=code, env=os.environ | {"PYTHONPATH": str(ROOT / "tools")})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr
