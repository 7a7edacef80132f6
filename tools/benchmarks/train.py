"""Training on packed weights against a PEFT loop on the dequantized model, and against ggml's operators.

``python -m tools.bench train [--model smollm2|0.1b|1.1b] [--contestants ours,peft,bnb]``; bnb is bitsandbytes' NF4 with
PEFT.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import numpy as np
import torch
import typer

from gguflora import quants
from gguflora.quants.types import type_named
from gguflora.training.layers import DTYPES, PackedLinear
from gguflora.training.packed import PackedMatrix, PackedRows
from tools.benchmarks.models import CACHE, LLAMAS, base_file
from tools.real_models import real_model

N_OUT, N_IN = 5632, 2048
"""The widest matrix of a 1.1B llama."""


def train(
    model: Annotated[str, typer.Option(help=f"smollm2, or the size of a llama: {', '.join(LLAMAS)}.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Of a step.")] = 512,
    steps: Annotated[int, typer.Option(help="Of each contestant; the quickest counts.")] = 3,
    types: Annotated[str, typer.Option(help="Quant types of the products, with commas.")] = "Q4_K,Q6_K,Q8_0,Q4_1",
    contestants: Annotated[str, typer.Option(help="ours, peft, bnb; with commas.")] = "ours,peft",
    precision: Annotated[str, typer.Option(help="f32 or bf16, of our products.")] = "f32",
    folder: Annotated[Path, typer.Option(help="Where models are kept.")] = CACHE,
) -> None:
    """CPU seconds and memory of a step, each in a process of its own; then of one product and its gradient."""
    path = real_model(model) if model == "smollm2" else base_file(folder, LLAMAS[model], "Q4_K_M")
    print(f"{model}, {tokens} tokens a step, rank 16 on all linear layers, blocks recomputed, one thread")
    for name in filter(None, contestants.split(",")):
        command = [sys.executable, "-m", "tools.benchmarks.training_step", name, str(path), str(tokens), str(steps)]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
        if name == "bnb":
            environment["PYTHONPATH"] = os.pathsep.join([str(bitsandbytes(folder)), *sys.path])
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
        losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
        print(
            f"  {name:5} {found['cpu']:7.2f} CPU s a step, {found['memory'] / 1e6:6.0f} MB, losses {losses}", flush=True
        )
    for kind in filter(None, types.split(",")):
        products(kind, tokens, precision)


def bitsandbytes(folder: Path) -> Path:
    """A directory with bitsandbytes, which pip fills the first time."""
    home = folder / "bitsandbytes"
    if not (home / "bitsandbytes").is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(home),
            "bitsandbytes",
        ]
        subprocess.run(command, check=True)
    return home


def products(kind: str, tokens: int, precision: str) -> None:
    """One matrix: the product and the gradient of its input, beside ggml's operators for both."""
    rng = np.random.default_rng(0)
    rows = quants.quantize(rng.standard_normal((N_OUT, N_IN)).astype(np.float32), kind).view(np.uint8)
    x = torch.from_numpy(rng.standard_normal((tokens, N_IN)).astype(np.float32))
    gradient = torch.from_numpy(rng.standard_normal((tokens, N_OUT)).astype(np.float32))
    matrix = PackedMatrix((PackedRows(rows, type_named(kind)),), N_OUT, N_IN)
    torch.set_num_threads(1)
    layer = PackedLinear(matrix, None, DTYPES[precision])
    own = x.clone().requires_grad_()

    def both() -> None:
        own.grad = None
        layer(own).backward(gradient)

    mine = _cpu_seconds(both, 3)
    theirs, result = ggml_products(rows, type_named(kind).id, x.numpy(), gradient.numpy())
    assert own.grad is not None
    error = float(np.linalg.norm(result - own.grad.numpy()) / np.linalg.norm(own.grad.numpy()))
    print(
        f"  {kind:5} {N_OUT} x {N_IN}, product in {precision} and gradient: {mine:.3f} CPU s, ggml {theirs:.3f} "
        f"({theirs / mine:.1f} times; gradients differ by {error:.1e})",
        flush=True,
    )


def _cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def ggml_products(rows: np.ndarray, type_id: int, x: np.ndarray, gradient: np.ndarray) -> tuple[float, np.ndarray]:
    """CPU seconds of ggml's ``mul_mat`` and ``out_prod``, which its own backward pass is built of; and the gradient.

    Source: ``ggml_compute_backward`` in ggml.c: of ``mul_mat(W, x)`` the gradient of x is ``out_prod(W, grad^T)``.
    """
    base, cpu = _libraries()
    n_bytes = rows.nbytes + 4 * (x.nbytes + gradient.nbytes) + (64 << 20)
    context = base.ggml_init(_InitParams(n_bytes, None, False))
    try:
        weight = base.ggml_new_tensor_2d(context, type_id, N_IN, N_OUT)
        inputs = base.ggml_new_tensor_2d(context, 0, N_IN, len(x))
        backwards = base.ggml_new_tensor_2d(context, 0, N_OUT, len(x))
        for tensor, array in ((weight, rows), (inputs, x), (backwards, gradient)):
            ctypes.memmove(base.ggml_get_data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        product = base.ggml_mul_mat(context, weight, inputs)
        result = base.ggml_out_prod(context, weight, base.ggml_transpose(context, backwards))
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        base.ggml_build_forward_expand(graph, result)
        seconds = _cpu_seconds(partial(cpu.ggml_graph_compute_with_ctx, context, graph, 1), 1)
        found = np.empty((len(x), N_IN), np.float32)
        ctypes.memmove(found.ctypes.data, base.ggml_get_data(result), found.nbytes)
        return seconds, found
    finally:
        base.ggml_free(context)


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _libraries() -> tuple[Any, Any]:
    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "ggml_init": [_InitParams],
        "ggml_new_tensor_2d": [pointer, ctypes.c_int, number, number],
        "ggml_get_data": [pointer],
        "ggml_mul_mat": [pointer, pointer, pointer],
        "ggml_out_prod": [pointer, pointer, pointer],
        "ggml_transpose": [pointer, pointer],
        "ggml_new_graph": [pointer],
    }.items():
        function = getattr(base, name)
        function.restype, function.argtypes = pointer, arguments
    base.ggml_build_forward_expand.argtypes, base.ggml_build_forward_expand.restype = [pointer, pointer], None
    base.ggml_free.argtypes, base.ggml_free.restype = [pointer], None
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    cpu.ggml_cpu_init()
    return base, cpu
