"""Sum GGUF LoRAs exactly by concatenating their factors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gguflora import quants
from gguflora.adapters.gguf_lora import ALPHA_KEY
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.lora.gguf_writer import LoraHeader, Stored, exact_type, write_lora
from gguflora.quants.arrays import Float32Array


def concatenate(adapters: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write the scaled sum of GGUF LoRA files as one GGUF LoRA file, whose rank is the sum of their ranks.

    Factors are stored as F16 if they were F16 and F16 still holds them exactly, else as F32.

    Args:
        adapters: path and scale of each GGUF LoRA file.
        out: the file to write.

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
                values = _dequantize(file, second)
                scaling = scale * (alpha / values.shape[-1] if alpha else 1.0)
                a.setdefault(name, []).append(_dequantize(file, first))
                b.setdefault(name, []).append(values * np.float32(scaling))
                floats |= {name for tensor in (first, second) if tensor.type.name != "F16"}
    stored = []
    for name, parts in a.items():
        allow_f16 = name not in floats
        rows = np.concatenate(parts, axis=-1 if name == TOKEN_EMBEDDING else -2)
        stored.append(_encode(f"{name}.lora_a", rows, allow_f16=allow_f16))
        stored.append(_encode(f"{name}.lora_b", np.concatenate(b[name], axis=-1), allow_f16=allow_f16))
    write_lora(out, LoraHeader("fused", architecture, 0.0, {"source": f"{len(adapters)} adapters"}), stored)


def _dequantize(file: GgufFile, tensor: TensorEntry) -> Float32Array:
    return quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type.id).reshape(tensor.shape)


def _encode(name: str, values: Float32Array, *, allow_f16: bool) -> Stored:
    kind = exact_type(values) if allow_f16 else "F32"
    return Stored(name, kind, quants.quantize(values, kind).view(np.uint8))
