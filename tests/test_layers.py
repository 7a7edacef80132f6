"""The house has floors: imports only go downwards, and importing gguflora is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gguflora

PACKAGE = Path(gguflora.__file__).parent
FLOORS = [
    {"errors", "_version"},
    {"_native"},
    {"quants"},
    {"files"},
    {"remote"},
    {"deltas"},
    {"adapters"},
    {"base_model", "imatrix"},
    {"architectures"},
    {"placement"},
    {"changed_rows", "hf_model", "lowrank"},
    {"factors", "rounding", "vocabulary"},
    {"activation", "lora_file", "merge_plan", "merge_report", "prefix", "rewrite", "turn"},
    {"kv_state"},
    {"patch"},
    {"in_place"},
    {"merge_parts", "prepared_merge"},
    {"algebra", "convert", "evaluation", "fuse", "inspect", "llama", "merge", "plots", "preflight", "reuse"},
    {"compare", "runtime"},
    {"demo", "doctor", "engine"},
    {"chat", "pipeline", "server"},
    {"run", "serve"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_every_module_has_a_floor() -> None:
    assert {floor_name(path) for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path: Path) -> None:
    own = floor_name(path)
    for imported in imported_modules(PACKAGE / path):
        other = imported.split(".")[1] if "." in imported else "__init__"
        if other == "_gguflora":
            assert own == "_native", "only _native may import the compiled module"
        elif own == "cli" and other == "__init__":
            continue  # the command line is a user of the public names
        elif other != own:
            assert FLOOR_OF[other] <= FLOOR_OF[own], f"{path} imports {imported}, which is above it"


@pytest.mark.parametrize(
    "module",
    [
        "torch",
        "llama_cpp",
        "transformers",
        "fastapi",
        "gguf",
        "matplotlib",
        "numpy",
        "pydantic",
        "distributed",
        "rich",
        "typer",
    ],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, gguflora; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_import_is_quick() -> None:
    """A good deal quicker than numpy's, which a busy machine slows down as much."""
    seconds = {"gguflora": [], "numpy": []}
    for module in [*seconds] * 4:
        code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
        printed = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True).stdout
        seconds[module].append(float(printed))
    assert min(seconds["gguflora"]) < 0.5 * min(seconds["numpy"])


def test_public_names_are_sorted_and_exist() -> None:
    assert sorted(gguflora.__all__) == gguflora.__all__
    assert all(hasattr(gguflora, name) for name in gguflora.__all__)


def floor_name(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gguflora":
            bare = node.module == "gguflora"
            names += [f"gguflora.{alias.name}" if bare else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "gguflora"]
    return names
