"""Adapters side by side against the same ones concatenated into one: tokens/s, and what concatenating takes.

``python -m tools.bench concatenate [--model 1.1b]``.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import llama_cpp
import typer

from gguflora.lora.concatenate import concatenate
from gguflora.runtime.bindings import free_lora, load_lora, set_loras
from tools.benchmarks.models import CACHE, LLAMAS, adapter_files, base_file

COUNTS = (1, 2, 4, 8, 16, 32)
TOKENS = 24


def measure_concatenation(
    model: Annotated[str, typer.Option(help=f"Size of the llama: {', '.join(LLAMAS)}.")] = "1.1b",
    folder: Annotated[Path, typer.Option(help="Where models and adapters are kept.")] = CACHE,
) -> None:
    """Decode with 1 to 32 adapters side by side and concatenated: a line for each number."""
    llama = LLAMAS[model]
    base, (_, lora) = base_file(folder, llama, "Q4_K_M"), adapter_files(folder, llama)
    llm = llama_cpp.Llama(str(base), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    print(f"{llama.name} Q4_K_M, adapters of rank 16 on all linear layers; base: {rate(llm, []):.1f} tokens/s")
    for count in COUNTS:
        pointers = [load_lora(llm.model, lora) for _ in range(count)]
        side = rate(llm, [(pointer, 1 / count) for pointer in pointers])
        with tempfile.TemporaryDirectory() as work:
            begin = time.perf_counter()
            concatenate([(lora, 1 / count)] * count, Path(work) / "concatenated.gguf")
            fused = load_lora(llm.model, Path(work) / "concatenated.gguf")
            seconds = time.perf_counter() - begin
        one = rate(llm, [(fused, 1.0)])
        set_loras(llm.ctx, [])
        for pointer in (*pointers, fused):
            free_lora(pointer)
        even = seconds / (1 / side - 1 / one) if one > side else float("inf")
        rates = f"{side:6.1f} tokens/s side by side, {one:6.1f} concatenated"
        print(f"{count:3} adapters: {rates} in {seconds:.2f} s: even at {even:.0f} tokens")


def rate(llm: llama_cpp.Llama, loras: list[tuple[object, float]]) -> float:
    """Best of three rates of decoding, in tokens/s."""
    set_loras(llm.ctx, loras)
    best = 0.0
    for _ in range(3):
        llm.reset()
        llm.eval([1, 2, 3])
        begin = time.perf_counter()
        for token in range(TOKENS):
            llm.eval([10 + token])
        best = max(best, TOKENS / (time.perf_counter() - begin))
    return best
