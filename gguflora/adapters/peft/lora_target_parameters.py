"""LORA on parameters instead of modules (``target_parameters``): the stacked experts of a layer.

PEFT (tuners/lora/layer.py, ParamWrapper) wraps a module once for each of its adapted parameters, in the order in which
they are registered, so the factors of ``experts.gate_up_proj`` and ``experts.down_proj`` are named
``experts.base_layer.lora_A`` and ``experts.lora_A``. For E experts, A is (r E, n_in) with the rows of each expert
together, and B is (n_out, r E) with the columns of each rank-one term together. The delta of expert e is named
``<parameter>.<e>`` and has the orientation (n_out, n_in), even if the model stores the parameter transposed.

Before PEFT 0.18 A belonged to the parameter's second dimension and B to its third, which exchanges them for parameters
of shape (E, n_out, n_in). The base's shape shows which case applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np

from gguflora.adapters.deltas import Delta, LowRank, ShapeDependentDelta
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import Parts, take
from gguflora.adapters.peft.lora_scaling import lora_scaling
from gguflora.errors import AdapterError, UnsupportedAdapterError, listed
from gguflora.files.safetensors import Array, is_float

_WRAPPER: Final = ".base_layer"

# in the order in which transformers' experts register them
_ORDER: Final = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "down_proj_bias",
)


def split_wrapped(config: PeftConfig, modules: Mapping[str, Parts]) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """Split parts into those of parameters, by the parameter's name, and those of modules.

    Raises:
        AdapterError: if a module is not wrapped as often as the configuration says.
    """
    wrapped: dict[str, dict[int, Parts]] = {}
    others = {}
    for module, parts in modules.items():
        owner, depth = module, 0
        while owner.endswith(_WRAPPER):
            owner, depth = owner.removesuffix(_WRAPPER), depth + 1
        if _parameters_of(config, owner):
            wrapped.setdefault(owner, {})[depth] = parts
        else:
            others[module] = parts
    named: dict[str, Parts] = {}
    for owner, layers in wrapped.items():
        parameters = _parameters_of(config, owner)
        if sorted(layers) != list(range(len(parameters))):
            raise AdapterError(
                f"{config.path.parent}: {owner!r} has factors for {len(layers)} parameters, but target_parameters "
                f"names {listed(parameters)}"
            )
        named |= {f"{owner}.{parameters[-1 - depth]}": parts for depth, parts in layers.items()}
    return named, others


def _parameters_of(config: PeftConfig, owner: str) -> list[str]:
    """Return the adapted parameters of a module, in the order in which they are registered."""
    targets = config.fields.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise config.error("target_parameters", "a list of parameter names", targets)
    found = set()
    for target in targets:
        parent, _, parameter = target.rpartition(".")
        if _ends(owner, parent) if parent else _may_hold(config, owner, parameter):
            found.add(parameter)
    unknown = [name for name in found if name not in _ORDER]
    if len(found) > 1 and unknown:
        raise UnsupportedAdapterError(
            f"{config.path}: target_parameters names {listed(found)} of one module; the order of {listed(unknown)} in "
            "the module is not known"
        )
    return sorted(found, key=_ORDER.index) if len(found) > 1 else list(found)


def _may_hold(config: PeftConfig, owner: str, parameter: str) -> bool:
    """Whether a parameter that is named without a module may belong to this one, which must not be adapted itself."""
    targets = config.fields.get("target_modules") or []
    if isinstance(targets, list) and any(isinstance(target, str) and _ends(owner, target) for target in targets):
        return False
    return (parameter in _ORDER) == _ends(owner, "experts")


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def read_parameter(config: PeftConfig, parameter: str, parts: Parts) -> dict[str, Delta | ShapeDependentDelta]:
    """Read the delta of a parameter, or of each expert in it.

    Raises:
        AdapterError: if the factors do not have the configured rank.
    """
    a, b = take(config, parameter, parts, "lora_A", "lora_B")
    terms = a.shape[0] if a.ndim == 2 else 0
    ranks = config.ranks(parameter)
    rank = next((rank for rank in ranks if terms % rank == 0), ranks[0])
    scaling = lora_scaling(config, parameter, rank)
    if b.ndim != 2 or not terms or terms % rank or b.shape[1] != terms or not (is_float(a) and is_float(b)):
        raise AdapterError(
            f"{config.path.parent}: parameter {parameter!r}: A is {a.shape} and B is {b.shape}, expected floats "
            f"of shape (E * {rank}, n_in) and (n_out, E * {rank}) for E experts of rank {rank}"
        )
    n_experts = terms // rank
    if n_experts == 1:
        return {parameter: LowRank(a, b, scaling)}
    experts_a, experts_b = a.reshape(n_experts, rank, -1), b.reshape(-1, rank, n_experts)
    return {
        f"{parameter}.{e}": ShapeDependentDelta(
            (None, None), partial(_build_expert, config, parameter, experts_a[e], experts_b[..., e], scaling)
        )
        for e in range(n_experts)
    }


def _build_expert(
    config: PeftConfig, parameter: str, a: Array, b: Array, scaling: float, shape: tuple[int, int]
) -> Delta:
    if (b.shape[0], a.shape[1]) == shape:
        return LowRank(a, b, scaling)
    if (a.shape[1], b.shape[0]) == shape:  # written before PEFT 0.18
        return LowRank(np.ascontiguousarray(b.T), np.ascontiguousarray(a.T), scaling)
    raise AdapterError(
        f"{config.path.parent}: parameter {parameter!r}: one expert's A is {a.shape} and B is {b.shape}, which do not "
        f"fit the base's {shape}; is it the right base?"
    )
