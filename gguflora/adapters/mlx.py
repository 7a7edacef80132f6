"""Read adapters of mlx-lm: ``adapters.safetensors``, and an ``adapter_config.json`` with ``lora_parameters``.

Older versions write ``adapters.npz``. unsloth-mlx adds PEFT's fields (``peft_type``, ``r``, ``lora_alpha``). mlx-vlm
calls the factors ``A`` and ``B``; its configuration has ``rank`` and ``alpha``, which is the scale itself until March
2026, and alpha / rank from then on (source: ``LoRaLayer`` in mlx_vlm/trainer/lora.py, pull request 846; later
versions write ``lora_parameters`` as mlx-lm does).

A linear layer has ``lora_a`` (n_in, r) and ``lora_b`` (r, n_out): ``W' = W + scale * (lora_a lora_b)^T``, where the
scale is not divided by the rank. An embedding has ``lora_a`` (rows, r) and ``lora_b`` (r, width): ``W' = W + scale *
lora_a lora_b``. The experts of a ``switch_mlp`` (in gpt-oss and Llama 4: ``experts``) have (n_experts, r, n_in) and
(n_experts, n_out, r). DoRA adds ``m``, the norms of the rows, also for an embedding. With ``fine_tune_type`` "full" the
file holds complete weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gguflora.adapters.deltas import (
    Delta,
    LowRank,
    Replace,
    ShapeDependentDelta,
)
from gguflora.adapters.peft.config import MLX, PeftConfig
from gguflora.adapters.peft.keys import (
    Parts,
    by_module,
    expect,
    take,
)
from gguflora.adapters.peft.lora_dora import with_magnitude
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array

_EMBEDDINGS: Final = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
_EXPERTS: Final = re.compile(r"(?P<owner>.+)\.(?:switch_mlp|experts)\.(?P<name>[^.]+)")


def read_mlx(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta | ShapeDependentDelta]:
    """Read the delta of every adapted weight, by its name in the Hugging Face model.

    Raises:
        UnsupportedAdapterError: if the adapter has an ``alpha``, whose meaning depends on the version of mlx-lm.
    """
    kind = config.fields.get("fine_tune_type", "lora")
    if kind == "full":
        return _read_full(config, tensors)
    parameters = _parameters(config)
    if not isinstance(kind, str) or kind not in {"lora", "dora"} or not isinstance(parameters, dict):
        raise UnsupportedAdapterError(
            f"{config.path}: fine_tune_type is {kind!r} and lora_parameters {parameters!r:.80}, expected 'lora' or "
            "'dora' with lora_parameters, or 'full'"
        )
    settings = PeftConfig(config.path, MLX, parameters)
    scale = settings.number("scale", 20.0)
    if "alpha" in parameters and settings.number("alpha", 0.0) != settings.number("rank", 8):
        raise UnsupportedAdapterError(
            f"{config.path}: lora_parameters has alpha; mlx-lm up to version 0.18 multiplies scale by alpha / rank, "
            "later versions ignore it: for the former set scale to scale * alpha / rank, then remove alpha"
        )
    deltas: dict[str, Delta | ShapeDependentDelta] = {}
    for module, parts in by_module(config, tensors, ["lora_a", "lora_b", "m", "A", "B"]).items():
        for name, other in (("A", "lora_a"), ("B", "lora_b")):
            if name in parts and other not in parts:
                parts[other] = parts.pop(name)
        deltas |= _read_module(config, module, parts, scale)
    return deltas


def _parameters(config: PeftConfig) -> object:
    """Return the field ``lora_parameters``, or what stands for it in the files of mlx-vlm and unsloth-mlx."""
    given = config.fields.get("lora_parameters")
    if given is not None:
        return given
    if {"rank", "alpha"} <= config.fields.keys():
        return {"scale": config.fields["alpha"]}
    if {"r", "lora_alpha"} <= config.fields.keys():
        rank = config.number("r", 8)
        return {"scale": config.number("lora_alpha", 8) / (rank or 1)}
    return None


def scale_warnings(config: PeftConfig) -> tuple[str, ...]:
    """Return a warning if the scale depends on the version that trained: mlx-vlm changed what its ``alpha`` means."""
    fields = config.fields
    if fields.get("lora_parameters") is not None or not {"rank", "alpha"} <= fields.keys() or fields["rank"] == 1:
        return ()
    rank, alpha = fields["rank"], fields["alpha"]
    return (
        f"its scale is alpha, {alpha}, as in mlx-vlm until March 2026; later versions multiply by alpha / rank. If one "
        f'of those trained it, give adapter_config.json "lora_parameters": {{"scale": {alpha} / {rank}}}, computed',
    )


def _read_full(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta | ShapeDependentDelta]:
    deltas: dict[str, Delta | ShapeDependentDelta] = {}
    for name, values in tensors.items():
        module, _, kind = name.rpartition(".")
        experts = _expert_modules(module, len(values)) if values.ndim == 3 else []
        if values.ndim in {1, 2}:
            deltas[name] = Replace(values.reshape(len(values), -1))
        elif experts:
            deltas |= {f"{one}.{kind}": Replace(values[e]) for e, one in enumerate(experts)}
        else:
            raise UnsupportedAdapterError(
                f"{config.path.parent}: {name!r} has shape {values.shape}, expected a vector, a matrix, or a stack of "
                "experts"
            )
    return deltas


def _read_module(config: PeftConfig, module: str, parts: Parts, scale: float) -> dict[str, Delta | ShapeDependentDelta]:
    magnitude = parts.pop("m", None)
    a, b = take(config, module, parts, "lora_a", "lora_b")
    if a.ndim == b.ndim == 3 and magnitude is None:
        return _read_experts(config, module, a, b, scale)
    expect(config, module, "lora_a", a, (None, None))
    expect(config, module, "lora_b", b, (a.shape[1], None))
    embedding = module.rpartition(".")[2] in _EMBEDDINGS
    delta = LowRank(b, a, scale) if embedding else LowRank(a.T, b.T, scale)
    if magnitude is None:
        return {f"{module}.weight": delta}
    return {f"{module}.weight": with_magnitude(config, module, delta, magnitude)}


def _read_experts(
    config: PeftConfig, module: str, a: Array, b: Array, scale: float
) -> dict[str, Delta | ShapeDependentDelta]:
    experts = _expert_modules(module, len(a))
    if not experts or a.shape[:2] != (b.shape[0], b.shape[2]):
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: lora_a is {a.shape} and lora_b {b.shape}, expected experts "
            "with (n_experts, r, n_in) and (n_experts, n_out, r)"
        )
    return {f"{one}.weight": LowRank(a[e], b[e], scale) for e, one in enumerate(experts)}


def _expert_modules(module: str, n_experts: int) -> list[str]:
    """Return the name of each expert's module in a checkpoint; an empty list if the module does not hold experts."""
    match = _EXPERTS.fullmatch(module)
    return [f"{match['owner']}.experts.{e}.{match['name']}" for e in range(n_experts)] if match else []
