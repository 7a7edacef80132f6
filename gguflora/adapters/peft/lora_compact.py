"""LoRA variants whose stored factors are narrower than the matrices they stand for.

BD-LoRA (``use_bdlora``; PEFT: tuners/lora/variants.py) has a block-diagonal A or B with n blocks, which are stored on
top of each other, (r, n_in / n) or (n_out, r / n). In QA-LoRA (``use_qalora``; https://arxiv.org/abs/2309.14717) the
inputs of A are the means of groups of g inputs, times the number of groups, so A is (r, n_in / g).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from gguflora.adapters.deltas import (
    Delta,
    LowRank,
    ShapeDependentDelta,
    as_float64,
)
from gguflora.adapters.peft.config import PeftConfig
from gguflora.errors import AdapterError
from gguflora.files.safetensors import Array


def with_blocks(config: PeftConfig, module: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Return A and B, with the blocks of a block-diagonal one put on its diagonal.

    Raises:
        AdapterError: if the stored factor cannot be divided into the configured number of blocks.
    """
    options = config.fields.get("use_bdlora")
    if not options:
        return a, b
    if not isinstance(options, dict):
        raise config.error("use_bdlora", "an object", options)
    n_blocks = options.get("nblocks", 1)
    if not isinstance(n_blocks, int) or n_blocks < 1:
        raise config.error("use_bdlora.nblocks", "a positive whole number", n_blocks)
    in_a, in_b = (
        any(str(pattern) in module for pattern in options.get(name) or ())
        for name in ("target_modules_bd_a", "target_modules_bd_b")
    )
    if in_a and in_b:
        raise AdapterError(f"{config.path}: use_bdlora: module {module!r} matches the patterns of both A and B")
    return _diagonal(config, module, a, n_blocks) if in_a else a, _diagonal(config, module, b, n_blocks) if in_b else b


def _diagonal(config: PeftConfig, module: str, stored: Array, n_blocks: int) -> Array:
    if stored.ndim != 2 or stored.shape[0] % n_blocks:
        raise AdapterError(
            f"{config.path.parent}: module {module!r}: a factor of shape {stored.shape} does not have {n_blocks} blocks"
        )
    rows, width = stored.shape[0] // n_blocks, stored.shape[1]
    full = np.zeros((n_blocks, rows, n_blocks, width), stored.dtype)
    full[np.arange(n_blocks), :, np.arange(n_blocks)] = stored.reshape(n_blocks, rows, width)
    return full.reshape(n_blocks * rows, n_blocks * width)


def with_pooling(config: PeftConfig, delta: LowRank) -> ShapeDependentDelta:
    """Return the delta with A expanded from groups of inputs to inputs.

    A module that PEFT has not quantized has an ordinary A, which stays unchanged.
    """
    group = config.integer("qalora_group_size", 16, minimum=1)
    return ShapeDependentDelta((delta.shape[0], None), partial(_pooled, delta, group))


def _pooled(delta: LowRank, group: int, shape: tuple[int, int]) -> Delta:
    groups = delta.a.shape[1]
    if groups == shape[1] or groups * group != shape[1]:
        return delta
    return LowRank(np.repeat(as_float64(delta.a), group, axis=1), delta.b, delta.scaling * groups / group)
