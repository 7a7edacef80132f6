"""BERT's pooler, which GGUF files do not have because llama.cpp does not compute embeddings with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_POOLER: Final = re.compile(r"(?:.*\.)?pooler\.dense\.(?:weight|bias)")


def is_left_out(weight: str) -> bool:
    """Whether a Hugging Face weight belongs to the pooler, so that GGUF files do not have it."""
    return _POOLER.fullmatch(weight) is not None


def pooler_warnings(names: Iterable[str]) -> tuple[str, ...]:
    """Return a warning if tensors of an adapter belong to the pooler, given the names of all tensors."""
    if not any(".pooler.dense." in f".{name}" for name in names):
        return ()
    return ("its changes of pooler.dense are left out: llama.cpp has no pooler",)
