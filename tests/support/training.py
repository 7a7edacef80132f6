"""Models for the tests of training: what we build on packed weights, and PEFT's on the same weights as floats."""

from pathlib import Path

import numpy as np
import peft
import torch

from gguflora.training.adapters import add_loras, choose_modules
from gguflora.training.loss import backward_loss
from gguflora.training.model import PackedModel
from gguflora.training.options import LoraShape
from gguflora.training.packed import PackedBase
from support import zoo

TOKENS = [[256, 72, 101, 30, 40, 50, 200, 21, 7, 90, 33, 65], [256, 3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]]
TRAINED = [[False] * 4 + [True] * 8, [False] * 6 + [True] * 6]


def packed(path: Path) -> PackedModel:
    return PackedModel(PackedBase(path))


def with_loras(model: PackedModel, shape: LoraShape, targets=("all",), seed: int = 3):
    """LoRAs of random numbers, also in B."""
    layers = add_loras(model, list(choose_modules(model, targets, None)), shape, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        for parameter in (layer.lora_a, layer.lora_b):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.1 * torch.randn(layer.magnitude.shape, generator=generator)
    return layers


def in_peft(model, layers, shape: LoraShape):
    """PEFT's model on transformers' own, with the same factors."""
    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, target_modules=list(layers), use_rslora=shape.rslora, use_dora=shape.dora,
        lora_dropout=shape.dropout,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    for name, layer in layers.items():
        other = adapted.base_model.model.get_submodule(name)
        other.lora_A["default"].weight.data = layer.lora_a.detach().clone()
        other.lora_B["default"].weight.data = layer.lora_b.detach().clone()
        if layer.magnitude is not None:
            other.lora_magnitude_vector["default"].weight.data = layer.magnitude.detach().clone()
    return adapted


def pefts_parameters(adapted, name: str):
    other = adapted.base_model.model.get_submodule(name)
    magnitude = [other.lora_magnitude_vector["default"].weight] if "default" in other.lora_magnitude_vector else []
    return [other.lora_A["default"].weight, other.lora_B["default"].weight, *magnitude]


def our_parameters(layer):
    return [p for p in (layer.lora_a, layer.lora_b, layer.magnitude) if p is not None]


def pefts_loss(adapted) -> torch.Tensor:
    """Mean cross entropy of the trained tokens, by transformers' own loss."""
    tokens = torch.tensor(TOKENS)
    labels = torch.where(torch.tensor(TRAINED), tokens, -100)
    return adapted(input_ids=tokens, labels=labels, use_cache=False).loss


def our_loss(model: PackedModel, slice_size: int = 5) -> float:
    """The same with its gradients."""
    count = int(np.array(TRAINED).sum())
    return backward_loss(model, torch.tensor(TOKENS), torch.tensor(TRAINED), count, slice_size=slice_size) / count


def assert_trains_as_peft(model: PackedModel, layers, adapted, steps: int = 3) -> None:
    """Loss, gradients of every factor, and steps of AdamW."""
    ours = torch.optim.AdamW([p for layer in layers.values() for p in our_parameters(layer)], lr=1e-2)
    theirs = torch.optim.AdamW([p for name in layers for p in pefts_parameters(adapted, name)], lr=1e-2)
    for step in range(steps):
        ours.zero_grad()
        theirs.zero_grad()
        expected = pefts_loss(adapted)
        expected.backward()
        assert abs(our_loss(model) - expected.item()) <= 1e-5 * (1 + step), f"loss in step {step}"
        if step == 0:
            assert_same_gradients(layers, adapted)
        ours.step()
        theirs.step()
    for name, layer in layers.items():
        for mine, other in zip(our_parameters(layer), pefts_parameters(adapted, name), strict=True):
            assert relative(mine, other) <= 1e-4, f"{name} after {steps} steps"


def assert_same_gradients(layers, adapted) -> None:
    for name, layer in layers.items():
        for mine, other in zip(our_parameters(layer), pefts_parameters(adapted, name), strict=True):
            assert other.grad.norm() > 0, f"{name} has no gradient"
            assert relative(mine.grad, other.grad) <= 1e-5, f"gradient of {name}: {relative(mine.grad, other.grad):.1e}"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.detach() - expected.detach()).norm() / expected.detach().norm()).item()


def own_model(name: str):
    """transformers' model with the weights that the GGUF file of the zoo was converted from."""
    return zoo.model(name)
