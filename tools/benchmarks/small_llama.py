"""A small llama and two LoRA adapters, trained in some minutes with the text and the code of ``tools/make_demo.py``."""

from __future__ import annotations

from pathlib import Path
from random import Random

ADAPTERS = ("shout", "verse")
SAMPLES = 240
"""Held-out samples of each adapter."""


def trained(folder: Path, *, steps: int = 1000, adapter_steps: int = 200) -> Path:
    """The directory with ``F32.gguf`` and the adapters; trained unless it is there.

    Every row is a multiple of 256, the super-block of the K-quants.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools import make_demo as demo

    home = folder / f"small-llama-{steps}-{adapter_steps}"
    if (home / ADAPTERS[-1] / "adapter_model.safetensors").exists():
        return home
    print(f"training a llama of 5 M weights and two adapters, some minutes; kept in {home}", flush=True)
    torch.manual_seed(demo.SEED)
    config = LlamaConfig(**demo.CONFIG.to_dict() | {"num_hidden_layers": 6, "intermediate_size": 768})
    model, tokenizer = LlamaForCausalLM(config), demo.train_tokenizer()
    data = demo.batches(tokenizer, demo.samples(demo.BASE_MIX, Random(demo.SEED)), 24, answers_only=False)
    demo.train(model, data, steps, rate=2e-3, decay=0.05)
    home.mkdir(parents=True, exist_ok=True)
    demo.write_base(model, tokenizer, home / "F32.gguf", "gguflora bench", demo.Kind.F32)
    demo.train_adapters(model, tokenizer, adapter_steps, home)
    return home
