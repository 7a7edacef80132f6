"""GGUF files read by gguf-py, with ggml's own values of quantized tensors."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.oracles import libggml


def dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor of gguf-py as float32."""
    n_in = int(tensor.shape[0])
    data = np.ascontiguousarray(tensor.data).view(np.uint8)
    n_rows = int(tensor.n_elements) // n_in
    values = libggml.dequantize(data.reshape(n_rows, -1), int(tensor.tensor_type), n_in)
    return values.reshape(*tensor.data.shape[:-1], n_in)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32 in numpy order, dequantized by ggml."""
    return {tensor.name: dequantized(tensor) for tensor in gguf.GGUFReader(path).tensors}


def lora_changes(path: Path) -> dict[str, np.ndarray]:
    """The change (n_out, n_in) in float64 of each tensor by a GGUF LoRA at scale 1, as llama.cpp computes it.

    Source: llama-adapter.h `get_scale` (alpha 0 or absent means no alpha/rank) and the transposed token_embd.
    """
    reader = gguf.GGUFReader(path)
    field = reader.get_field("adapter.lora.alpha")
    alpha = float(field.contents()) if field else 0.0
    parts = {tensor.name: dequantized(tensor).astype(np.float64) for tensor in reader.tensors}
    changes = {}
    for name in sorted({name.rpartition(".")[0] for name in parts}):
        a, b = parts.pop(f"{name}.lora_a"), parts.pop(f"{name}.lora_b")
        factor = alpha / b.shape[-1] if alpha else 1.0
        changes[name] = factor * (a @ b.T if name == "token_embd.weight" else b @ a)
    assert not parts, f"{path.name} has tensors that are no pair: {sorted(parts)}"
    return changes


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key-value pair of the file."""
    fields = gguf.GGUFReader(path).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("GGUF.")}
