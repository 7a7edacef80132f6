"""Merge the vision part of an adapter into an mmproj file: equal to llama.cpp's converter on PEFT's merge."""

import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from gguflora.errors import AdapterError, ArchitectureError, UnsupportedAdapterError
from support import builders, vision
from support.asserts import assert_close
from support.cli import run
from support.oracles.gguf_files import read_tensors

NAMES = list(vision.MODELS)


def assert_merges_as_peft(name, adapter, expected, tmp_path, tolerance=1e-5):
    report = gguflora.merge(vision.base(name), adapter, tmp_path / "out.gguf", rounding="nearest")
    found, wanted, before = (read_tensors(path) for path in (tmp_path / "out.gguf", expected, vision.base(name)))
    assert found.keys() == wanted.keys()
    changed = {tensor.name for tensor in report.tensors}
    for tensor, values in wanted.items():
        assert_close(found[tensor], values, tolerance, tensor)
        assert (tensor in changed) == (not np.array_equal(before[tensor], values)), tensor
    return report


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_every_linear_layer(name, tmp_path):
    adapter, expected = vision.adapted(name, tmp_path)
    report = assert_merges_as_peft(name, adapter, expected, tmp_path)
    assert report.warnings == ()


def test_a_whole_projector(tmp_path):
    """Gemma 3's projector has a parameter beside its norm, which GGUF stores as 1 + w."""
    adapter, expected = vision.adapted(
        "gemma3", tmp_path, target_modules=["out_proj"], modules_to_save=["multi_modal_projector"]
    )
    report = assert_merges_as_peft("gemma3", adapter, expected, tmp_path)
    assert {"mm.soft_emb_norm.weight", "mm.input_projection.weight"} <= {tensor.name for tensor in report.tensors}


def test_norms_and_biases(tmp_path):
    adapter, expected = vision.adapted(
        "qwen2vl", tmp_path, target_modules=["visual.blocks.0.attn.proj"], modules_to_save=["norm1", "ln_q", "qkv"]
    )
    assert_merges_as_peft("qwen2vl", adapter, expected, tmp_path)


@pytest.mark.parametrize("before", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower."])
def test_names_of_other_versions(before, tmp_path):
    adapter, expected = vision.adapted("gemma3", tmp_path)
    path = adapter / "adapter_model.safetensors"
    weights = safetensors.numpy.load_file(path)
    assert all("model.model.vision_tower." in key for key in weights)
    safetensors.numpy.save_file({key.replace("model.vision_tower.", before): w for key, w in weights.items()}, path)
    assert_merges_as_peft("gemma3", adapter, expected, tmp_path)


@pytest.fixture
def both(tmp_path):
    """An adapter of the vision and of the language part."""
    adapter, expected = vision.adapted("qwen3vl", tmp_path, target_modules=r".*(attn\.qkv|q_proj)")
    return adapter, expected


def test_the_language_part_is_left_out_and_named(both, tmp_path):
    adapter, expected = both
    report = assert_merges_as_peft("qwen3vl", adapter, expected, tmp_path)
    (warning,) = report.warnings
    assert "left out 1 of 4 weights, model.language_model.layers.0.self_attn.q_proj.weight" in warning
    result = run("merge", vision.base("qwen3vl"), "--lora", adapter, "-o", tmp_path / "cli.gguf")
    assert result.returncode == 0
    assert "left out 1 of 4 weights" in result.stderr


def test_convert_says_why_the_vision_part_cannot_be_converted(both, tmp_path):
    adapter, _ = both
    result = run("convert", adapter, "--base", vision.base("qwen3vl"), "-o", tmp_path / "lora.gguf")
    assert result.returncode == 1
    assert "without adapters" in result.stderr
    assert "gguflora merge mmproj.gguf --lora" in result.stderr
    adapter, _ = vision.adapted("qwen3vl", tmp_path / "vision only")
    result = run("convert", adapter, "--base", builders.gguf_model("llama"), "-o", tmp_path / "lora.gguf")
    assert result.returncode == 1
    assert "--text-only" in result.stderr
    assert "mmproj" in result.stderr


def test_an_adapter_of_the_language_model_is_refused(tmp_path):
    adapter = builders.adapter("llama", builders.Adapter(seed=1))
    with pytest.raises(AdapterError, match="nothing remains of it for an mmproj file"):
        gguflora.merge(vision.base("qwen3vl"), adapter, tmp_path / "out.gguf")


def test_another_model_is_refused(tmp_path):
    adapter, _ = vision.adapted("gemma3", tmp_path)
    with pytest.raises(ArchitectureError, match="have no place in"):
        gguflora.merge(vision.base("qwen3vl"), adapter, tmp_path / "out.gguf")


def test_convolutions_are_refused(tmp_path):
    adapter, _ = vision.adapted("gemma3", tmp_path, target_modules=["patch_embedding"])
    with pytest.raises(UnsupportedAdapterError, match="convolution"):
        gguflora.merge(vision.base("gemma3"), adapter, tmp_path / "out.gguf")


def test_unchecked_projectors_are_refused_unless_names_are_trusted(tmp_path):
    adapter, expected = vision.adapted("idefics3", tmp_path)
    base = shutil.copy(vision.base("idefics3"), tmp_path / "base.gguf")
    content = base.read_bytes()
    assert content.count(b"idefics3") == 1
    base.write_bytes(content.replace(b"idefics3", b"idefics9"))
    with pytest.raises(ArchitectureError, match=r"'idefics9'.*--trust-names"):
        gguflora.merge(base, adapter, tmp_path / "out.gguf")
    report = gguflora.merge(base, adapter, tmp_path / "out.gguf", trust_names=True)
    assert any("trust_names" in text for text in report.warnings)
    for tensor, values in read_tensors(expected).items():
        assert_close(read_tensors(tmp_path / "out.gguf")[tensor], values, 1e-5, tensor)


def test_the_mobile_net_of_gemma_3n_is_refused_by_name(tmp_path):
    """Its tower is a convolutional network of timm; the file names a projector for each of its two encoders."""
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_type("mmproj")
    writer.add_string("clip.vision.projector_type", "gemma3nv")
    writer.add_string("clip.audio.projector_type", "gemma3na")
    writer.add_tensor("v.blk.0.0.attn.query.proj.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter, _ = vision.adapted("gemma3", tmp_path)
    with pytest.raises(
        gguflora.GgufloraError, match=r"'gemma3nv' belongs to Gemma 3n, whose vision tower is a network of convolutions"
    ):
        gguflora.merge(tmp_path / "mmproj.gguf", adapter, tmp_path / "out.gguf")
