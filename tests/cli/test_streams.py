"""Standard output that is closed early, full, or in a small encoding: no traceback, no lost work, the right code."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from support import builders
from support.builders import Adapter

COMMAND = [sys.executable, "-P", "-m", "gguflora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams")
    shutil.copyfile(builders.gguf_model("llama"), path / "base.gguf")
    source = builders.adapter("llama", Adapter(targets=("q_proj",)))
    for name in (b"one", b"two", b"caf\xe9"):
        shutil.copytree(source, path / os.fsdecode(name))
    (path / "recipe.toml").write_text(
        'output = "out"\n[sources]\nall = ["one", "two"]\n[[steps]]\nname = "small"\naction = "resize"\n'
        'for = { adapter = "sources.all" }\nadapter = "{adapter}"\nrank = 1\nout = "{adapter}"\n'
    )
    return path


def shell(folder, line, **environment):
    script = 'set -o pipefail; g() { "$0" -P -m gguflora "$@"; }; ' + line
    return subprocess.run(
        ["bash", "-c", script, sys.executable],
        check=False,
        cwd=folder,
        capture_output=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "line", ["g pipeline recipe.toml --no-resume | head -1", "g inspect one --base base.gguf | head -1"]
)
def test_a_reader_that_goes(line, folder):
    result = shell(folder, line)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.count(b"\n") == 1
    assert (folder / "out/two").is_dir() or "inspect" in line


@pytest.mark.parametrize("command", ["inspect one", "inspect one --json", "doctor", "pipeline recipe.toml --no-resume"])
def test_a_full_disk(command, folder):
    result = shell(folder, f"g {command} > /dev/full")
    assert result.returncode == 1
    assert result.stderr == b"error: the output cannot be written: No space left on device\n"


def test_closed_streams(folder):
    assert shell(folder, "g inspect one >&-").returncode == 0
    assert shell(folder, "g inspect nothing >&- 2>&-").returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_small_encodings_and_names_that_are_no_text(encoding, folder):
    name = b"caf\xe9"
    for line in (b"g inspect caf\xe9", b"g merge base.gguf --lora caf\xe9 -o caf\xe9.gguf --force"):
        script = b'g() { "$0" -P -m gguflora "$@"; }; ' + line
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
        result = subprocess.run(
            ["bash", "-c", script, sys.executable], check=False, cwd=folder, capture_output=True, env=environment
        )
        assert (result.returncode, result.stderr) == (0, b""), result.stderr
        assert b"caf" in result.stdout
    assert (folder / os.fsdecode(name + b".gguf")).is_file()


def test_a_pipeline_of_names_that_are_no_text(folder):
    shutil.copy(folder / "recipe.toml", folder / "odd.toml")
    (folder / "odd.toml").write_text((folder / "recipe.toml").read_text().replace('["one", "two"]', '"caf?"'))
    for status in ("done", "kept"):
        result = shell(folder, "g pipeline odd.toml --json --report report")
        assert (result.returncode, result.stderr) == (0, b"")
        assert json.loads(result.stdout)["totals"] == {status: 1}
    json.loads((folder / "report/report.json").read_text())


def test_colours_put_no_bar_into_a_log(folder):
    result = shell(folder, "g merge base.gguf --lora one -o made.gguf --force", FORCE_COLOR="1", TERM="xterm")
    assert (result.returncode, result.stderr) == (0, b"")


def test_without_an_interpreter_or_a_home(folder):
    code = "import sys; sys.executable = None; from gguflora.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "pipeline", "recipe.toml", "--no-resume"]
    result = subprocess.run(command, check=False, cwd=folder, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    environment = {name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_CACHE_HOME"}}
    code = (
        "import pwd, os\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from gguflora.files.remote.cache import cache_folder\n"
        "print(cache_folder())"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert f"cache-{os.getuid()}/gguflora" in found.stdout


@pytest.mark.parametrize("damage", [b"", b"\0\xff", b"{", b"[1]", b"1e999"])
def test_damaged_records(damage, folder):
    """Records that cannot be read do not name the outputs as the pipeline's own, so that only --force replaces them."""
    shell(folder, "g pipeline recipe.toml")
    for path in (folder / "out/.gguflora").glob("*.json"):
        path.write_bytes(damage if path.name != "hashes.json" or damage != b"[1]" else b'{"x": 1}')
    refused = shell(folder, "g pipeline recipe.toml")
    assert refused.returncode == 1
    assert b"Traceback" not in refused.stderr
    assert b"--force" in refused.stderr
    again = shell(folder, "g pipeline recipe.toml --force")
    assert (again.returncode, again.stderr) == (0, b"")
    assert again.stdout.count(b"done  ") == 2
    assert shell(folder, "g pipeline recipe.toml").stdout.count(b"kept  ") == 2


def test_a_record_of_something_else(folder):
    shell(folder, "g pipeline recipe.toml")
    for path in (folder / "out/.gguflora").glob("*.json"):
        path.write_bytes(b'{"key": 1, "report": {}, "origin": [], "stamp": 3}')
    again = shell(folder, "g pipeline recipe.toml")
    assert (again.returncode, again.stderr) == (0, b"")
    assert again.stdout.count(b"done  ") == 2


@pytest.mark.parametrize(
    "command",
    ["inspect nothing", "merge base.gguf", "merge base.gguf --lora nothing -o x", "pipeline nothing.toml", "--nonsense",
     "convert one --base base.gguf -o x --rank 0", "nonsense"],
)  # fmt: skip
def test_errors_are_one_object(command, folder):
    result = shell(folder, f"g {command} --json")
    assert result.returncode in {1, 2}
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.returncode
    assert error["message"]
