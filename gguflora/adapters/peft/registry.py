"""The tables of PEFT methods and their readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from gguflora.adapters import mlx
from gguflora.adapters.base_shapes import BaseShapes
from gguflora.adapters.deltas import Delta, ShapeDependentDelta
from gguflora.adapters.peft import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    osf,
    peanut,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from gguflora.adapters.peft.config import MLX, PeftConfig
from gguflora.files.safetensors import Array

Reader = Callable[[PeftConfig, Mapping[str, Array]], Mapping[str, Delta | ShapeDependentDelta]]
ShapedReader = Callable[[PeftConfig, Mapping[str, Array], BaseShapes], Mapping[str, Delta]]

READERS: Final[dict[str, Reader]] = {
    "ADALORA": adalora.read_adalora,
    "BEFT": beft.read_beft,
    "BOFT": boft.read_boft,
    "C3A": c3a.read_c3a,
    "DEFT": deft.read_deft,
    "DELORA": delora.read_delora,
    "FOURIERFT": fourierft.read_fourierft,
    "FROD": frod.read_frod,
    "GLORA": glora.read_glora,
    "GRALORA": gralora.read_gralora,
    "HIRA": hira.read_hira,
    "HRA": hra.read_hra,
    "IA3": ia3.read_ia3,
    "LN_TUNING": ln_tuning.read_ln_tuning,
    "LOHA": loha.read_loha,
    "LOKR": lokr.read_lokr,
    "LORA": lora.read_lora,
    "MISS": miss.read_miss,
    MLX: mlx.read_mlx,
    "OFT": oft.read_oft,
    "OSF": osf.read_osf,
    "PEANUT": peanut.read_peanut,
    "ROAD": road.read_road,
    "SHIRA": shira.read_shira,
    "SUPERTUNING": supertuning.read_supertuning,
    "TINYLORA": tinylora.read_tinylora,
    "TRAINABLE_TOKENS": trainable_tokens.read_trainable_tokens,
    "VBLORA": vblora.read_vblora,
    "WAVEFT": waveft.read_waveft,
}
"""Reader of each method, by the ``peft_type`` of the configuration.

A reader gets the configuration and the tensors of its method. It returns the delta of every adapted weight, by the
weight's name in the Hugging Face model (``model.layers.0.self_attn.q_proj.weight``). `modules_to_save` reads complete
weights that are saved with them.
"""

SHAPED_READERS: Final[dict[str, ShapedReader]] = {
    "PVERA": vera.read_pvera,
    "RANDLORA": randlora.read_randlora,
    "UNILORA": unilora.read_unilora,
    "VERA": vera.read_vera,
}
"""Reader of each method in which the delta of a weight depends on the shapes of other weights of the base."""
