"""ADALORA: ``W' = W + scaling * B diag(E) A`` (https://arxiv.org/abs/2303.10512; PEFT: tuners/adalora/layer.py).

Tensors of a module: ``lora_A`` (r, n_in), ``lora_E`` (r, 1) and ``lora_B`` (n_out, r), without ``.weight``. Training
reduces r for each module, but the scaling is always ``lora_alpha / (init_r + 1e-5)``; if lora_alpha is not positive,
init_r replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguflora.adapters.deltas import Delta, LowRank, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import by_module, expect, take
from gguflora.files.safetensors import Array


def read_adalora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta]:
    """The change of every adapted weight; modules that were pruned to rank 0 have none."""
    rank = config.number("init_r", 12)
    alpha = config.number("lora_alpha", 8)
    scaling = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    # ranknum, which old files hold, is the rank before pruning
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("ranknum") and ".ranknum." not in key}
    deltas: dict[str, Delta] = {}
    for module, parts in by_module(config, kept, ["lora_A", "lora_B", "lora_E"]).items():
        a, b, e = take(config, module, parts, "lora_A", "lora_B", "lora_E")
        rows = a.shape[0] if a.ndim else None
        expect(config, module, "lora_A", a, (None, None))
        expect(config, module, "lora_B", b, (None, rows))
        expect(config, module, "lora_E", e, (rows, 1))
        if rows:
            deltas[f"{module}.weight"] = LowRank(a, as_float64(b) * as_float64(e).T, scaling)
    return deltas
