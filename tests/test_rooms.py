"""The order of the tests: folders as the packages, what is shared in support/, no test imported by another."""

import ast
from pathlib import Path

import pytest

import gguflora
from support import ROOT, needs

TESTS = ROOT / "tests"
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py") if "corpus" not in path.parts)
PACKAGE = Path(gguflora.__file__).parent
OTHERS = {"support", "corpus", "tools", "docs"}
"""Folders that stand for no package."""


def test_folders_are_the_packages() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - OTHERS <= packages
    assert packages - folders == set()


def test_tests_lie_in_folders() -> None:
    loose = {str(path) for path in FILES if len(path.parts) == 1}
    assert loose == {"conftest.py", "test_layers.py", "test_pickling.py", "test_rooms.py"}
    assert not [path for path in FILES if path.parts[0] == "support" and path.name.startswith("test_")]
    assert not [
        path for path in FILES if path.parts[0] != "support" and not path.name.startswith(("test_", "conftest"))
    ]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_test_is_imported(path: Path) -> None:
    assert imported_tests((TESTS / path).read_text(encoding="utf-8")) == []


def test_the_rule_can_fail() -> None:
    source = (
        "def f():\n    from test_merge import x\nimport merging.test_merge\nfrom merging import test_parts\nimport test"
    )
    assert imported_tests(source) == ["merging.test_merge", "merging.test_parts", "test_merge.x"]


def imported_tests(source: str) -> list[str]:
    """Every import of a test file, inside functions, too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return sorted(name for name in found if any(part.startswith("test_") for part in name.split(".")))


@pytest.mark.parametrize(
    ("file", "marks"),
    [
        ("test_layers.py", set()),
        ("files/test_hostile_gguf.py", set()),
        ("adapters/test_torch_rng.py", {"torch"}),
        ("quants/test_gguf_py.py", set()),
        ("quants/test_quants.py", {"llama"}),
        ("runtime/test_guarded_llama.py", {"torch", "llama", "oracle"}),
    ],
)
def test_markers_follow_imports(file: str, marks: set[str]) -> None:
    assert needs.markers(TESTS / file) == marks
