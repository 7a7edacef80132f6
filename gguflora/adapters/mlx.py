"""Adapters of mlx-lm: ``adapters.safetensors``, and an ``adapter_config.json`` with ``lora_parameters``.

A linear layer has ``lora_a`` (n_in, r) and ``lora_b`` (r, n_out): ``W + scale * (lora_a lora_b)^T``, not divided by the
rank; an embedding has ``lora_a`` (rows, r) and ``lora_b`` (r, width): ``W + scale * lora_a lora_b``. The experts of
a ``switch_mlp`` have (n_experts, r, n_in) and (n_experts, n_out, r). DoRA adds ``m``, the lengths of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguflora.adapters.config import MLX, PeftConfig
from gguflora.adapters.dora import with_magnitude
from gguflora.adapters.keys import Parts, by_module, expect, take
from gguflora.deltas import Change, LowRank, Unsized
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array


def read_mlx(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Change | Unsized]:
    """The change of every adapted weight, by its name in the Hugging Face model.

    Raises:
        UnsupportedAdapterError: for whole models, and for adapters of old versions whose scale is not certain.
    """
    parameters = config.fields.get("lora_parameters")
    if config.fields.get("fine_tune_type", "lora") not in {"lora", "dora"} or not isinstance(parameters, dict):
        raise UnsupportedAdapterError(
            f"{config.path}: fine_tune_type is {config.fields.get('fine_tune_type')!r}, expected 'lora' or 'dora' with "
            "lora_parameters; convert a model that was trained whole with llama.cpp"
        )
    settings = PeftConfig(config.path, MLX, parameters)
    scale = settings.number("scale", 20.0)
    if "alpha" in parameters and settings.number("alpha", 0.0) != settings.number("rank", 8):
        raise UnsupportedAdapterError(
            f"{config.path}: lora_parameters has alpha, which mlx-lm divides by the rank up to version 0.18 and later "
            "ignores: remove it, or set scale to scale * alpha / rank first"
        )
    changes: dict[str, Change | Unsized] = {}
    for module, parts in by_module(config, tensors, ["lora_a", "lora_b", "m"]).items():
        changes |= _read_module(config, module, parts, scale)
    return changes


def _read_module(config: PeftConfig, module: str, parts: Parts, scale: float) -> dict[str, Change | Unsized]:
    magnitude = parts.pop("m", None)
    embedding = module.endswith("embed_tokens")
    a, b = take(config, module, parts, "lora_a", "lora_b")
    if a.ndim == b.ndim == 3 and ".switch_mlp." in module and magnitude is None:
        return _read_experts(config, module, a, b, scale)
    expect(config, module, "lora_a", a, (None, None))
    expect(config, module, "lora_b", b, (a.shape[1], None))
    change = LowRank(b, a, scale) if embedding else LowRank(a.T, b.T, scale)
    if magnitude is None:
        return {f"{module}.weight": change}
    if embedding:
        raise UnsupportedAdapterError(
            f"{config.path.parent}: module {module!r} is an embedding with DoRA; merge it in MLX"
        )
    return {f"{module}.weight": with_magnitude(config, module, change, magnitude)}


def _read_experts(config: PeftConfig, module: str, a: Array, b: Array, scale: float) -> dict[str, Change | Unsized]:
    if a.shape[:2] != (b.shape[0], b.shape[2]):
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: lora_a is {a.shape} and lora_b {b.shape}, expected "
            "(n_experts, r, n_in) and (n_experts, n_out, r)"
        )
    owner, _, name = module.rpartition(".switch_mlp.")
    return {f"{owner}.experts.{e}.{name}.weight": LowRank(a[e], b[e], scale) for e in range(len(a))}
