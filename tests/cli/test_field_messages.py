"""Messages about what people really bring: no traceback, and the way out."""

import json
import shutil

import pytest
import safetensors.numpy

import gguflora
from support import builders
from support.builders import Adapter
from support.cli import run


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(builders.adapter("llama", Adapter(seed=5)), tmp_path / "adapter")


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(edit(tensors), path)


PLACES = ["lora_A", "lora_B", "modules_to_save", "token_adapter"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0,), (0, 64)])
def test_tensors_without_values_name_zero_3(adapter, tmp_path, place, shape):
    added = {
        "modules_to_save": "base_model.model.model.embed_tokens.weight",
        "token_adapter": "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    }

    def edit(tensors):
        key = added.get(place) or next(name for name in tensors if place in name)
        return tensors | {key: next(iter(tensors.values())).flatten()[:0].reshape(shape)}

    edit_tensors(adapter, edit)
    for words in (
        ["convert", adapter, "--base", builders.gguf_model("llama"), "-o", tmp_path / "out.gguf"],
        ["merge", builders.gguf_model("llama"), "--lora", adapter, "-o", tmp_path / "out.gguf"],
        ["inspect", adapter],
    ):
        result = run(*words)
        assert result.returncode == 1
        assert "ZeRO-3" in result.stderr
        assert "zero_to_fp32.py" in result.stderr
        assert result.stderr.count("error: ") == 1


def test_a_fault_of_the_program_is_one_line(monkeypatch, adapter):
    def fail(*_, **__):
        raise KeyError("a fault\nof two lines")

    monkeypatch.setattr(gguflora, "inspect", fail, raising=False)
    result = run("inspect", adapter, "--json")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "KeyError" in result.stderr
    assert "gguflora doctor" in result.stderr
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "KeyError"
    assert error["exit_code"] == 1
    assert error["message"] in result.stderr
