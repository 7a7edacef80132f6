"""Soft prompts of every method of PEFT, and PEFT's logits with them."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from support import builders, zoo
from support.oracles import PROMPT
from support.workspace import workspace

PROMPT = list(PROMPT)
N_VIRTUAL = 7
CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N_VIRTUAL}
METHODS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**CAUSAL),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**CAUSAL, encoder_hidden_size=48),
    "P_TUNING_LSTM": lambda: peft.PromptEncoderConfig(
        **CAUSAL, encoder_hidden_size=48, encoder_reparameterization_type="LSTM"
    ),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_tasks=3, num_ranks=2),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 70, 81, 90], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 3, 4, 2],
        opt_projection_epsilon=2.0, opt_projection_format_epsilon=2.0,
    ),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**CAUSAL),
    "PREFIX_TUNING_PROJECTED": lambda: peft.PrefixTuningConfig(
        **CAUSAL, prefix_projection=True, encoder_hidden_size=48
    ),
    "CARTRIDGE": lambda: peft.CartridgeConfig(**CAUSAL, num_frozen_tokens=2),
}  # fmt: skip
TASK = {"MULTITASK_PROMPT_TUNING": 2}


@cache
def torch_model(arch: str) -> Any:
    """The base; PEFT leaves its layers as they are where it learns a prompt."""
    if arch not in builders.ARCHITECTURES:
        return zoo.model(arch)
    return transformers.AutoModelForCausalLM.from_pretrained(
        builders.hf_model(arch), dtype=torch.float32, attn_implementation="eager"
    )


def gguf_of(arch: str) -> Path:
    return builders.gguf_model(arch) if arch in builders.ARCHITECTURES else zoo.gguf_model(arch)


@cache
def trained(arch: str, method: str, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """The directory of a random soft prompt, PEFT's logits of the prompt with it, and without."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(torch_model(arch), METHODS[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    folder = workspace() / "soft" / f"{arch}-{method}-{seed}"
    model.save_pretrained(folder)
    return folder, expected(arch, folder, TASK.get(method)), torch_logits(torch_model(arch))


def expected(arch: str, folder: Path, task: int | None = None, prompt: list[int] = PROMPT) -> np.ndarray:
    """PEFT's logits with the adapter read from its files."""
    options = {} if task is None else {"task_ids": torch.tensor([task])}
    return torch_logits(read_by_peft(arch, folder), prompt, **options)


@cache
def read_by_peft(arch: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(torch_model(arch), folder)


def torch_logits(model: Any, prompt: list[int] = PROMPT, **options: Any) -> np.ndarray:
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([prompt]), **options).logits[0]
    return logits.float().numpy()[-len(prompt) :]
