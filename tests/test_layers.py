"""Import layers: downwards only, none on one line, no circle inside a package; importing is cheap."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gguflora

PACKAGE = Path(gguflora.__file__).parent
LAYERS = [
    {"errors", "_version"},
    {"system"},
    {"quants"},
    {"files"},
    {"adapters", "architectures"},
    {"placement"},
    {"lora", "merging"},
    {"runtime"},
    {"calibration"},
    {"engine"},
    {"training", "diagnostics"},
    {"server", "pipeline"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
"""From the ground up: a package imports only from the layers below its own, as docs/architecture.md shows."""

LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in MODULES} == set(LAYER_OF)


def test_the_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/up.py").write_text("def f():\n    from gguflora.engine import Engine\n")
    (tmp_path / "lora/beside.py").write_text("import gguflora.merging.plan\n")
    assert violations(tmp_path, Path("lora/up.py")) == ["lora/up.py imports gguflora.engine.Engine"]
    assert violations(tmp_path, Path("lora/beside.py")) == ["lora/beside.py imports gguflora.merging.plan"]


@pytest.mark.parametrize(
    "code",
    [
        "from importlib import import_module\nimport_module('gguflora.engine')\n",
        "from importlib import import_module as load\nHOME = 'gguflora.engine'\nload(HOME)\n",
        "import importlib\ndef f(name):\n    return importlib.import_module(f'gguflora.engine.{name}')\n",
        "__import__('gguflora.engine')\n",
        "HOMES = {'Engine': 'gguflora.engine'}\nget = extras.lazy_face('gguflora.lora', HOMES, 'torch', error)\n",
    ],
)
def test_imports_by_name_count(code: str, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/hidden.py").write_text(code)
    assert violations(tmp_path, Path("lora/hidden.py")) == ["lora/hidden.py imports gguflora.engine"]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path: Path) -> None:
    assert violations(PACKAGE, path) == []


@pytest.mark.parametrize("room", sorted({path.parts[0] for path in MODULES if len(path.parts) > 1}))
def test_no_circle_inside_a_package(room: str) -> None:
    inside = {dotted(path) for path in MODULES if path.parts[0] == room}
    graph = {dotted(path): top_level_imports(path, inside) for path in MODULES if path.parts[0] == room}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


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


@pytest.mark.parametrize("module", ["torch", "llama_cpp", "transformers", "fastapi", "matplotlib", "distributed"])
def test_the_command_line_loads_no_extra(module: str) -> None:
    """Most commands work where only the dependencies are installed."""
    code = f"import sys, gguflora.cli; sys.exit({module!r} in sys.modules)"
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


def test_packages_are_reachable_after_one_import() -> None:
    code = (
        "import gguflora; gguflora.quants.quantize, gguflora.engine.Engine, gguflora.runtime.attach, gguflora.pipeline"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    return ".".join(("gguflora", *path.with_suffix("").parts)).removesuffix(".__init__")


def violations(package: Path, path: Path) -> list[str]:
    own = room_of(path)
    found = []
    for imported in imported_names(package / path):
        other = imported.split(".")[1] if "." in imported else "__init__"
        if other == "_gguflora":
            allowed = path == Path("quants/_lib.py")
        elif own == "__init__":
            allowed = True  # it only says where the public names live
        else:
            # the command line is a user of the public names
            room = other if other in LAYER_OF else "__init__"
            allowed = room == own or LAYER_OF[room] < LAYER_OF[own]
        if not allowed:
            found.append(f"{path} imports {imported}")
    return found


def imported_names(path: Path, *, top_level: bool = False) -> list[str]:
    """Everything of gguflora that a file imports, inside functions, too; of ``from a import b`` both as ``a.b``."""
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gguflora":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "gguflora"]
    return names if top_level else [*names, *names_in_texts(tree)]


def names_in_texts(tree: ast.AST) -> list[str]:
    """The modules that a file names in texts, if it uses a function that imports by name."""
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.name for node in nodes if isinstance(node, ast.alias)}
    if not used & {"import_module", "__import__", "lazy_face"}:
        return []
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text.rstrip(".") for text in texts if re.fullmatch(r"gguflora(\.\w+)+\.?", text)]


def top_level_imports(path: Path, inside: set[str]) -> set[str]:
    """Modules of the same package that a module imports when it is imported."""
    found = set()
    for name in imported_names(PACKAGE / path, top_level=True):
        module = name if name in inside else name.rpartition(".")[0]
        if module in inside and module != dotted(path):
            found.add(module)
    return found
