"""Embeddings saved beside an adapter: a copy of the base's is dropped, one row set by hand is not."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

import gguflora
from support import builders, zoo
from support.oracles.gguf_files import read_tensors


def with_embedding(folder, change, size="small"):
    """A LoRA directory with the base's embedding in F32, of which ``change`` edits rows."""
    weights = safetensors.numpy.load_file(builders.hf_model("llama", size) / "model.safetensors")
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


SLIGHT = {
    "larger": lambda rows: rows * 1.1,
    "moved": lambda rows: rows + 0.1 * np.sign(rows) * np.abs(rows).mean(),
    "few": lambda rows: rows + 3 * np.abs(rows).mean() * (np.arange(rows.shape[1]) < 8),
    "averaged": lambda rows: 0.8 * rows + 0.2 * rows.mean(axis=0),
}


@pytest.mark.parametrize("edit", SLIGHT)
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q4_0", "IQ4_NL"])
def test_rows_changed_by_less_than_a_step_of_the_type_are_kept(kind, edit, tmp_path):
    """All other rows are the base's bit for bit once they are rounded, so the type's error explains none of these."""
    base = tmp_path / "base.gguf"
    gguflora.quantize(builders.gguf_model("llama", "wide"), base, kind, pure=True)

    def change(embedding):
        embedding[[5, 9, 200]] = SLIGHT[edit](embedding[[5, 9, 200]])

    adapter, expected = with_embedding(tmp_path / "adapter", change, "wide")
    report = gguflora.merge(base, adapter, tmp_path / "merged.gguf", outtype="f32")
    assert not any("left out" in text for text in report.warnings)
    np.testing.assert_allclose(read_tensors(tmp_path / "merged.gguf")["token_embd.weight"], expected, atol=1e-6)


def test_half_of_the_rows_changed_a_little(tmp_path):
    base = tmp_path / "base.gguf"
    gguflora.quantize(builders.gguf_model("llama", "wide"), base, "Q4_K", pure=True)

    def change(embedding):
        embedding[::2] *= 1.1

    adapter, expected = with_embedding(tmp_path / "adapter", change, "wide")
    gguflora.merge(base, adapter, tmp_path / "merged.gguf", outtype="f32")
    np.testing.assert_allclose(read_tensors(tmp_path / "merged.gguf")["token_embd.weight"], expected, atol=1e-6)


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


@pytest.mark.parametrize("changed", ["embed_tokens", "lm_head"])
def test_embedding_and_head_that_differ_untie_a_tied_base(changed, tmp_path):
    """Both are saved; one of them had a row set by hand, the other is a copy. Neither order of keys loses the row."""
    base = zoo.gguf_model("qwen2")
    tied = read_tensors(base)["token_embd.weight"]
    edited = tied.copy()
    edited[7] *= -1
    both = {"embed_tokens": tied, "lm_head": tied, changed: edited}
    (adapter := tmp_path / "adapter").mkdir()
    tensors = {
        "base_model.model.model.embed_tokens.weight": both["embed_tokens"],
        "base_model.model.lm_head.weight": both["lm_head"],
    }
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    gguflora.merge(base, adapter, tmp_path / "merged.gguf")
    found = read_tensors(tmp_path / "merged.gguf")
    assert "output.weight" not in read_tensors(base)
    np.testing.assert_array_equal(found["token_embd.weight"], both["embed_tokens"])
    np.testing.assert_array_equal(found["output.weight"], both["lm_head"])
