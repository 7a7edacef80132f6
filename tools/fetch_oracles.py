"""Fetch llama.cpp's converters, the oracle of the tests, from the sdist of the llama-cpp-python that is installed.

The wheel has the libraries but not `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`; the sdist has both. Run this
with the Python of the test environment. It prints the directory that holds them; a second run finds them there.
The environment variable GGUFLORA_LLAMA_CPP_SDIST names an unpacked sdist and saves the download.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path, PurePosixPath

SCRIPTS = PurePosixPath("vendor/llama.cpp")
WANTED = (
    "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE", "src/llama-arch.cpp",
    "src/llama-context.cpp",
)  # fmt: skip


SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Checksums of the sdists; an archive of a version that is missing here is refused."""


def cache_dir() -> Path:
    """The directory that belongs to the installed version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gguflora" / f"llama-cpp-python-{version('llama-cpp-python')}"


def is_wanted(member: tarfile.TarInfo) -> bool:
    """True for regular files below the few paths the tests use (the first part is the sdist's own directory)."""
    inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
    return member.isfile() and any(inside.is_relative_to(SCRIPTS / wanted) for wanted in WANTED)


def fetch(target: Path, is_wanted: Callable[[tarfile.TarInfo], bool] = is_wanted) -> None:
    """Download the sdist with pip and put its converters (or what else is wanted) into `target`, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = f"llama-cpp-python=={version('llama-cpp-python')}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", scratch, requirement], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256.get(version("llama-cpp-python")):
            sys.exit(f"error: {archive.name} has the SHA-256 {found}, which tools/fetch_oracles.py does not list")
        unpacked = Path(scratch, "unpacked")
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, members=filter(is_wanted, tar), filter="data")
        (top,) = unpacked.iterdir()
        top.rename(target)


def main() -> None:
    """Print the directory of the sdist, after fetching it if it is missing."""
    named = os.environ.get("GGUFLORA_LLAMA_CPP_SDIST")
    target = Path(named) if named else cache_dir()
    missing = [path for path in (target / SCRIPTS / name for name in WANTED) if not path.exists()]
    if missing and not named:  # never fetched, or by an older version that wanted less
        shutil.rmtree(target, ignore_errors=True)
        fetch(target)
    elif missing:
        sys.exit(f"error: {missing[0]} is missing: is {target} an unpacked llama-cpp-python sdist?")
    print(target)


if __name__ == "__main__":
    main()
