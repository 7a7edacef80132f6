"""An activated LoRA, and prompts with its invocation tokens."""

from functools import cache
from pathlib import Path

import peft

import gguflora
from support import builders
from support.workspace import workspace

INVOCATION = (100, 101, 102)
OTHER = (110, 111)
HEAD, TAIL = tuple(range(40, 56)), tuple(range(60, 68))
ONCE = (*HEAD, *INVOCATION, *TAIL)
TWICE = (*HEAD, *INVOCATION, *TAIL, *INVOCATION, 70, 71)


@cache
def alora(invocation: tuple[int, ...] = INVOCATION, seed: int = 5, arch: str = "llama") -> Path:
    options = (("task_type", "CAUSAL_LM"), ("alora_invocation_tokens", list(invocation)))
    spec = builders.Adapter(targets=builders.ARCHITECTURES[arch].linear, seed=seed)
    folder = workspace() / f"alora-{arch}-{seed}-{'-'.join(map(str, invocation))}"
    config = peft.LoraConfig(target_modules=list(spec.targets), r=4, lora_alpha=8, **dict(options))
    return builders.make_adapter(builders.hf_model(arch), folder, config, spec)


@cache
def alora_gguf(invocation: tuple[int, ...] = INVOCATION, seed: int = 5, arch: str = "llama") -> Path:
    """By gguflora: llama.cpp's converter knows no aLoRA that PEFT writes for these modules."""
    folder = alora(invocation, seed, arch)
    gguflora.convert(folder, builders.gguf_model(arch), folder.with_suffix(".gguf"), force=True)
    return folder.with_suffix(".gguf")
