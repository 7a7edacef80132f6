"""One contestant of ``python -m tools.bench train``, in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gguflora.files.strict_json import to_json
from gguflora.system.processes import peak_memory
from gguflora.training.adapters import add_loras, choose_modules
from gguflora.training.loss import backward_loss
from gguflora.training.memory import return_memory_early
from gguflora.training.model import PackedModel
from gguflora.training.options import LoraShape
from gguflora.training.packed import PackedBase

RANK, ALPHA = 16, 32


def ours(path: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """A step on the packed weights."""
    return_memory_early()
    model = PackedModel(PackedBase(path))
    layers = add_loras(model, list(choose_modules(model, ("all",), None)), LoraShape(RANK, ALPHA), 0)
    model.recompute(True)
    optimizer = torch.optim.AdamW([p for layer in layers.values() for p in layer.parameters()], lr=1e-4)
    learned = torch.ones_like(tokens, dtype=torch.bool)
    count = tokens[:, 1:].numel()

    def step() -> float:
        loss = float(backward_loss(model, tokens, learned, count) / count)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def peft(path: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """A step of a loop as one writes it by hand: PEFT on the dequantized weights in 32 bits, blocks recomputed, too."""
    return _peft_step(_dequantized(path), tokens)


def bnb(path: Path, tokens: torch.Tensor) -> Callable[[], float]:
    """The same with bitsandbytes' NF4 in place of the floats, computed in 32 bits: what QLoRA is on a processor."""
    import bitsandbytes  # type: ignore[import-not-found]

    model = _dequantized(path)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.float32, quant_type="nf4"
            )
            layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.bias = module.bias
            model.set_submodule(name, layer.to("cpu"))
    return _peft_step(model, tokens)


def _peft_step(model: Any, tokens: torch.Tensor) -> Callable[[], float]:
    from peft import LoraConfig, get_peft_model

    return_memory_early()
    adapted: Any = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _dequantized(path: Path) -> Any:
    """Transformers' model with the file's weights as floats."""
    import numpy as np
    import transformers

    packed = PackedModel(PackedBase(path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(packed.config, attn_implementation="sdpa")
    model = model.to_empty(device="cpu").float()
    for name, module in packed.module.named_modules():
        target = model.get_submodule(name)
        if hasattr(module, "matrix"):
            target.weight.data = module.matrix.rows(np.arange(module.matrix.n_out))
        for own, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if hasattr(target, own) and value is not None:
                getattr(target, own).data = value.detach().clone()
    model.tie_weights()
    return model


def main() -> None:
    """``CONTESTANT FILE TOKENS STEPS``: prints CPU seconds of the quickest step, bytes at most, and the losses."""
    name, path, count, steps = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = torch.randint(300, 2000, (1, int(count)), generator=torch.Generator().manual_seed(0))
    step = {"ours": ours, "peft": peft, "bnb": bnb}[name](Path(path), tokens)
    seconds, losses = [], []
    for _ in range(int(steps)):
        started = time.process_time()
        losses.append(step())
        seconds.append(time.process_time() - started)
    print(to_json({"cpu": min(seconds), "memory": peak_memory(), "losses": losses}))


if __name__ == "__main__":
    main()
