"""LORA on all experts of a layer with stacked factors, as Tinker exports it.

``<layer>.mlp.experts.w1`` (gate), ``w3`` (up) and ``w2`` (down) have ``lora_A`` (E, r, n_in) and ``lora_B``
(E, n_out, r); a factor that all experts share has 1 instead of E.
"""

from __future__ import annotations

import re
from typing import Final

from gguflora.adapters.deltas import LowRank
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import Parts
from gguflora.adapters.peft.lora_scaling import lora_scaling
from gguflora.errors import AdapterError
from gguflora.files.safetensors import is_float

_STACK: Final = re.compile(r"(?P<owner>.+\.experts)\.(?P<name>w[123]|gate_proj|up_proj|down_proj)")


def is_stack(module: str, parts: Parts) -> bool:
    """Whether a module's factors are stacks with a matrix for each expert."""
    return (
        parts.keys() == {"lora_A", "lora_B"}
        and _STACK.fullmatch(module) is not None
        and parts["lora_A"].ndim == parts["lora_B"].ndim == 3
    )


def read_stack(config: PeftConfig, module: str, parts: Parts) -> dict[str, LowRank]:
    """Read the delta of each expert, by the name that its weight has in a checkpoint.

    Raises:
        AdapterError: if the factors do not fit together, or do not have the configured rank.
    """
    match = _STACK.fullmatch(module)
    assert match is not None
    a, b = parts["lora_A"], parts["lora_B"]
    rank = config.rank(module, a.shape[1])
    n_experts = max(len(a), len(b))
    if (
        not (is_float(a) and is_float(b))
        or {len(a), len(b)} - {1, n_experts}
        or (a.shape[1], b.shape[2]) != (rank, rank)
    ):
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: A is {a.shape} and B is {b.shape}, expected floats of shape "
            f"(E, {rank}, n_in) and (E, n_out, {rank}) for E experts, or 1 instead of E for a factor they share"
        )
    scaling = lora_scaling(config, module, rank)
    return {
        f"{match['owner']}.{e}.{match['name']}.weight": LowRank(a[e % len(a)], b[e % len(b)], scaling)
        for e in range(n_experts)
    }
