"""``text_only`` and ``trust_names`` wherever adapters are loaded at run time."""

import json
import logging
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.engine import Engine
from gguflora.engine.adapter_loader import AdapterFiles
from gguflora.errors import ArchitectureError, HotSwapError
from support import builders, hotswap, zoo
from support.cli import run_process
from support.engines import OPTIONS, ask, tokens_of
from support.hotswap import A

VISION = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
LEFT_OUT = f"left out 1 of 15 weights, {VISION}.weight"


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a llama as PEFT saves it for a vision-language model around it."""
    directory = shutil.copytree(builders.adapter("llama", A), tmp_path / "adapter")
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    inner = {key.replace("model.model.", "model.model.language_model."): value for key, value in tensors.items()}
    inner |= {
        f"base_model.model.{VISION}.lora_A.weight": np.ones((4, 8), np.float32),
        f"base_model.model.{VISION}.lora_B.weight": np.ones((8, 4), np.float32),
    }
    safetensors.numpy.save_file(inner, path)
    return directory


def test_engine_takes_the_language_part(adapter):
    with Engine(builders.gguf_model("llama"), **OPTIONS) as engine:
        with pytest.raises(ArchitectureError, match="--text-only"):
            engine.load(adapter, "a")
        for _ in range(2):  # the second time from the cache of converted adapters
            loaded = engine.load(adapter, "a", text_only=True, replace=True)
            assert any(LEFT_OUT in text for text in loaded.warnings)
        engine.load(hotswap.gguf_lora(A), "expected")
        found, expected = (tokens_of(list(ask(engine, name))) for name in ("a", "expected"))
        assert found == expected
        assert found != tokens_of(list(ask(engine)))
    with Engine(builders.gguf_model("llama"), adapters={"a": adapter}, text_only=True, **OPTIONS) as engine:
        assert any(LEFT_OUT in text for text in engine.warnings)
        assert tokens_of(list(ask(engine, "a"))) == expected


def test_a_failed_load_leaves_the_way_that_a_loaded_adapter_is_read(adapter):
    with Engine(builders.gguf_model("llama"), adapters={"a": adapter}, text_only=True, **OPTIONS) as engine:
        files = engine._loader.files
        assert isinstance(files, AdapterFiles)
        known = files.lora_file(adapter)  # as a set that must be concatenated reads it again
        with pytest.raises(ArchitectureError, match="--text-only"):
            engine.load(adapter, "a", text_only=False, replace=True)
        with pytest.raises(HotSwapError, match="no task"):
            engine.load(adapter, "b", task=1, text_only=False)
        assert files.lora_file(adapter) == known


def test_attach_takes_the_language_part(adapter, caplog):
    llm = hotswap.open_llama()
    with gguflora.attach(llm) as adapters, pytest.raises(ArchitectureError, match="--text-only"):
        adapters.load("a", adapter)
    with gguflora.attach(llm, text_only=True) as adapters, caplog.at_level(logging.WARNING):
        adapters.load("a", adapter)
        adapters.load("expected", hotswap.gguf_lora(A))
        assert LEFT_OUT in caplog.text
        adapters.apply(a=1)
        found = hotswap.logits(llm)
        adapters.apply(expected=1)
        np.testing.assert_allclose(found, hotswap.logits(llm), atol=1e-5)


def test_run_takes_the_language_part(adapter):
    words = ("run", builders.gguf_model("llama"), "--lora", adapter, "-p", "ab", "--raw", "--max-tokens", "2", "--json")
    plain, result = run_process(*words), run_process(*words, "--text-only")
    assert plain.returncode == 1
    assert "--text-only" in plain.stderr
    assert result.returncode == 0, result.stderr
    assert LEFT_OUT in result.stderr
    assert any(LEFT_OUT in text for text in json.loads(result.stdout)["warnings"])


def test_serve_takes_the_language_part(adapter):
    words = ("serve", builders.gguf_model("llama"), "--lora", f"a={adapter}", "--port", "0", "--json")
    plain = run_process(*words)
    assert plain.returncode == 1
    assert "--text-only" in plain.stderr
    command = [sys.executable, "-P", "-m", "gguflora", *map(str, words), "--text-only"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ready = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert any(LEFT_OUT in text for text in json.loads(ready)["warnings"])
    assert LEFT_OUT in told


def test_names_are_trusted_only_when_asked(tmp_path):
    """falcon-h1's converter scales tensors, and gguflora has no rule for it."""
    adapter = tmp_path / "adapter"
    zoo.peft_model("falcon_h1", target_modules=["in_proj"]).save_pretrained(adapter)
    base = zoo.gguf_model("falcon_h1")
    with Engine(base, **OPTIONS) as engine:
        with pytest.raises(ArchitectureError, match="--trust-names"):
            engine.load(adapter, "a")
        engine.load(adapter, "a", trust_names=True)
    with Engine(base, adapters={"a": adapter}, trust_names=True, **OPTIONS) as engine:
        assert [loaded.name for loaded in engine.adapters()] == ["a"]
    words = ("run", base, "--lora", adapter, "-p", "ab", "--raw", "--max-tokens", "2")
    assert "--trust-names" in run_process(*words).stderr
    assert run_process(*words, "--trust-names").returncode == 0
