"""Adapters trained with new tokens: the base's vocabulary grows as if llama.cpp had converted the merged model."""

import shutil

import llama_cpp
import numpy as np
import pytest

import gguflora
from support import builders
from support.adapters import NEW_TOKENS, resized
from support.oracles.gguf_files import read_metadata, read_tensors

ARCHITECTURES = ["llama", "qwen2", "gemma3"]  # the last one is tied


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_the_converted_merged_model(arch, tmp_path):
    adapter, expected = resized(arch)
    gguflora.merge(builders.gguf_model(arch), adapter, tmp_path / "out.gguf")
    found, truth = read_tensors(tmp_path / "out.gguf"), read_tensors(expected)
    assert found.keys() == truth.keys()
    for name, values in truth.items():
        assert found[name].shape == values.shape, name
        assert np.abs(found[name] - values).max() < 1e-5, name
    mine, theirs = read_metadata(tmp_path / "out.gguf"), read_metadata(expected)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        assert mine[key] == theirs[key], key
    assert mine.get(f"{mine['general.architecture']}.vocab_size") == theirs.get(
        f"{theirs['general.architecture']}.vocab_size"
    )


@pytest.mark.parametrize("outtype", ["F32", "Q8_0"])
def test_llama_cpp_knows_the_new_tokens(outtype, tmp_path):
    adapter, _ = resized("llama")
    gguflora.merge(builders.gguf_model("llama", outtype=outtype), adapter, tmp_path / "out.gguf")
    llm = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=64, verbose=False)
    before = llama_cpp.Llama(str(builders.gguf_model("llama")), n_ctx=64, vocab_only=True, verbose=False)
    new = [llm.tokenize(token.encode(), add_bos=False, special=True) for token in NEW_TOKENS]
    assert all(len(tokens) == 1 for tokens in new)
    assert all(before.n_vocab() <= tokens[0] < llm.n_vocab() for tokens in new)
    assert llm("a", max_tokens=2)["usage"]["completion_tokens"] > 0


def test_adapted_embedding_that_was_resized(tmp_path):
    """LoRA on the embedding beside the whole, resized weight that PEFT saves with it."""
    adapter, expected = resized("llama", ("q_proj", "embed_tokens", "lm_head"))
    gguflora.merge(builders.gguf_model("llama"), adapter, tmp_path / "out.gguf")
    found, truth = read_tensors(tmp_path / "out.gguf"), read_tensors(expected)
    assert all(np.abs(found[name] - values).max() < 1e-5 for name, values in truth.items())


def test_refused_without_the_tokenizer(tmp_path):
    adapter = shutil.copytree(resized("llama")[0], tmp_path / "adapter")
    for path in adapter.glob("*token*"):
        path.unlink()
    with pytest.raises(gguflora.GgufloraError, match=r"vocabulary was resized.*tokenizer"):
        gguflora.merge(builders.gguf_model("llama"), adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_convert_refuses(tmp_path):
    with pytest.raises(gguflora.GgufloraError, match=r"token_embd\.weight.*merge"):
        gguflora.convert(resized("llama")[0], builders.gguf_model("llama"), tmp_path / "out.gguf")
