"""Concatenate GGUF LoRAs into one of the summed rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gguflora import quants
from gguflora.adapters.gguf_lora import ALPHA_KEY
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.lora.gguf_writer import LoraHeader, Stored, exact_type, write_lora
from gguflora.quants.arrays import Float32Array


def concatenate(adapters: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write the sum of GGUF LoRA files, each times its scale, as one GGUF LoRA file.

    Factors are stored as F16 where they were and still are exact, else as F32.

    Raises:
        GgufError: if a file is damaged.
    """
    a: dict[str, list[Float32Array]] = {}
    b: dict[str, list[Float32Array]] = {}
    floats: set[str] = set()
    for path, scale in adapters:
        with GgufFile(path) as file:
            architecture, alpha = file.architecture, float(file.metadata.get(ALPHA_KEY, 0.0))
            for name in dict.fromkeys(name.rpartition(".")[0] for name in file.tensors):
                first, second = (file.tensors[f"{name}.lora_{side}"] for side in "ab")
                values = _values(file, second)
                scaling = scale * (alpha / values.shape[-1] if alpha else 1.0)
                a.setdefault(name, []).append(_values(file, first))
                b.setdefault(name, []).append(values * np.float32(scaling))
                floats |= {name for tensor in (first, second) if tensor.type.name != "F16"}
    stored = []
    for name, parts in a.items():
        may_halve = name not in floats
        rows = np.concatenate(parts, axis=-1 if name == TOKEN_EMBEDDING else -2)
        stored.append(_stored(f"{name}.lora_a", rows, may_halve=may_halve))
        stored.append(_stored(f"{name}.lora_b", np.concatenate(b[name], axis=-1), may_halve=may_halve))
    write_lora(out, LoraHeader("fused", architecture, 0.0, {"source": f"{len(adapters)} adapters"}), stored)


def _values(file: GgufFile, tensor: TensorEntry) -> Float32Array:
    return quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type.id).reshape(tensor.shape)


def _stored(name: str, values: Float32Array, *, may_halve: bool) -> Stored:
    kind = exact_type(values) if may_halve else "F32"
    return Stored(name, kind, quants.quantize(values, kind).view(np.uint8))


@contextmanager
def memory_file(name: str) -> Iterator[Path]:
    """A file in memory, by a path that holds in this process; gone afterwards."""
    descriptor = os.memfd_create(name)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
