"""The scripts in ``tools/`` that have no ``.py`` in their name, as modules."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parent.parent


@cache
def load_script(name: str) -> ModuleType:
    """The script ``tools/<name>`` as a module."""
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(TOOLS / name)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
