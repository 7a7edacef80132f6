"""BERT's pooler: a layer that llama.cpp leaves out, because embeddings are not taken from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_POOLER: Final = re.compile(r"(?:.*\.)?pooler\.dense\.(?:weight|bias)")


def is_left_out(weight: str) -> bool:
    """Whether no GGUF model has this weight of the Hugging Face model, nor needs it."""
    return _POOLER.fullmatch(weight) is not None


def about_pooler(names: Iterable[str]) -> tuple[str, ...]:
    """What to warn of because of the names of an adapter's tensors."""
    if not any(".pooler.dense." in f".{name}" for name in names):
        return ()
    return ("its changes of pooler.dense are left out: llama.cpp has no pooler",)
