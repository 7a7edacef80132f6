"""Recognize what a directory holds that is not an adapter, and name the command or directory to use instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from gguflora.errors import FormatError
from gguflora.files.safetensors import read_header

_CONFIG: Final = "adapter_config.json"
_IMAGE: Final = re.compile(
    r"lora_(?:unet|te\d?|transformer|prior)_|(?:unet|text_encoder(?:_2)?|prior)\.|transformer\.(?:single_)?transformer_blocks\.|"
    r"diffusion_model\.|(?:down|up)_blocks\.\d"
)
_MAX_FILES: Final = 64
_OTHERS: Final = {
    r"pytorch_model_fsdp.*|.*\.distcp": "it holds the shards of an FSDP checkpoint: make one file of them with "
    "`accelerate merge-weights {folder} OUT`, or save with the state dict type FULL_STATE_DICT",
    r"zero_to_fp32\.py|global_step\d+": "it holds a DeepSpeed checkpoint: make one file of it with "
    "`python {folder}/zero_to_fp32.py {folder} OUT`",
    r".*\.nemo|run_config\.yaml|model_config\.yaml": "it is a NeMo or Megatron checkpoint: export it to Hugging Face's "
    "PEFT format first",
    r"adapters\.(?:npz|safetensors)": "it holds MLX's weights, but not their scale: write an adapter_config.json with "
    '{{"lora_parameters": {{"scale": NUMBER}}}} beside them, with the scale of the training',
    r"adapter_\d+\.(?:pt|bin|safetensors)": "it is a torchtune checkpoint without its configuration: save it with "
    "torchtune's FullModelHFCheckpointer, which writes PEFT's files",
    r"(?:pytorch_)?model.*\.(?:safetensors|bin)": "it is a whole model, not an adapter: convert it to GGUF, and take "
    "the difference to its base with `gguflora extract`",
}
"""What other directories hold, by a pattern of one of their files; the first match counts."""


def is_image_lora(names: list[str]) -> bool:
    """Whether tensors have the names that kohya's scripts or diffusers give to a LoRA of an image model."""
    return bool(names) and all(_IMAGE.match(name) for name in names)


def describe_wrong_folder(folder: Path) -> str:
    """Return what a directory without ``adapter_config.json`` holds and what to do; an empty string if unknown."""
    entries = sorted(folder.iterdir())[:4096] if folder.is_dir() else []
    below = [entry for entry in entries if entry.is_dir() and (entry / _CONFIG).is_file()]
    if below:
        best = max(below, key=lambda entry: (_number(entry.name), entry.name))
        others = f" (as {len(below) - 1} others do)" if below[1:] else ""
        return f"{best.name}/ in it holds one{others}: give {best}"
    files = [entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()]
    if any(is_image_lora(_tensor_names(file)) for file in files[:_MAX_FILES]):
        return "it is an image model's LoRA (kohya or diffusers), which no language model can use"
    names = [entry.name for entry in entries]
    found = (text for pattern, text in _OTHERS.items() if any(re.fullmatch(pattern, name) for name in names))
    return next(found, "").format(folder=folder)


def _number(name: str) -> int:
    match = re.search(r"(\d{1,18})$", name)
    return int(match[1]) if match else -1


def _tensor_names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return []
    try:
        return list(read_header(file)[0])
    except FormatError:
        return []
