"""Check that no requirement lets in a version with a known hole that gguflora would open: ``python -m tools.floors``.

pip-audit asks a server; this list needs none. Each entry has its reason, and `tools/check` runs it.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from tools import ROOT

FLOORS = {
    "h11": ("0.16", "CVE-2025-43859: it took malformed chunks, so that one request could hide another"),
    "jinja2": ("3.1.6", "CVE-2025-27516, CVE-2024-56326: chat templates could leave the sandbox"),
    "setuptools": ("78.1.1", "CVE-2025-47273: a name of a package could write outside of its folder"),
    "starlette": ("0.49.1", "CVE-2025-62727: a Range header took time that grows with its square"),
    "torch": ("2.6", "CVE-2025-32434: weights_only ran code from .bin files"),
}
"""The first version without the hole, and what it is."""

NEEDED = {"runtime": ("jinja2",), "server": ("h11", "starlette"), "torch": ("torch",), "train": ("torch",)}
"""Extras that must name a package, because others of their packages bring it in without a floor."""


def problems(text: str) -> list[str]:
    """Return what is wrong with the requirements of a pyproject.toml."""
    project = tomllib.loads(text)
    extras = project["project"]["optional-dependencies"]
    groups = {"build-system": project["build-system"]["requires"], "": project["project"]["dependencies"], **extras}
    found = [problem for group, lines in groups.items() for problem in _too_low(group, lines)]
    for extra, names in NEEDED.items():
        given = {Requirement(line).name.lower() for line in extras[extra]}
        found += [
            f"{extra}: {name}>={FLOORS[name][0]} is missing: {FLOORS[name][1]}" for name in names if name not in given
        ]
    return found


def _too_low(group: str, lines: list[str]) -> Iterator[str]:
    for line in lines:
        requirement = Requirement(line)
        floor, reason = FLOORS.get(requirement.name.lower(), (None, ""))
        lowest = [Version(item.version) for item in requirement.specifier if item.operator in {">=", "=="}]
        if floor is not None and max(lowest, default=Version("0")) < Version(floor):
            yield f"{group or 'dependencies'}: {line} lets in versions before {floor}: {reason}"


def main() -> None:
    """Print the problems, and fail if there are any."""
    found = problems((ROOT / "pyproject.toml").read_text())
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
