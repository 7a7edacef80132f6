"""Make files of every kind from the embedded demo and print their SHA-256, which is the same on every machine.

``python tools/smoke.py`` prints them, ``--check`` compares them with ``tools/smoke.json``, ``--write`` replaces that
file. It needs gguflora without extras; the wheels of all systems are tested with it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import gguflora
from gguflora.files.strict_json import to_json
from gguflora.quants._lib import current_isa

EXPECTED = Path(__file__).with_suffix(".json")
DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"


def made(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the commands make in a folder, by name."""
    base, shout, verse = folder / "base.gguf", folder / "shout", folder / "verse"
    shutil.copyfile(DEMO / "base.gguf", base)
    for adapter in (shout, verse):
        shutil.copytree(DEMO / adapter.name, adapter)
    gguflora.convert(shout, base, folder / "lora.gguf")
    gguflora.convert(verse, base, folder / "lora-q8_0.gguf", outtype="q8_0")
    gguflora.merge(base, shout, folder / "merged.gguf")
    gguflora.merge(base, [(shout, 0.5), (verse, -0.25)], folder / "merged-nearest.gguf", rounding="nearest")
    gguflora.merge(base, verse, patch=folder / "verse.gguf.patch")
    for preset in ("Q4_0", "Q8_0"):
        gguflora.quantize(base, folder / f"{preset}.gguf", preset)
    gguflora.combine([shout, (verse, 0.5)], folder / "sum.gguf", base=base)
    gguflora.export(folder / "lora.gguf", base, folder / "exported")
    paths = [*folder.glob("*.gguf*"), folder / "exported" / "adapter_model.safetensors"]
    return {
        str(path.relative_to(folder).as_posix()): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path != base
    }


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    with tempfile.TemporaryDirectory(prefix="gguflora-") as folder:
        found = made(Path(folder))
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {current_isa()}"
    if arguments == ["--write"]:
        EXPECTED.write_text(to_json(found, indent=2) + "\n", encoding="utf-8")
    elif arguments == ["--check"]:
        expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
        other = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        print(f"{system}: " + (f"other bytes: {', '.join(other)}" if other else f"the same {len(found)} files"))
        return 1 if other else 0
    else:
        print(system)
        for name, digest in found.items():
            print(digest, name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
