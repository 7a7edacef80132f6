"""Pages and docstrings are written as a native engineer would write them; a short list keeps the worst out."""

import ast
import io
import re
import tokenize

import pytest

from support import ROOT

BANNED = [
    r"\bof which\b",
    r"\bto be had\b",
    r"\bwhatever\b",
    r"\banew\b",
    r"\bthat of which\b",
    r"\bso as to\b",
    r"\bbeing given\b",
    r"\bof its like\b",
    r"(?:^|[.:!?]\s+|\|\s+|#\s*|\"\"\"\s*)Of (?:the|a|an|each|all|its|some|these|those)\b",
    r"^\s*\w+(?: \([^)]*\))?: of (?:the|a|an|each|all|its|some|these|those)\b",
]
"""Regular expressions, by line; the last one is an attribute that is documented by what it is of."""

PLACES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "docs/**/*.py",
        "csrc/**/*.[ch]",
        "csrc/*.md",
        ".github/**/*.yml",
        "tests/docs/*.py",
        "gguflora/**/*.py",
        "tools/**/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.name not in {"CHANGELOG.md", "test_prose.py"}
)
"""What is read."""


def prose_of(path):
    """The lines of a file that are prose: of a page all but code, of a program its docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".c", ".h"}:
        return [line.lstrip(" *") for line in "\n".join(re.findall(r"/\*(.*?)\*/", text, flags=re.S)).splitlines()]
    if path.suffix == ".py":
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return "\n".join([*docstrings, *comments]).splitlines()
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`...`", text).splitlines()


def banned_in(lines):
    return [line.strip() for line in lines if any(re.search(pattern, line) for pattern in BANNED)]


@pytest.mark.parametrize("path", PLACES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_phrase(path):
    assert banned_in(prose_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "two adapters, of which one is loud",
        "where these cannot be had, tests are skipped; no aarch64 cross compiler to be had",
        "under 300 MB, whatever the model",
        "quantized anew",
        "Done. Of the rest nothing is read.",
        "| Of a convolution |",
        '"""Of all tensors."""',
        "    sha256: of the weights' files, in hexadecimal.",
    ],
)
def test_the_list_catches(line):
    assert banned_in([line]) == [line.strip()]


@pytest.mark.parametrize("line", ["the size of the file", "Most of all tensors are copied.", "size: bytes of the file"])
def test_the_list_lets_pass(line):
    assert banned_in([line]) == []


def test_code_is_no_prose(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Run `whatever`:\n\n```sh\nwhatever\n```\n\nof which\n")
    assert banned_in(prose_of(page)) == ["of which"]
    program = tmp_path / "program.py"
    program.write_text('"""Of a file."""\n\nx = "to be had"  # whatever\n')
    assert banned_in(prose_of(program)) == ["Of a file.", "# whatever"]
    source = tmp_path / "source.c"
    source.write_text("/* Of a file. */\nint whatever; /* made\n * anew */\n")
    assert banned_in(prose_of(source)) == ["Of a file.", "anew"]
