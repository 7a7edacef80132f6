"""A pytest plugin: what a test file imports says which packages its tests need.

Its tests get the marker `torch`, `llama` or `oracle` for it, and where a package is missing the file is skipped before
it is imported. So a first contribution needs neither torch nor llama.cpp: ``pytest -m "not torch and not llama"``.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import ROOT

PACKAGES = {
    "torch": "torch", "transformers": "torch", "peft": "torch", "tokenizers": "torch", "llama_cpp": "llama",
    "sentencepiece": "torch",
    **dict.fromkeys(("distributed", "fastapi", "fsspec", "httpx", "hypothesis", "llguidance", "matplotlib")),
    **dict.fromkeys(("moto", "openai", "playwright", "prometheus_client", "pydantic", "scipy", "uvicorn", "yaml")),
}  # fmt: skip
"""Packages that not everybody has, and the marker of tests that need them."""

CONVERTERS = "support.oracles.llama_cpp"
"""The module behind which llama.cpp's converters stand."""

UNSEEN = {"support.oracles.libggml": "llama_cpp"}
"""Modules that need a package without importing it: this one opens a library that lies in it."""


@cache
def needs(path: Path) -> frozenset[str]:
    """The modules that importing a file imports, as far as they are listed above, through others, too."""
    return frozenset(name for name in _reached(path) if name in PACKAGES or name == CONVERTERS)


def markers(path: Path) -> set[str]:
    """The markers of a file's tests."""
    found = {PACKAGES.get(name, "oracle") for name in needs(path)}
    return {marker for marker in found if marker}


def missing(path: Path) -> list[str]:
    """The packages that a file imports and that are not installed."""
    return sorted(name for name in needs(path) if name in PACKAGES and find_spec(name) is None)


def _reached(path: Path) -> set[str]:
    names, waiting, seen = set[str](), [path], {path}
    while waiting:
        for name in _imported(waiting.pop()):
            names |= {name, name.split(".")[0], UNSEEN.get(name, name)}
            for found in _sources(name):
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
    return names


@cache
def _imported(path: Path) -> tuple[str, ...]:
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")).body))


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """What runs when a module is imported; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _imports([*node.body, *node.orelse])


def _sources(name: str) -> Iterator[Path]:
    """The files of a dotted name: the module's, and those of the packages above it."""
    parts = name.split(".")
    if parts[0] not in {"gguflora", "support", "tools"}:
        return
    root = ROOT / "tests" if parts[0] == "support" else ROOT
    for length in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:length])
        yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


class SkippedFile(pytest.File):
    """A test file that cannot be imported here."""

    def collect(self) -> Iterator[pytest.Item]:
        """Skip it."""
        pytest.skip(f"needs {', '.join(missing(self.path))}")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Skip a file that needs what is not installed."""
    return SkippedFile.from_parent(parent, path=module_path) if missing(module_path) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by what its file imports."""
    for marker in markers(item.path):
        item.add_marker(marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is marked by hand where its package is missing."""
    for marker, package in (("torch", "torch"), ("llama", "llama_cpp")):
        if item.get_closest_marker(marker) and find_spec(package) is None:
            pytest.skip(f"needs {package}")
