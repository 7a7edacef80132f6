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
    from gguf import GGMLQuantizationType as Kind
    from transformers import LlamaConfig, LlamaForCausalLM

    from tools import demo_text, make_demo

    home = folder / f"small-llama-{steps}-{adapter_steps}"
    if (home / ADAPTERS[-1] / "adapter_model.safetensors").exists():
        return home
    print(f"training a llama of 5 M weights and two adapters, some minutes; kept in {home}", flush=True)
    torch.manual_seed(make_demo.SEED)
    config = LlamaConfig(**make_demo.CONFIG.to_dict() | {"num_hidden_layers": 6, "intermediate_size": 768})
    model, tokenizer = LlamaForCausalLM(config), make_demo.train_tokenizer()
    texts = demo_text.samples(make_demo.BASE_MIX, Random(make_demo.SEED))
    data = make_demo.batches(tokenizer, texts, 24, answers_only=False)
    make_demo.train(model, data, steps, rate=2e-3, decay=0.05)
    home.mkdir(parents=True, exist_ok=True)
    make_demo.write_base(model, tokenizer, home / "F32.gguf", "gguflora bench", Kind.F32)
    make_demo.train_adapters(model, tokenizer, adapter_steps, home)
    return home
