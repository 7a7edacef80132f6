"""The built-in text that models are calibrated on: prose, dialogue, instructions, code, tables, several languages."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def built_in_text() -> str:
    """Return the text: more than 4096 tokens with the usual vocabularies. No evaluation of gguflora uses it."""
    return (files("gguflora.calibration") / "text.txt").read_text(encoding="utf-8")
