"""One quantization in a process of its own, for `tools.benchmarks.quantize`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gguflora.files.strict_json import to_json

OURS, THEIRS = "gguflora", "llama.cpp"


def main(who: str, source: str, out: str, preset: str, imatrix: str, figures: str) -> None:
    """Quantize, and write the seconds of the call to ``figures``; an empty ``imatrix`` is none."""
    importance = imatrix or None
    if who == OURS:
        from gguflora import quantize  # here, because memory is measured
    else:
        from support.llama_quantize import llama_quantize
    started, cpu = time.perf_counter(), time.process_time()
    if who == OURS:
        quantize(source, out, preset, imatrix=importance)
    elif llama_quantize(source, out, preset, imatrix=importance, nthread=len(os.sched_getaffinity(0))):
        raise SystemExit(f"llama.cpp cannot write {preset}")
    taken = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    Path(figures).write_text(to_json(taken), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
