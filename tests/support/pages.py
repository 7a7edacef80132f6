"""The pages of the documentation: fenced blocks, sessions in a shell, and the demo's files to run them on."""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gguflora.diagnostics import demo
from support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^ *```$", re.M | re.S
)
_COMMAND = re.compile(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that its title names, and its text."""

    page: str
    language: str
    title: str | None
    text: str


def blocks(page, language=None):
    """The blocks of a page, given as ``README.md`` or ``docs/server.md``; of one language, or all."""
    found = _blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
    return [block for block in found if language in {None, block.language}]


def sections(page):
    """The blocks of a page by the second-level heading above them."""
    parts = re.split(r"^## (.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
    return {title: _blocks_of(page, text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def _blocks_of(page, text):
    return [Block(page, match["language"], match["title"], match["text"]) for match in _BLOCK.finditer(text)]


def texts(page, language):
    """The texts of a page's blocks of one language that are no files."""
    return [block.text for block in blocks(page, language) if block.title is None]


def commands(session):
    """The commands of a session, each with what it prints."""
    return _COMMAND.findall(session)


def put_demo_files(folder):
    """The demo's model and adapters, under the names that the pages use."""
    for name in ("base.gguf", *demo.ADAPTERS):
        source = demo.HERE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)


def put_titled_files(page, folder):
    """The files that a page shows whole."""
    for block in blocks(page):
        if block.title is not None:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text, encoding="utf-8")


def put_commands(folder: Path) -> Path:
    """A folder for PATH in which ``gguflora`` and ``python`` are those of this interpreter."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name, arguments in (("gguflora", "-P -m gguflora"), ("python", "-P")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (binaries / name).chmod(0o755)
    return binaries
