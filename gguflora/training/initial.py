"""Begin with the factors of an adapter that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gguflora.architectures.base_model import BaseModel
from gguflora.errors import MismatchError, UsageError, listed
from gguflora.files.safetensors import as_float32
from gguflora.lora.factored import read_factored
from gguflora.lora.to_hf import for_model
from gguflora.training.adapters import LoraLayer


def put_factors(path: Path, base: BaseModel, layers: Mapping[str, LoraLayer]) -> None:
    """Give LoRA layers the factors of an adapter of the same rank or a lower one; what it lacks begins at nothing.

    Raises:
        UsageError: if it changes a module that is not trained, or its rank is higher.
        GgufloraError: if it cannot be read, or does not fit the base.
    """
    pairs = for_model(read_factored(path, base), base).pairs
    owners = {name: _owner(name, layers) for name in pairs}
    strangers = [name for name, owner in owners.items() if owner is None]
    if strangers:
        raise UsageError(
            f"{path}: changes {len(strangers)} weights that this run does not train ({listed(strangers)}); choose "
            "--targets that hold them"
        )
    for name, owner in owners.items():
        assert owner is not None
        delta, layer = pairs[name], layers[owner]
        if delta.rank > layer.shape.rank or layer.start is not None:
            raise UsageError(f"{path}: has rank {delta.rank}; train with at least this --rank, and --init default")
        found = (delta.b.shape[0], delta.a.shape[1])
        if found not in layer.sizes:
            raise MismatchError(
                f"{path}: changes {name!r} of shape {found}, but the base's has {layer.sizes[0]}; is it the right base?"
            )
        layer.put(
            name.removeprefix(f"{owner}."),
            torch.from_numpy(as_float32(delta.a).copy()),
            torch.from_numpy(as_float32(delta.b) * (delta.scaling / layer.shape.scaling)),
        )


def _owner(weight: str, layers: Mapping[str, LoraLayer]) -> str | None:
    """The trained layer of a weight: ``<layer>.weight``, or of experts ``<layer>.gate_up_proj.3``."""
    owner = weight.removesuffix(".weight")
    if owner == weight:
        owner = weight.rpartition(".")[0].rpartition(".")[0]
    return owner if owner in layers else None
