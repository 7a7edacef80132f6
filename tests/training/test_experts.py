"""LoRA on the experts of a layer, against PEFT's ``target_parameters`` and llama.cpp's experts."""

import json

import peft
import pytest
import torch

from gguflora.diagnostics.divergence import kl_divergence
from gguflora.errors import UsageError
from gguflora.training.adapters import LoraExperts, add_loras, choose_modules
from gguflora.training.initial import put_factors
from gguflora.training.options import LoraShape
from gguflora.training.outputs import Trainables, write_folder, write_gguf
from support import zoo
from support.oracles import PROMPT
from support.oracles.llama_cpp import llama_logits
from support.training import our_loss, own_model, packed, pefts_loss, relative

NAMES = ("mixtral", "qwen2moe", "qwen3moe_served", "olmoe", "granitemoe_scaled")
SHAPE = LoraShape(rank=3, alpha=6)


def trained(name, targets=("attention", "experts")):
    """A model with LoRAs of random numbers, also in B."""
    model = packed(zoo.gguf_model(name))
    layers = add_loras(model, list(choose_modules(model, targets, None)), SHAPE, 3)
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        for parameter in layer.parameters_by_name().values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return Trainables(model, layers, SHAPE)


def written(tuned, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_folder(folder, tuned, {name: value.detach().clone() for name, value in tuned.named().items()}, {})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_experts_train_as_pefts_parameters_do(name, tmp_path):
    tuned = trained(name)
    experts = [key for key, layer in tuned.layers.items() if isinstance(layer, LoraExperts)]
    assert len(experts) == len(tuned.model.layers)
    theirs = peft.PeftModel.from_pretrained(own_model(name), written(tuned, tmp_path), is_trainable=True)
    named = {key.replace(".default.", "."): value for key, value in theirs.named_parameters() if "lora_" in key}
    assert named.keys() == tuned.named().keys()
    ours, other = (torch.optim.AdamW(list(group.values()), lr=1e-2) for group in (tuned.named(), named))
    for step in range(3):
        ours.zero_grad()
        other.zero_grad()
        expected = pefts_loss(theirs)
        expected.backward()
        assert abs(our_loss(tuned.model) - expected.item()) <= 1e-5 * (1 + step)
        if step == 0:
            for key, parameter in tuned.named().items():
                assert named[key].grad.norm() > 0
                assert relative(parameter.grad, named[key].grad) <= 1e-5, key
        ours.step()
        other.step()
    for key, parameter in tuned.named().items():
        assert relative(parameter, named[key]) <= 1e-4, key


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_served_as_trained(name, tmp_path):
    tuned = trained(name)
    folder = written(tuned, tmp_path)
    write_gguf(tmp_path / "adapter.gguf", folder, "adapter", tuned.model.packed.base, {})
    with torch.inference_mode():
        found = tuned.model.logits(tuned.model.hidden(torch.tensor([list(PROMPT)])))[0].numpy()
    base = llama_logits(zoo.gguf_model(name))
    served = llama_logits(zoo.gguf_model(name), tmp_path / "adapter.gguf")
    assert kl_divergence(served, found) <= 1e-6 < kl_divergence(base, found)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_go_on_from_experts(kind, tmp_path):
    tuned = trained("qwen3moe_served")
    folder = written(tuned, tmp_path)
    write_gguf(tmp_path / "adapter.gguf", folder, "adapter", tuned.model.packed.base, {})
    model = packed(zoo.gguf_model("qwen3moe_served"))
    layers = add_loras(model, list(tuned.layers), LoraShape(rank=5, alpha=5), 0)
    put_factors(folder if kind == "folder" else tmp_path / "adapter.gguf", model.packed.base, layers)
    tokens = torch.tensor([list(PROMPT)])
    with torch.inference_mode():
        torch.testing.assert_close(model.hidden(tokens), tuned.model.hidden(tokens), rtol=1e-4, atol=1e-5)


def test_experts_are_adapted_only_if_they_are_named(tmp_path):
    model = packed(zoo.gguf_model("olmoe"))
    assert not any(name.endswith("experts") for name in choose_modules(model, ("all",), None))
    config = json.loads((written(trained("olmoe", ("experts",)), tmp_path) / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"][:2] == [f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down")]


@pytest.mark.parametrize("odd", [{"dropout": 0.1}, {"dora": True}, {"init": "pissa"}])
def test_what_experts_cannot_do(odd):
    model = packed(zoo.gguf_model("olmoe"))
    with pytest.raises(UsageError, match="stacked experts"):
        add_loras(model, list(choose_modules(model, ("experts",), None)), LoraShape(3, 6, **odd), 0)
    with pytest.raises(UsageError, match="matches the target 'experts'"):
        choose_modules(packed(zoo.gguf_model("llama")), ("experts",), None)
