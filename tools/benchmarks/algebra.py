"""Combine two adapters with gguflora and with PEFT, in turns: ``python -m tools.bench algebra [--quick]``.

Both read two PEFT directories and write one. Each run is a process of its own, Python's start included; PEFT's base
takes no memory. A goal is a share of PEFT's time, and memory below twice the adapters' size.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.numpy import save_file

import gguflora
from gguflora.files.strict_json import to_json
from tools.benchmarks.models import CACHE, LLAMAS, Llama
from tools.benchmarks.processes import Usage, run

INSTALLED = Path(gguflora.__file__).resolve().parent.parent
METHODS = ("cat", "linear", "svd", "ties_svd")
DENSITY = 0.5
GOALS = {"cat": 1.0, "linear": 1.0, "svd": 1.0, "ties_svd": 0.5}
"""Highest share of PEFT's time."""


def algebra(
    model: Annotated[str, typer.Option(help=f"Size of the llama: {', '.join(LLAMAS)}.")] = "1.1b",
    ranks: Annotated[str, typer.Option(help="Ranks of the adapters, separated by commas.")] = "16,256",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = ",".join(METHODS),
    layers: Annotated[int | None, typer.Option(min=1, help="Take only so many layers of the llama.")] = None,
    quick: Annotated[
        bool, typer.Option(help="The methods with svd with two layers only: PEFT's take minutes.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where adapters are kept and outputs written.")] = CACHE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Combine two adapters on all linear layers, of float32, with gguflora and PEFT."""
    llama = LLAMAS[model] if layers is None else replace(LLAMAS[model], layers=layers)
    results = []
    for rank in (int(text) for text in ranks.split(",")):
        for method in methods.split(","):
            shape = replace(llama, layers=min(llama.layers, 2)) if quick and method.endswith("svd") else llama
            with tempfile.TemporaryDirectory(dir=_existing(folder)) as work:
                results.append(_compare(shape, rank, method, Path(work)))
            print(_line(results[-1]), flush=True)
    if json_file:
        json_file.write_text(to_json({"results": results}, indent=1) + "\n", encoding="utf-8")


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _compare(llama: Llama, rank: int, method: str, work: Path) -> dict[str, Any]:
    adapters = [_adapter(work / name, llama, rank, seed) for seed, name in enumerate(("one", "two"))]
    size = sum((adapter / "adapter_model.safetensors").stat().st_size for adapter in adapters)
    ours, theirs = _ours(adapters, method, rank, work), _theirs(llama, adapters, method, rank, work)
    return {
        "method": method,
        "rank": rank,
        "layers": llama.layers,
        "adapters_bytes": size,
        **{f"{who}_{key}": value for who, usage in (("our", ours), ("peft", theirs)) for key, value in _fields(usage)},
    }


def _fields(usage: Usage) -> list[tuple[str, float]]:
    return [("seconds", usage.wall), ("cpu_seconds", usage.cpu), ("peak_bytes", usage.memory)]


def _ours(adapters: list[Path], method: str, rank: int, work: Path) -> Usage:
    options = ["--density", DENSITY] if method.startswith("ties") else []
    options += ["--rank", rank] if method.endswith("svd") else []
    command = [sys.executable, "-P", "-m", "gguflora", "combine", adapters[0], f"{adapters[1]}:0.5"]
    environment = os.environ | {"PYTHONPATH": str(INSTALLED)}
    return run([*command, "-o", work / "ours", "--method", method, *options], environment)


def _theirs(llama: Llama, adapters: list[Path], method: str, rank: int, work: Path) -> Usage:
    config = {
        "hidden_size": llama.hidden,
        "intermediate_size": llama.ffn,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "vocab_size": llama.vocabulary,
    }
    density = DENSITY if method.startswith("ties") else None
    job = {"config": config, "adapters": [*map(str, adapters)], "method": method, "rank": rank, "density": density}
    script = Path(__file__).with_name("algebra_peft.py")
    return run([sys.executable, "-P", script, to_json(job | {"out": str(work / "theirs")})])


def _adapter(folder: Path, llama: Llama, rank: int, seed: int) -> Path:
    """Write an adapter of random float32 values on all linear layers."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(llama.layers):
        for name, (_, n_out, n_in) in llama.linears().items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
                tensors[f"{key}.lora_{part}.weight"] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted(name.rpartition(".")[2] for name in llama.linears())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(to_json(config), encoding="utf-8")
    return folder


def _line(result: dict[str, Any]) -> str:
    size = result["adapters_bytes"]
    share = result["our_seconds"] / result["peft_seconds"]
    memory = result["our_peak_bytes"] / size
    reached = share <= GOALS.get(result["method"], 1.0)
    return (
        f"{result['method']:9} rank {result['rank']:3}, {result['layers']} layers, adapters {size / 1e6:.0f} MB: "
        f"gguflora {result['our_seconds']:.1f} s, {result['our_peak_bytes'] / 1e9:.2f} GB ({memory:.1f} x); "
        f"PEFT {result['peft_seconds']:.1f} s, {result['peft_peak_bytes'] / 1e9:.2f} GB; "
        f"{share:.2f} of PEFT's time{'' if reached else ' (above the goal)'}"
    )
