"""Small files of strangers are read whole, and nothing else is."""

import os
import socket

import pytest

import gguflora
from gguflora.adapters.peft.config import read_config
from gguflora.adapters.tokenizer import read_templates, read_tokenizer
from gguflora.architectures.base_model import read_base
from gguflora.diagnostics import demo
from gguflora.errors import GgufloraError
from gguflora.files.safetensors import weight_files
from gguflora.files.small_files import read_small, read_small_text


def test_a_file_is_read_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("Grüße", encoding="utf-8")
    assert read_small_text(path) == "Grüße"
    assert read_small(path, 7) == "Grüße".encode()
    with pytest.raises(OSError, match="more than the 6 bytes"):
        read_small(path, 6)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


OTHERS = {
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "large": sparse,
    "socket": bound,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
}
READERS = {
    "adapter_config.json": read_config,
    "tokenizer.json": read_tokenizer,
    "tokenizer_config.json": read_templates,
    "added_tokens.json": read_tokenizer,
    "chat_template.jinja": read_templates,
    "chat_template.json": read_templates,
    "config.json": read_base,
    "model.safetensors.index.json": lambda folder: weight_files(folder / "model.safetensors.index.json"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", READERS)
def test_whatever_lies_in_its_place(tmp_path, kind, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OTHERS[kind](tmp_path / name)
    try:
        found = READERS[name](tmp_path)
    except GgufloraError as error:
        assert name in str(error) or tmp_path.name in str(error)
    else:  # what is no file there counts as missing
        assert kind != "large" and not (found and getattr(found, "has_tokens", False))


def test_the_commands_name_the_file(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((demo.HERE / "shout" / name).read_bytes())
    sparse(tmp_path / "tokenizer.json")
    with pytest.raises(GgufloraError, match=r"tokenizer.json: .*more than the 134217728 bytes"):
        gguflora.merge(demo.BASE, [(tmp_path, 1.0)], tmp_path / "out.gguf")
