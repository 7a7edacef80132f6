"""Adapters at run time: loading, switching, speed, memory; ``python -m tools.bench hotswap [--model 1.1b]``.

One engine with the adapter as F32, F16 and Q8_0, against building a ``Llama(lora_path=...)`` for each switch, which is
what llama-cpp-python offers, and against a merged file. The same prompt everywhere, greedy, files in the page cache,
medians. A switch is measured to the first token of its answer. Speeds (tokens a second, CPU milliseconds a token) and
switches within the engine are measured in turns: the machine may be busier at one time than at another.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import typer
from rich.console import Console
from rich.table import Table

import gguflora
from gguflora.engine import Engine, Generation, Request, Sampling
from gguflora.files.strict_json import to_json
from tools.benchmarks.models import CACHE, LLAMAS, adapter_files, base_file

OUTTYPES = ("f32", "f16", "q8_0")
PEER = "Llama(lora_path=)"
PROMPT = [1, *range(300, 363)]
END = 2
N_CTX = 2048


class Subjects:
    """The files of one run: a base, its adapter in several types, the two merged."""

    def __init__(self, folder: Path, model: str) -> None:
        llama = LLAMAS[model]
        self.base = base_file(folder, llama, "Q4_K_M")
        peft, _ = adapter_files(folder, llama)
        self.adapters = {outtype: folder / f"{peft.name}-{outtype}.gguf" for outtype in OUTTYPES}
        for outtype, file in self.adapters.items():
            if not file.exists():
                gguflora.convert(peft, self.base, file, outtype=outtype)
        self.merged = folder / f"{self.base.stem}-merged.gguf"
        if not self.merged.exists():
            gguflora.merge(self.base, peft, self.merged)
        for file in (self.base, self.merged, *self.adapters.values()):
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)  # into the page cache


def seconds(work: Callable[[], object]) -> float:
    """That ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident_bytes() -> int:
    """Memory of this process that no file backs, once nothing is left to give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def opened(base: Path, threads: int) -> Iterator[Engine]:
    """An engine with a slot for each set."""
    with Engine(base, n_ctx=N_CTX, n_parallel=len(OUTTYPES) + 1, threads=threads) as engine:
        yield engine


def ask(engine: Engine, adapters: str, count: int) -> Generation:
    """An answer of ``count`` tokens, waited for."""
    sampling = Sampling(temperature=0, logit_bias={END: -100.0})
    generation = engine.submit(Request(PROMPT, engine.adapter_set(adapters), max_tokens=count, sampling=sampling))
    generation.text()
    if generation.usage.completion_tokens != count:
        raise SystemExit(f"{adapters}: {generation.usage.completion_tokens} tokens instead of {count}")
    return generation


@dataclass(frozen=True)
class Speed:
    """Of generating, the prompt's evaluation left out; CPU time is what other programs disturb least."""

    tokens_per_second: float
    cpu_milliseconds_per_token: float


def _speed(generate: Callable[[], object], count: int) -> Speed:
    cpu, wall = time.process_time(), time.perf_counter()
    generate()
    return Speed(count / (time.perf_counter() - wall), (time.process_time() - cpu) / count * 1e3)


def measure_speeds(files: Subjects, count: int, repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """Generating with each adapter, without, with the merged file and as llama-cpp-python does it, in turns."""
    with opened(files.base, threads) as engine, opened(files.merged, threads) as merged:
        for outtype, file in files.adapters.items():
            engine.load(file, outtype)
        llm = _llama(files.base, threads, lora_path=str(files.adapters["f32"]))
        ways: dict[str, Callable[[], Speed]] = {
            name: partial(_engine_speed, engine, name, count) for name in ("base", *OUTTYPES)
        }
        ways["merged file"] = partial(_engine_speed, merged, "base", count)
        ways[PEER] = partial(_llama_speed, llm, count)
        taken: dict[str, list[Speed]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                taken[name].append(way())
        llm.close()
    return {
        name: {key: statistics.median(getattr(speed, key) for speed in speeds) for key in Speed.__annotations__}
        for name, speeds in taken.items()
    }


def _engine_speed(engine: Engine, adapters: str, count: int) -> Speed:
    ask(engine, adapters, 1)  # now the prompt is held
    return _speed(lambda: ask(engine, adapters, count), count)


def _llama_speed(llm: llama_cpp.Llama, count: int) -> Speed:
    tokens = llm.generate(PROMPT, temp=0.0)
    next(tokens)
    return _speed(lambda: [next(tokens) for _ in range(count)], count)


def measure_engine(files: Subjects, repeats: int, threads: int) -> dict[str, Any]:
    """Loading, memory and switching of adapters in one engine."""
    with opened(files.base, threads) as engine:
        ask(engine, "base", 1)
        loads = _loaded(engine, files.adapters, repeats)
        before = resident_bytes()
        first = ask(engine, "f32", 1).timings.ttft
        context = resident_bytes() - before
        for outtype in OUTTYPES:
            ask(engine, outtype, 1)
        turns = [
            (ask(engine, adapters, 1).timings.ttft, ask(engine, adapters, 1).timings.ttft)
            for adapters in ("base", *OUTTYPES) * repeats
        ]
        back, same = (statistics.median(taken) for taken in zip(*turns, strict=True))
        kv_bytes = engine.stats().contexts[0].kv_bytes
    switching = {"without a switch": same, "back to a set used before": back, "first use of a set": first}
    return {
        "loads": loads,
        "context_bytes": context,
        "kv_bytes": kv_bytes,
        "first_token": switching,
    }


def _loaded(engine: Engine, adapters: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Load adapters (and leave them loaded): seconds, and bytes on disk and in memory.

    The memory is that of each first load: later ones are given what an earlier one has left to the allocator.
    """
    loads: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {}
    for outtype, file in adapters.items():
        before = resident_bytes()
        times[outtype] = [seconds(partial(engine.load, file, outtype))]
        loads[outtype] = {"file_bytes": file.stat().st_size, "memory_bytes": resident_bytes() - before}
    for outtype, file in adapters.items():
        for _ in range(repeats - 1):
            engine.unload(outtype)
            times[outtype].append(seconds(partial(engine.load, file, outtype)))
        loads[outtype]["seconds"] = statistics.median(times[outtype])
    return loads


def measure_attached(files: Subjects, repeats: int, threads: int) -> dict[str, float]:
    """Switching the adapter of one Llama by `gguflora.attach`: the call, and the first token of the next answer."""
    llm = _llama(files.base, threads)
    applies, firsts = [], []
    with gguflora.attach(llm) as adapters:
        for outtype, file in files.adapters.items():
            adapters.load(outtype, file)
        for outtype in OUTTYPES * repeats:
            applies.append(seconds(partial(adapters.apply, {outtype: 1.0})))
            firsts.append(seconds(lambda: next(llm.generate(PROMPT, temp=0.0))))
    llm.close()
    return {"apply": statistics.median(applies), "first_token": statistics.median(firsts)}


def measure_rebuilding(files: Subjects, repeats: int, threads: int) -> float:
    """Seconds from building a new Llama to the first token of its answer."""
    switches = []
    for _ in range(repeats):
        started = time.perf_counter()
        llm = _llama(files.base, threads, lora_path=str(files.adapters["f32"]))
        next(llm.generate(PROMPT, temp=0.0))
        switches.append(time.perf_counter() - started)
        llm.close()
    return statistics.median(switches)


def _llama(path: Path, threads: int, **options: object) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=N_CTX, n_batch=128, n_threads=threads, n_threads_batch=threads, verbose=False, **options
    )


def _tables(report: dict[str, Any]) -> list[Table]:
    engine, attached, speeds = report["engine"], report["attached"], report["speeds"]
    loads = Table("adapter", "load ms", "file MB", "memory MB", "tokens/s", "CPU ms", title="Hot adapters")
    for name, speed in speeds.items():
        load = engine["loads"].get(name)
        costs = [f"{load['seconds'] * 1e3:.0f}"] if load else ["", "", ""]
        costs += [f"{load[key] / 1e6:.1f}" for key in ("file_bytes", "memory_bytes")] if load else []
        rates = (f"{speed['tokens_per_second']:.1f}", f"{speed['cpu_milliseconds_per_token']:.1f}")
        loads.add_row(name, *costs, *rates)
    switches = Table("switch", "ms to the first token", title=f"Switching, prompt of {len(PROMPT)} tokens")
    for name, taken in engine["first_token"].items():
        switches.add_row(f"engine: {name}", f"{taken * 1e3:.1f}")
    switches.add_row(
        f"attach: apply ({attached['apply'] * 1e6:.0f} us) and prompt", f"{attached['first_token'] * 1e3:.1f}"
    )
    switches.add_row("a new Llama(lora_path=...), then the prompt", f"{report['rebuilding_first_token'] * 1e3:.1f}")
    return [loads, switches]


def hotswap(
    model: Annotated[str, typer.Option(help=f"Size of the llama: {', '.join(LLAMAS)}.")] = "1.1b",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each number; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of llama.cpp.")] = 1,
    folder: Annotated[Path, typer.Option(help="Where models and adapters are kept.")] = CACHE,
    out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Measure adapters at run time against a new Llama for each switch, and a merged file."""
    files = Subjects(folder, model)
    report: dict[str, Any] = {
        "engine": measure_engine(files, repeats, threads),
        "attached": measure_attached(files, repeats, threads),
        "rebuilding_first_token": measure_rebuilding(files, repeats, threads),
        "speeds": measure_speeds(files, tokens, repeats, threads),
    }
    if out is not None:
        out.write_text(to_json(report, indent=2) + "\n", encoding="utf-8")
    console = Console(file=sys.stdout)
    for table in _tables(report):
        console.print(table)
    console.print(f"A context of {N_CTX} tokens takes {report['engine']['context_bytes'] / 1e6:.0f} MB of memory, "
                  f"{report['engine']['kv_bytes'] / 1e6:.0f} MB of them KV cache.")  # fmt: skip
