"""Prepare a release: ``python -m tools.release 0.2.0`` sets version and changelog, builds, checks, and tags.

``python -m tools.release notes 0.2.0`` prints the version's part of the changelog.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHANGELOG, VERSION = ROOT / "CHANGELOG.md", ROOT / "gguflora" / "_version.py"


def notes(version: str, text: str) -> str:
    """Return a version's part of the changelog.

    Raises:
        SystemExit: if the changelog has none.
    """
    match = re.search(rf"^## {re.escape(version)} \(.*?\)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise SystemExit(f"error: {CHANGELOG.name} has no section '## {version} (...)'")
    return match[1].strip() + "\n"


def dated(text: str, version: str, day: str) -> str:
    """Return the changelog with its unreleased part as a version of this day.

    Raises:
        SystemExit: if nothing is unreleased.
    """
    found, count = re.subn(r"^## \S+ \(unreleased\)$", f"## {version} ({day})", text, count=1, flags=re.MULTILINE)
    if not count:
        raise SystemExit(f"error: {CHANGELOG.name} has no section that ends with '(unreleased)'")
    return found


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def release(version: str) -> None:
    """Set the version, build and check the packages, commit and tag. Nothing is pushed.

    Raises:
        SystemExit: if the version is none, or the tree has changes.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", version):
        raise SystemExit(f"error: {version!r} is no version, expected one such as 0.2.0")
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True).stdout:
        raise SystemExit("error: the working tree has changes; commit or stash them")
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    CHANGELOG.write_text(dated(CHANGELOG.read_text(encoding="utf-8"), version, day), encoding="utf-8")
    text = re.sub(r'= ".*"', f'= "{version}"', VERSION.read_text(encoding="utf-8"))
    VERSION.write_text(text, encoding="utf-8")
    _run(sys.executable, "-m", "build", "--outdir", f"dist/{version}")
    packages = [str(path) for path in sorted((ROOT / "dist" / version).iterdir())]
    _run(sys.executable, "-m", "twine", "check", "--strict", *packages)
    _run("git", "commit", "--all", "--message", f"Release {version}")
    _run("git", "tag", "--annotate", f"v{version}", "--message", f"gguflora {version}")
    print(f"tagged v{version}; publish it with: git push origin main v{version}")


def main(arguments: list[str]) -> None:
    """Run the command."""
    match arguments:
        case ["notes", version]:
            print(notes(version, CHANGELOG.read_text(encoding="utf-8")), end="")
        case [version]:
            release(version)
        case _:
            raise SystemExit("usage: python -m tools.release VERSION | notes VERSION")


if __name__ == "__main__":
    main(sys.argv[1:])
