"""Control characters of files, names and models never reach a terminal or a log."""

import logging
import os
import pty
import subprocess
import sys

import gguf
import numpy as np
import pytest

from gguflora.diagnostics import demo
from gguflora.system.terminal import LogFormatter, printable
from support.cli import run, run_process

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\rover\x7f\u202eback\u2028"


@pytest.mark.parametrize(
    "code", [*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
def test_control_characters_are_spelled(code):
    shown = printable(f"a{chr(code)}b")
    assert shown == f"a{chr(code)}b" if chr(code) in "\n\t" else shown.isascii() and shown.isprintable()
    assert printable(chr(code), keep="").isprintable()


def test_other_text_stays():
    text = "Grüße, 中文, עברית, 😀, tab\tand\nline \\x1b"
    assert printable(text) == text
    assert printable("a\udcffb") == "a\\udcffb"  # a byte of a file's name that is not UTF-8


def test_a_record_is_one_line():
    formatter = LogFormatter("%(name)s: %(message)s")
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", ("a\nx: forged\x1b[2J",), None)
    assert formatter.format(record) == "x: a\\x0ax: forged\\x1b[2J"


@pytest.fixture
def lora(tmp_path):
    """A GGUF LoRA with names that would act."""
    folder = tmp_path / f"f{EVIL.replace('/', '')}"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "evil.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8)
    writer.add_string("general.name", EVIL)
    for end, shape in (("lora_a", (4, 64)), ("lora_b", (64, 4))):
        writer.add_tensor(f"blk.0.{EVIL}.weight.{end}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "evil.gguf"


@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "-b", demo.BASE], ["diff"], ["convert"], ["merge"], ["-v", "inspect"]]
)
def test_commands(lora, tmp_path, command):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"peft_type": "\\u001b[2J\\u009b1m"}')
    for adapter in (lora, tmp_path / "peft"):
        more = {"diff": [adapter], "convert": ["-b", demo.BASE], "merge": ["-b", demo.BASE]}.get(command[0], [])
        done = (run_process if "-v" in command else run)(*command, adapter, *more)  # -v lasts in a process
        said = done.stdout + done.stderr
        assert said.strip()
        assert not [
            c for c in said if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2028"
        ], said


def test_run_filters_what_the_model_says_on_a_terminal_only():
    code = f"""
import gguflora.cli.run as r
r._write({EVIL!r} + "fine\\n")
"""
    piped = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert piped.stdout.decode() == EVIL + "fine\n"
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, "-P", "-c", code], stdout=writer, check=True)
    os.close(writer)
    shown = os.read(reader, 1 << 16)
    os.close(reader)
    assert b"\x1b" not in shown
    assert shown.decode().strip() == printable(EVIL) + "fine"


def test_an_error_of_the_server_is_logged_without_v():
    code = (
        "import logging, sys, gguflora.cli.app as a, gguflora.server.errors as e\n"
        "a._root(version=False, verbose=False)\n"
        "e.log_fault(e.Failure(500, 'x'), ValueError('why'), 'GET /a\\nforged')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "GET /a\\x0aforged failed"
    assert "ValueError: why" in done.stderr
    assert run_process("--version").stderr == ""
