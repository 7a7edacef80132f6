"""Every architecture that can be trained, against PEFT in torch and against llama.cpp, on tiny random models."""

import numpy as np
import pytest
import torch

from gguflora.diagnostics.divergence import kl_divergence
from gguflora.errors import ArchitectureError
from gguflora.training.configs import KINDS
from gguflora.training.options import LoraShape
from support import zoo
from support.oracles import PROMPT
from support.oracles.llama_cpp import llama_logits
from support.training import assert_trains_as_peft, in_peft, our_loss, own_model, packed, with_loras

NAMES = (
    "llama", "llama_biases", "llama3", "llama_linear", "mistral", "qwen2", "qwen3", "gemma", "gemma2_served",
    "gemma3_served", "phi2", "p3", "p3_long", "gpt2", "gptneox", "bloom", "falcon", "falcon_7b", "starcoder2",
    "stablelm", "stablelm_norms", "olmo", "olmo2", "command_r", "cohere2_deep", "granite_scaled", "nemotron", "glm4",
    "smollm3_deep", "exaone4_deep", "mixtral", "qwen2moe", "qwen3moe_served", "olmoe",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_peft_does(name):
    model, shape = packed(zoo.gguf_model(name)), LoraShape(rank=3, alpha=6)
    layers = with_loras(model, shape)
    assert_trains_as_peft(model, layers, in_peft(own_model(name), layers, shape))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_llama_cpp(name):
    model = packed(zoo.gguf_model(name))
    with torch.inference_mode():
        found = model.logits(model.hidden(torch.tensor([list(PROMPT)])))[0].numpy()
    expected = llama_logits(zoo.gguf_model(name))
    assert np.ptp(expected) > 1, "the model must say something"
    assert kl_divergence(expected, found) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_changes_nothing(name):
    model = packed(zoo.gguf_model(name))
    layers = with_loras(model, LoraShape(rank=3, alpha=6))
    plain = our_loss(model)
    gradients = [layer.lora_a.grad.clone() for layer in layers.values()]
    for layer in layers.values():
        layer.lora_a.grad = layer.lora_b.grad = None
    model.recompute(True)
    assert our_loss(model) == pytest.approx(plain, abs=1e-6)
    for layer, gradient in zip(layers.values(), gradients, strict=True):
        torch.testing.assert_close(layer.lora_a.grad, gradient, rtol=1e-5, atol=1e-7)


def test_every_architecture_is_tested():
    assert {packed(zoo.gguf_model(name)).packed.base.architecture for name in NAMES} == set(KINDS)


@pytest.mark.parametrize("name", ["mamba", "t5", "gptoss", "ministral3"])
def test_others_are_refused_by_name(name):
    with pytest.raises(ArchitectureError, match=r"cannot be trained; these can: .*llama"):
        packed(zoo.gguf_model(name))
