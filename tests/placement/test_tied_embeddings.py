"""Adapters of a tied embedding and output, against the logits of the adapted model.

Not against PEFT's merge, which adds the changes of both to the one shared weight.
"""

import numpy as np
import peft
import pytest

import gguflora
from support import builders
from support.adapters import TIED
from support.builders import Trained
from support.oracles.gguf_files import read_tensors
from support.oracles.llama_cpp import llama_logits
from support.oracles.peft import merged_gguf, peft_logits

STILL_TIED = ("whole_tied", "lora_tied", "tokens", "tokens_by_name", "only_tokens")
UNTIED = [name for name in TIED if name not in STILL_TIED]


def assert_answers_like_the_adapted_model(arch, name, merged):
    adapter = builders.trained_adapter(arch, TIED[name])
    gguflora.merge(builders.gguf_model(arch), adapter, merged)
    expected = peft_logits(builders.hf_model(arch), adapter)
    change = expected - peft_logits(builders.hf_model(arch))
    assert np.abs(change).max() > 0.1
    assert np.linalg.norm(llama_logits(merged) - expected) < 1e-3 * np.linalg.norm(change)


@pytest.mark.parametrize("name", UNTIED)
def test_unties_where_the_two_change_differently(name, tmp_path):
    assert_answers_like_the_adapted_model("gemma3", name, tmp_path / "out.gguf")
    assert "output.weight" in read_tensors(tmp_path / "out.gguf")


@pytest.mark.parametrize("name", STILL_TIED)
@pytest.mark.parametrize("arch", ["gemma3", "gemma2"])
def test_stays_tied_where_the_two_change_alike(arch, name, tmp_path):
    assert_answers_like_the_adapted_model(arch, name, tmp_path / "out.gguf")
    assert "output.weight" not in read_tensors(tmp_path / "out.gguf")


@pytest.mark.parametrize("name", UNTIED)
def test_says_where_llama_cpp_cannot_untie(name, tmp_path):
    adapter = builders.trained_adapter("gemma2", TIED[name])
    with pytest.raises(gguflora.GgufloraError, match="cannot have an output weight of its own"):
        gguflora.merge(builders.gguf_model("gemma2"), adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("arch", "said"), [("gemma2", "merged only if"), ("gemma3", "unties them")])
def test_convert_says_what_a_merge_can_do(arch, said, tmp_path):
    adapter = builders.trained_adapter(arch, TIED[UNTIED[0]])
    with pytest.raises(gguflora.GgufloraError, match=said):
        gguflora.convert(adapter, builders.gguf_model(arch), tmp_path / "lora.gguf")


def test_hira_of_a_scaled_embedding_is_pefts_merge(tmp_path):
    """Gemma scales what it looks up, and PEFT's forward pass adds the change unscaled, unlike its own merge."""
    adapter = builders.trained_adapter("gemma3", Trained(peft.HiraConfig, ("embed_tokens",), {"r": 4}))
    gguflora.merge(builders.gguf_model("gemma3"), adapter, tmp_path / "out.gguf")
    base, found = read_tensors(builders.gguf_model("gemma3")), read_tensors(tmp_path / "out.gguf")
    expected = read_tensors(merged_gguf(builders.hf_model("gemma3"), adapter))
    change = expected["token_embd.weight"].astype(np.float64) - base["token_embd.weight"]
    error = np.linalg.norm(found["token_embd.weight"] - expected["token_embd.weight"]) / np.linalg.norm(change)
    assert error < 1e-4
    np.testing.assert_array_equal(found["output.weight"], base["token_embd.weight"])
