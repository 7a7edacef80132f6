"""Begin with the factors of an adapter that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gguflora.architectures.base_model import BaseModel
from gguflora.errors import UsageError, listed
from gguflora.files.safetensors import as_float32
from gguflora.lora.factored import read_factored
from gguflora.lora.to_hf import for_model
from gguflora.training.adapters import LoraLinear


def put_factors(path: Path, base: BaseModel, layers: Mapping[str, LoraLinear]) -> None:
    """Give LoRA layers the factors of an adapter of the same rank or a lower one; what it lacks begins at nothing.

    Raises:
        UsageError: if it changes a module that is not trained, or its rank is higher.
        GgufloraError: if it cannot be read, or does not fit the base.
    """
    pairs = for_model(read_factored(path, base), base).pairs
    strangers = [name for name in pairs if name.removesuffix(".weight") not in layers]
    if strangers:
        raise UsageError(
            f"{path}: changes {len(strangers)} weights that this run does not train ({listed(strangers)}); choose "
            "--targets that hold them"
        )
    for name, delta in pairs.items():
        layer = layers[name.removesuffix(".weight")]
        rank = layer.shape.rank
        if delta.rank > rank or layer.start is not None:
            raise UsageError(f"{path}: has rank {delta.rank}; train with at least this --rank, and --init default")
        with torch.no_grad():
            layer.lora_a[: delta.rank] = torch.from_numpy(as_float32(delta.a).copy())
            layer.lora_b[:, : delta.rank] = torch.from_numpy(
                as_float32(delta.b) * (delta.scaling / layer.shape.scaling)
            )
