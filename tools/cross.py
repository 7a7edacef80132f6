"""Compile the C sources for other systems with the clang of ``ziglang`` (a package of PyPI), and show its warnings.

    python -m tools.cross                            # all targets
    python -m tools.cross aarch64-macos              # some
    python -m tools.cross --wheel x86_64-linux-musl dist

Nothing is linked with Python or run: this shows that a compiler for that system takes the sources without a warning.
``--wheel`` builds a wheel for another Linux; it needs to be tried there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
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
WHEELS = {
    f"{machine}-linux-{libc}": (f"{machine}-linux-{libc}{version}", f"{tag}_{machine}")
    for machine in ("x86_64", "aarch64")
    for libc, version, tag in (("gnu", ".2.17", "manylinux_2_17"), ("musl", "", "musllinux_1_2"))
}
"""What zig calls each target of a wheel, with the oldest version of glibc, and the platform in the wheel's name."""


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


def build_wheel(target: str, folder: Path) -> Path:
    """Build a wheel for a target and return its path.

    Args:
        target: one of ``WHEELS``.
        folder: where the wheel goes.

    Raises:
        subprocess.CalledProcessError: if pip cannot build it.
    """
    package = importlib.util.find_spec("ziglang")
    assert package and package.origin, "has_zig() is true"
    zig_target, platform = WHEELS[target]
    compiler = f"{Path(package.origin).with_name('zig')} cc -target {zig_target}"
    environment = os.environ | {"CC": compiler, "LDSHARED": f"{compiler} -shared", "CFLAGS": "", "LDFLAGS": ""}
    with tempfile.TemporaryDirectory() as fresh:
        source = Path(fresh) / "source"  # setuptools keeps object files of other targets in the checkout
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__"))
        option = f"--config-settings=--build-option=--plat-name={platform}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            option,
            "--wheel-dir",
            fresh,
            str(source),
        ]
        subprocess.run(command, env=environment, check=True)
        built = next(Path(fresh).glob("*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(built, folder / built.name))


def main(arguments: list[str]) -> int:
    """Compile for each target, or build a wheel for one, and return the exit status."""
    match arguments:
        case ["--wheel", target, _] if target in WHEELS:
            pass
        case ["--wheel", *_]:
            print(f"usage: python -m tools.cross --wheel {{{','.join(WHEELS)}}} FOLDER", file=sys.stderr)
            return 2
        case _ if unknown := sorted(set(arguments) - set(TARGETS)):
            print(f"unknown target {', '.join(unknown)}; expected {', '.join(TARGETS)}", file=sys.stderr)
            return 2
    if not has_zig():
        print("tools.cross needs the package ziglang: pip install ziglang", file=sys.stderr)
        return 2
    if arguments[:1] == ["--wheel"]:
        print(build_wheel(arguments[1], Path(arguments[2])))
        return 0
    return _compile_all(arguments or TARGETS)


def _compile_all(targets: Iterable[str]) -> int:
    bad = 0
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            said = compile_for(target, Path(folder))
        print(f"{target}: {f'{len(said)} sources with warnings or errors' if said else 'clean'}", flush=True)
        print(*said.values(), sep="", end="", file=sys.stderr)
        bad += bool(said)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
