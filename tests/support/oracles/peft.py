"""PEFT and torch: merged weights and logits of an adapted model."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from support.oracles import PROMPT
from support.oracles.llama_cpp import convert_model

transformers.utils.logging.disable_progress_bar()


def peft_model(hf_dir: Path, adapter_dir: Path) -> peft.PeftModel:
    """The base in float32 with the adapter read from its files."""
    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, adapter_dir).float().eval()


@cache
def merged_gguf(hf_dir: Path, adapter_dir: Path) -> Path:
    """merge_and_unload in float32, written by convert_hf_to_gguf.py as F32."""
    out = Path(tempfile.mkdtemp(dir=adapter_dir.parent, prefix="merged-"))
    peft_model(hf_dir, adapter_dir).merge_and_unload().save_pretrained(out / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "hf" / name).write_bytes((hf_dir / name).read_bytes())
    return convert_model(out / "hf", out / "merged.gguf")


@cache
def peft_logits(hf_dir: Path, adapter_dir: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """Logits (n_prompt, n_vocab) of the torch model for PROMPT, with the adapter at `scale` if one is given."""
    if adapter_dir:
        model: Any = peft_model(hf_dir, adapter_dir)
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(scale)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, attn_implementation="eager"
        )
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].float().numpy()
