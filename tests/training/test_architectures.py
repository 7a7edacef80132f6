"""Every architecture that can be trained, against PEFT in torch and against llama.cpp, on tiny random models."""

import numpy as np
import pytest
import torch

from gguflora.diagnostics.divergence import kl_divergence
from gguflora.errors import ArchitectureError
from gguflora.training.adapters import add_loras, choose_modules
from gguflora.training.batches import Batches
from gguflora.training.configs import KINDS
from gguflora.training.loss import backward_loss
from gguflora.training.model import Below
from gguflora.training.options import LoraShape
from gguflora.training.samples import Sample
from support import zoo
from support.oracles import PROMPT
from support.oracles.llama_cpp import llama_logits
from support.training import assert_trains_as_peft, in_peft, our_loss, own_model, packed, relative, with_loras

NAMES = (
    "llama", "llama_biases", "llama3", "llama_linear", "mistral", "qwen2", "qwen3", "gemma", "gemma2_served",
    "gemma3_served", "phi2", "p3", "p3_long", "gpt2", "gptneox", "bloom", "falcon", "falcon_7b", "starcoder2",
    "stablelm", "stablelm_norms", "olmo", "olmo2", "command_r", "cohere2_deep", "granite_scaled", "nemotron", "glm4",
    "smollm3_deep", "exaone4_deep", "mixtral", "qwen2moe", "qwen3moe_served", "olmoe", "llama_yarn", "qwen3_yarn",
    "olmo3", "granitemoe_scaled", "granitemoe_shared", "arcee",
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


def gradients(model, layers, samples, *, packs, first=0):
    """The loss of samples in a few micro-batches, and the gradients of all factors."""
    batches = Batches(samples, len(samples), 0, limit=100, packs=packs)
    [*micros] = batches.step(0)
    total, loss = sum(micro.n_trained for micro in micros), 0.0
    for micro in micros:
        below = Below(first, model.states_below(first, micro.tokens, micro.positions)) if first else None
        loss += backward_loss(model, micro.tokens, micro.trained, total, positions=micro.positions, below=below)
    found = {name: (layer.lora_a.grad, layer.lora_b.grad) for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_a.grad = layer.lora_b.grad = None
    return loss / total, found, micros


def some_samples():
    lengths = (23, 11, 9, 3, 2, 17)
    return [
        Sample(
            tuple((7 * n + 5 * at) % 250 for at in range(length)),
            (False, *[at % 3 > 0 for at in range(1, length)]),
            f"{n}",
        )
        for n, length in enumerate(lengths)
    ]


def assert_close(found, expected, layers):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name in layers:
        for mine, other in zip(found[1][name], expected[1][name], strict=True):
            assert other.norm() > 0 and relative(mine, other) <= 1e-5, f"{name}: {relative(mine, other):.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_samples_that_share_a_row_do_not_see_each_other(name):
    model = packed(zoo.gguf_model(name))
    layers = with_loras(model, LoraShape(rank=3, alpha=6))
    alone = [gradients(model, layers, [sample], packs=False) for sample in some_samples()]
    counts = [sample.n_trained for sample in some_samples()]
    found = gradients(model, layers, some_samples(), packs=model.can_pack)
    assert model.can_pack == (name != "bloom"), "transformers' Bloom knows no positions"
    assert any(micro.positions is not None for micro in found[2]) == model.can_pack
    assert sum(micro.tokens.numel() for micro in found[2]) <= 3 * 23 or not model.can_pack
    loss = sum(each[0] * count for each, count in zip(alone, counts, strict=True)) / sum(counts)
    mean = {
        key: tuple(
            sum(each[1][key][part] * count for each, count in zip(alone, counts, strict=True)) / sum(counts)
            for part in (0, 1)
        )
        for key in layers
    }
    assert_close(found, (loss, mean), layers)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kept_states_change_nothing(name, recompute):
    model = packed(zoo.gguf_model(name))
    added = add_loras(model, list(choose_modules(model, ("all",), 1)), LoraShape(rank=3, alpha=6), 3)
    for layer in added.values():
        layer.lora_b.data = 0.1 * torch.randn(layer.lora_b.shape, generator=torch.Generator().manual_seed(1))
    first = len(model.layers) - 1
    assert {model.block_of(each) for each in added} == {first}
    model.recompute(recompute)
    packs = model.can_pack
    expected = gradients(model, added, some_samples(), packs=packs)
    calls = []
    model.layers[0].register_forward_hook(lambda module, given, out: calls.append(type(out)))
    found = gradients(model, added, some_samples(), packs=packs, first=first)
    assert_close(found, expected, added)
    assert "forward" not in vars(model.layers[0])
    assert all("forward" not in vars(layer) for layer in model.layers)
