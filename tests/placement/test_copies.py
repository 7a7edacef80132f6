"""Embeddings saved beside an adapter: a copy of the base's is dropped, one row set by hand is not."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from support import builders
from support.oracles.gguf_files import read_tensors


def with_embedding(folder, change):
    """A LoRA directory with the base's embedding in F32, of which ``change`` edits rows."""
    weights = safetensors.numpy.load_file(builders.hf_model("llama") / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"].astype(np.float32)
    change(embedding)
    folder.mkdir()
    n_out, n_in = weights["model.layers.0.self_attn.o_proj.weight"].shape
    tensors = {
        "base_model.model.model.embed_tokens.weight": embedding,
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": np.ones((1, n_in), np.float32),
        "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": np.ones((n_out, 1), np.float32),
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, embedding


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_rows_set_by_hand_are_kept(kind, tmp_path):
    base = builders.gguf_model("llama", "small", kind)

    def change(embedding):
        embedding[[5, 9, 200]] *= -1

    adapter, expected = with_embedding(tmp_path / "adapter", change)
    gguflora.merge(base, adapter, tmp_path / "merged.gguf", outtype="f32")
    found = read_tensors(tmp_path / "merged.gguf")["token_embd.weight"]
    np.testing.assert_allclose(found[[5, 9, 200]], expected[[5, 9, 200]], atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_copy_is_dropped(kind, tmp_path):
    base = builders.gguf_model("llama", "small", kind)
    adapter, _ = with_embedding(tmp_path / "adapter", lambda embedding: None)
    report = gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    told = [
        report,
        gguflora.convert(adapter, base, tmp_path / "lora.gguf"),
        gguflora.inspect(adapter, base),
        gguflora.resize(adapter, tmp_path / "resized", rank=1),
    ]
    for one in told:
        assert any("left out" in text and "embed_tokens.weight" in text for text in one.warnings)
    before, after = (
        next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight").data
        for path in (base, tmp_path / "merged.gguf")
    )
    np.testing.assert_array_equal(before, after)
