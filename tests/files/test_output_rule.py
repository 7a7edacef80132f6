"""What is no regular file is never replaced: refused as an output, and written through as a report."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest

import gguflora
from gguflora.errors import OutputError
from gguflora.files.atomic import atomic_folder, atomic_output
from gguflora.files.output_rule import check_regular, check_text_target, write_output
from support import builders
from support.builders import Adapter
from support.cli import run, run_process
from support.pages import put_demo_files


@pytest.fixture
def special(tmp_path, monkeypatch):
    """A FIFO, a socket, and links to a file, to nothing, to a FIFO and to a device."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        listener.bind("socket")
    (tmp_path / "file").write_text("kept")
    for name in ("file", "nothing", "fifo"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    (tmp_path / "to-device").symlink_to("/dev/null")
    return tmp_path


NAMES = ["fifo", "socket", "to-file", "to-nothing", "to-fifo", "to-device", "/dev/null", "/dev/stdout", "/dev/fd/1"]


def state(folder):
    return {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_refused_as_an_output(name, special, monkeypatch):
    monkeypatch.chdir(special)
    before = state(special)
    for write in (check_regular, lambda path: atomic_output(path).__enter__(), lambda p: atomic_folder(p).__enter__()):
        with pytest.raises(OutputError, match=r"is a (device|FIFO|socket|link)|is an open file"):
            write(Path(name))
    assert state(special) == before


@pytest.mark.parametrize("command", ["merge", "patch", "convert", "export"])
@pytest.mark.parametrize("name", ["fifo", "to-file", "/dev/null"])
def test_commands_refuse_before_any_work(command, name, special, monkeypatch):
    monkeypatch.chdir(special)
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", Adapter(targets=("q_proj",)))
    calls = {
        "merge": lambda: gguflora.merge(base, [adapter], name, force=True),
        "patch": lambda: gguflora.merge(base, [adapter], patch=name, force=True),
        "convert": lambda: gguflora.convert(adapter, base, name, force=True),
        "export": lambda: gguflora.export(gguflora.convert(adapter, base, "l.gguf").output, base, name, force=True),
    }
    with pytest.raises(OutputError, match="is a"):
        calls[command]()
    assert Path("/dev/null").is_char_device()
    assert (special / "file").read_text() == "kept"


def test_a_report_goes_through_a_fifo(special):
    got = []
    reader = threading.Thread(target=lambda: got.append((special / "fifo").read_bytes()))
    reader.start()
    write_output(special / "to-fifo", b"x" * 200_000)
    reader.join(10)
    assert got == [b"x" * 200_000]
    assert (special / "fifo").is_fifo()


@pytest.mark.parametrize("name", ["to-file", "to-nothing", "socket"])
def test_a_report_replaces_no_link_and_no_socket(name, special):
    for write in (lambda path: write_output(path, b"new"), lambda path: check_text_target(path, force=True)):
        with pytest.raises(OutputError, match=r"is a (link|socket)"):
            write(special / name)
    assert (special / "file").read_text() == "kept"


def test_reports_to_stdout_and_over_others(special):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", Adapter(targets=("q_proj",)))
    words = ["merge", base, "--lora", adapter, "-o", special / "m.gguf", "--force", "--report"]
    done = run_process(*words, "/dev/stdout", "--json")
    first, end = json.JSONDecoder().raw_decode(done.stdout)
    second = json.loads(done.stdout[end:])
    assert first["output"] == second["output"], done.stderr
    with (special / "log").open("w") as log:  # /dev/stdout is then a link to a regular file
        os.set_inheritable(log.fileno(), True)
        write_output(Path(f"/dev/fd/{log.fileno()}"), b"report\n")
        log.write("more\n")
    assert (special / "log").read_text() == "report\nmore\n"
    words.remove("--force")
    words[words.index(special / "m.gguf")] = special / "n.gguf"
    refused = run(*words, special / "file")
    assert refused.returncode == 1
    assert "already exists" in refused.stderr
    assert not (special / "n.gguf").exists()
    assert (special / "file").read_text() == "kept"


@pytest.mark.parametrize("option", ["--report", "--plot"])
@pytest.mark.parametrize(
    "name", ["base.gguf", "merged.gguf", "shout/adapter_config.json", "shout/adapter_model.safetensors", "link.json"]
)
def test_a_report_replaces_nothing_that_the_command_reads_or_writes(option, name, tmp_path):
    put_demo_files(tmp_path)
    (tmp_path / "sub").symlink_to(tmp_path)
    (tmp_path / "link.json").symlink_to("base.gguf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    merge = ["merge", tmp_path / "base.gguf", "--lora", tmp_path / "shout", "-o", tmp_path / "merged.gguf", "--force"]
    for path in (tmp_path / name, tmp_path / "sub" / name):
        result = run(*merge, option, path)
        assert result.returncode == 1
        assert "would replace" in result.stderr or "is a link" in result.stderr
    assert run(*merge, "--report", tmp_path / "r", "--plot", tmp_path / "r").returncode == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(*merge, "--report", tmp_path / "shout/report.json").returncode == 0
