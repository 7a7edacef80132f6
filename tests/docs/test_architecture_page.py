"""docs/architecture.md tells of the packages and modules that are there."""

import ast
import re
from pathlib import Path

import gguflora
from support import ROOT
from support.pages import texts

PAGE = ROOT / "docs/architecture.md"
BLOCKS = texts("docs/architecture.md", "text")
PACKAGE = Path(gguflora.__file__).parent


def test_layers():
    """From the top down, those of test_layers.py that there are."""
    tree = ast.parse((ROOT / "tests/test_layers.py").read_text())
    [layers] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS"]
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in {"", ".py"}}
    held = [names & rooms - {"__main__"} for names in ast.literal_eval(layers)]
    assert [set(line.split()) for line in BLOCKS[0].splitlines()] == [names for names in reversed(held) if names]


def test_every_package_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.M))
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= rows


def test_data_flows_name_modules():
    named = re.findall(r"\b(\w+/\w+\.py)\b", "".join(BLOCKS[1:]))
    assert len(named) > 30
    for path in named:
        assert (PACKAGE / path).exists(), path


def test_the_three_questions_have_an_answer():
    """Each in a paragraph that names the files."""
    text = PAGE.read_text()
    for question in (
        "Q4_K stochastic rounding", "Which llama.cpp tensors a LoRA may touch", "What an HTTP request becomes",
    ):  # fmt: skip
        [answer] = re.findall(rf"^\*\*{re.escape(question)}\.\*\* .*?\n\n", text, flags=re.M | re.S)
        assert re.search(r"`(?:gguflora|csrc)/[\w/]+\.\w+`", answer)
    [codec] = [path for path in (ROOT / "csrc/kernels").glob("*.h") if "codes_Q4_K(" in path.read_text()]
    assert f"csrc/kernels/{codec.name}" in text
