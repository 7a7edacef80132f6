"""Compile the C sources for other systems with the clang of ``ziglang`` (a package of PyPI), and show its warnings.

    python -m tools.cross                            # all targets
    python -m tools.cross aarch64-macos              # some

Nothing is linked with Python or run: this shows that a compiler for that system takes the sources without a warning.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (
    "x86_64-linux-gnu",
    "x86_64-linux-musl",
    "aarch64-linux-gnu",
    "aarch64-linux-musl",
    "aarch64-macos",
    "x86_64-macos",
    "x86_64-windows-gnu",
)


def has_zig() -> bool:
    """Whether the compiler is installed."""
    return importlib.util.find_spec("ziglang") is not None


def compile_for(target: str, folder: Path, flags: Iterable[str] = ()) -> dict[str, str]:
    """Compile all C sources for a target.

    Args:
        target: one of ``TARGETS``.
        folder: where the object files go.
        flags: more flags of the compiler, after those of pyproject.toml.

    Returns:
        What the compiler said about each source that it did not take silently.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extension = settings["tool"]["setuptools"]["ext-modules"][0]
    sources = [source for source in extension["sources"] if source.startswith("csrc/")]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *extension["extra-compile-args"], *flags]

    def compile_one(source: str) -> str:
        output = folder / f"{source.replace('/', '-')}.o"
        arguments = [f"-I{ROOT / 'csrc'}", "-c", str(ROOT / source), "-o", str(output)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        return done.stderr or ("" if done.returncode == 0 else f"exit status {done.returncode}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = zip(sources, pool.map(compile_one, sources), strict=True)
        return {source: answer for source, answer in answers if answer}


def main(targets: list[str]) -> int:
    """Compile for each target and return the exit status."""
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        print(f"unknown target {', '.join(unknown)}; expected {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if not has_zig():
        print("tools.cross needs the package ziglang: pip install ziglang", file=sys.stderr)
        return 2
    bad = 0
    for target in targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            said = compile_for(target, Path(folder))
        print(f"{target}: {f'{len(said)} sources with warnings or errors' if said else 'clean'}", flush=True)
        print(*said.values(), sep="", end="", file=sys.stderr)
        bad += bool(said)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
