"""llama.cpp's own tools, built from the sdist of the llama-cpp-python that is installed: gguflora's peers."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tools import fetch_oracles

TOOLS = ("llama-export-lora", "llama-quantize")
OFF = (
    *("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_CURL", "LLAMA_USE_PREBUILT_UI"),
    *(f"LLAMA_BUILD_{part}" for part in ("TESTS", "EXAMPLES", "APP", "UI")),
)


def llama_cpp_tools(*tools: str) -> Path:
    """The directory with ``tools``; the first time they are built, for this processor, with its every instruction."""
    tools = tools or TOOLS
    home = fetch_oracles.cache_dir().with_name(f"llama.cpp-tools-{version('llama-cpp-python')}")
    if all((home / tool).exists() for tool in tools):
        return home
    print(f"building {' and '.join(tools)}, ten minutes or more; kept in {home}", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        named = os.environ.get("GGUFLORA_LLAMA_CPP_SDIST")
        sdist = Path(named) if named else Path(scratch, "sdist")
        if not named:
            fetch_oracles.fetch(sdist, tarfile.TarInfo.isfile)
        _build(sdist / fetch_oracles.SCRIPTS, Path(scratch, "build"), tools)
        for tool in tools:
            shutil.move(Path(scratch, "build", "bin", tool), home / tool)
    return home


def _build(source: Path, build: Path, tools: Sequence[str]) -> None:
    switches = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in OFF)]
    log = build.with_suffix(".log")
    commands: tuple[list[str | Path], ...] = (
        ["cmake", "-S", source, "-B", build, *switches],
        ["cmake", "--build", build, "--parallel", str(len(os.sched_getaffinity(0))), "--target", *tools],
    )
    for command in commands:
        with log.open("ab") as out:
            if subprocess.run(command, stdout=out, stderr=out, check=False).returncode:
                raise SystemExit(f"cannot build llama.cpp's tools:\n{log.read_text(errors='replace')[-3000:]}")
