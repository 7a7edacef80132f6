"""Merge every adapter below a folder with joblib, and remember what was merged: a second run does nothing.

python joblib_merges.py base.gguf adapters out
"""

import sys
from pathlib import Path

import joblib

import gguflora


def merge(base: str, adapter: Path, out: Path, inputs: list[str]) -> float:
    """Merge one adapter; return the share of its change that the quant types keep. ``inputs`` are hashes to go by."""
    return gguflora.merge(base, adapter, out / f"{adapter.name}.gguf", threads=1, force=True).total.retention


def hashes(*paths: Path) -> list[str]:
    """Return a hash of each file."""
    return [joblib.hash(path.read_bytes()) for path in paths]


def main(base: str, adapters: str, out: str) -> None:
    """Merge all and print what became of each."""
    target = Path(out)
    target.mkdir(exist_ok=True)
    folders = sorted(path.parent for path in Path(adapters).glob("*/adapter_config.json"))
    [of_base] = hashes(Path(base))
    remembered = joblib.Memory(target / ".joblib", verbose=0).cache(merge)
    jobs = [
        joblib.delayed(remembered)(base, folder, target, [of_base, *hashes(*sorted(folder.glob("adapter_*")))])
        for folder in folders
    ]
    for folder, retention in zip(folders, joblib.Parallel(n_jobs=-1)(jobs), strict=True):
        print(f"{target / folder.name}.gguf: {retention:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
