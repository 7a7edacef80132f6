"""Each example of docs/extending.md, applied to a copy of the tree, does there what the page says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import pytest

import gguflora
from support import ROOT
from support.pages import commands, put_demo_files, sections

PARTS = sections("docs/extending.md")
METHOD, ARCHITECTURE, TYPE, COMMAND = PARTS


@pytest.fixture
def tree(tmp_path):
    """A copy of what the examples change, with the compiled extension."""
    copy = tmp_path / "tree"
    for name in ("gguflora", "tests", "csrc", "tools", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, copy)
    [extension] = Path(gguflora.__file__).parent.glob("_gguflora*.so")
    shutil.copy(extension, copy / "gguflora")
    return copy


def python(tree, *arguments, **options):
    """Python in the copy, whose gguflora it imports."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, **options)


def passes(tree, *arguments):
    """Whether these tests pass in the copy; none at all is an error."""
    done = python(tree, "-m", "pytest", "-p", "no:cacheprovider", "-x", *arguments)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.returncode == 0, done.stdout


def apply(tree, part, *, reverse=False, below=""):
    """Write the new files of a section, and change others as its diffs say."""
    for block in PARTS[part]:
        if block.title is None or not block.title.startswith(below):
            continue
        path = tree / block.title
        if block.language == "diff":
            path.write_text(changed(path.read_text(), block.text, reverse=reverse))
        else:
            assert not path.exists()
            path.write_text(block.text)


def changed(text, diff, *, reverse=False):
    """A text with the hunks of a diff applied; each one's old lines occur once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M):
        lines = [" \n" if line == "\n" else line for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        old, new = (new, old) if reverse else (old, new)
        assert text.count(old) == 1, f"these lines occur {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def assert_clean(tree, *parts):
    """New and changed files are as ruff wants all files here."""
    files = [block.title for part in parts for block in PARTS[part] if block.title and block.title.endswith(".py")]
    for words in (["format", "--check"], ["check", "--no-cache"]):
        done = python(tree, "-m", "ruff", *words, "--config", ROOT / "pyproject.toml", *files)
        assert done.returncode == 0, done.stdout + done.stderr


LLAMA_QUANTIZE = ("presets.py:", "mixture.py:")
"""Tables of llama-quantize, which name all its types."""


def mentions(tree, pattern):
    """Lines of code in which a pattern occurs, comments in C aside."""
    found = []
    for folder, files in (("gguflora", "*.py"), ("csrc", "*")):
        for path in (tree / folder).rglob(files):
            if path.is_file():
                code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S) if folder == "csrc" else path.read_text()
                found += [f"{path.name}: {line}" for line in code.splitlines() if re.search(pattern, line)]
    return found


@pytest.mark.parametrize("part", PARTS)
def test_diffs_fit_the_tree(part):
    """A page that lags behind is seen at once; the architecture and the quant type are in the tree."""
    for block in PARTS[part]:
        if block.language == "diff":
            changed((ROOT / block.title).read_text(), block.text, reverse=part in {ARCHITECTURE, TYPE})


@pytest.mark.slow
def test_a_peft_method(tree):
    """It is not known before, and computes as torch does afterwards."""
    [test] = [block.title for block in PARTS[METHOD] if block.title and block.title.startswith("tests/")]
    apply(tree, METHOD, below="tests/")
    before, said = passes(tree, test)
    assert not before
    assert "peft_type LORA_XS is not supported" in said
    apply(tree, METHOD, below="gguflora/")
    assert_clean(tree, METHOD)
    after, said = passes(tree, test)
    assert after, said


@pytest.mark.slow
def test_an_architecture(tree):
    """Without what the page shows nothing of it is left, and the converter disagrees; with it the tree is whole."""
    original = {path: path.read_bytes() for path in tree.rglob("*.py")}
    oracle = ["tests/architectures/test_architectures.py", "-k", "nemotron and (checkpoints or modules)"]
    apply(tree, ARCHITECTURE, reverse=True, below="gguflora/")
    left = [line for line in mentions(tree, r"\bnemotron\b") if not line.startswith("configs.py")]  # of training
    assert left == []
    before, said = passes(tree, *oracle)
    assert not before
    assert "AssertionError" in said
    apply(tree, ARCHITECTURE, below="gguflora/")
    assert {path: path.read_bytes() for path in original} == original
    after, said = passes(tree, *oracle)
    assert after, said
    apply(tree, ARCHITECTURE, reverse=True, below="tests/")  # what it shows of the tests is there


@pytest.mark.slow
def test_a_quant_type(tree):
    """Without what the page shows the kernels compile and do not name it; with it they are ggml's, built there."""
    original = {path: path.read_bytes() for path in (tree / "csrc").rglob("*") if path.is_file()}
    apply(tree, TYPE, reverse=True, below="csrc/")
    named = mentions(tree, r"(?<![A-Za-z])[Qq]2_0(?!\w)")
    assert [line for line in named if not line.startswith(LLAMA_QUANTIZE)] == []
    sources = [*sorted((tree / "csrc").glob("*.c")), tree / "csrc/isa/scalar.c"]
    command = ["gcc", "-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{tree / 'csrc'}", *sources]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    apply(tree, TYPE, below="csrc/")
    assert {path: path.read_bytes() for path in original} == original
    built = python(tree, "tools/build_backend.py", "--inplace")
    assert built.returncode == 0, built.stderr
    passed, said = passes(
        tree, "tests/quants/test_quants.py", "tests/quants/test_dither.py", "-k", "Q2_0 and not TQ2_0"
    )
    assert passed, said
    apply(tree, TYPE, reverse=True, below="tests/")  # what it shows of the tests is there


@pytest.mark.slow
def test_a_command(tree, tmp_path):
    """`--help` lists it, text and JSON have gguf's own numbers, and the tests of all commands take it."""
    apply(tree, COMMAND)
    assert_clean(tree, COMMAND)
    put_demo_files(tmp_path)
    [session] = [block.text for block in PARTS[COMMAND] if block.language == "console"]
    [(command, expected)] = commands(session)
    _, name, *arguments = shlex.split(command)
    known = python(tree, "-m", "gguflora", "--help")
    assert re.search(rf"\b{name}\b.*Say how many weights", known.stdout)
    assert "gguflora sizes model-Q4_K_M.gguf" in python(tree, "-m", "gguflora", name, "--help").stdout
    base = tmp_path / arguments[0]
    assert python(tree, "-m", "gguflora", name, base).stdout == expected
    weights, size = Counter(), Counter()
    for tensor in gguf.GGUFReader(base).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
        size[tensor.tensor_type.name] += int(tensor.n_bytes)
    found = json.loads(python(tree, "-m", "gguflora", name, base, "--json").stdout)
    assert found == {"base": str(base), "weights": dict(weights), "bytes": dict(size)}
    selection = f"every_command or ({name} and (keywords or frozen or usage or errors))"
    passed, said = passes(tree, "tests/cli/test_scripting.py", "-k", selection)
    assert passed, said
    passed, said = passes(tree, "tests/test_layers.py", "-k", "public or has_a_layer or sizes or circle or heavy")
    assert passed, said
