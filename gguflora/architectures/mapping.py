"""Map Hugging Face weights to slices of the tensors of a base model."""

from __future__ import annotations

import re
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.experts import expert_slices
from gguflora.architectures.fused import fused_slices
from gguflora.architectures.hf_names import candidates
from gguflora.architectures.names import (
    canonical,
    check_named,
    is_foreign,
    is_unpermuted,
    layer_and_module,
    tensor_of,
    vision_part,
    without_owner,
)
from gguflora.architectures.orders import rotary_k, rotary_q, unchanged
from gguflora.architectures.regions import region_of
from gguflora.architectures.rules import KNOWN, PLAIN, Rules
from gguflora.architectures.splits import altup_slice, head_norm_slice
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.architectures.vision import CLIP, vision_slices
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

_HRM_STACK: Final = re.compile(r"(?:^|.*\.)(?P<stack>[LH])_module\.layers\.(?P<layer>\d+)\.")

_MAX_SKIPPED_POSITIONS = 1 << 10
"""Upper bound of the positions that RoBERTa skips: one more than the id of its padding token."""


def slices_of(base: BaseModel, weight: str) -> list[TensorSlice]:
    """Return the slices of tensors that hold a Hugging Face weight; an empty list if the architecture has none.

    Args:
        base: the base model.
        weight: name of the weight, for example ``model.layers.0.self_attn.q_proj.weight``; expert e of a stacked
            parameter (n_experts, ..) is named ``<parameter>.<e>``. The slices assume a weight (n_out, n_in), even where
            the Hugging Face model keeps it transposed (GPT-2's Conv1D, the experts of gpt-oss and Llama 4).

    Raises:
        ArchitectureError: if gguf has no tensor names for the base's architecture.
        MismatchError: if the shapes of the base's tensors do not agree with its architecture.
    """
    if base.architecture == CLIP:
        return vision_slices(base, weight, vision_part(weight)) if is_foreign(weight) else []
    path: str | None = None if is_foreign(weight) else _in_one_stack(base, canonical(weight))
    while path is not None:
        slices = _slices_of(base, path)
        if slices:
            return slices
        path = without_owner(path)
    return []


def _in_one_stack(base: BaseModel, path: str) -> str:
    """Return a name with the layer number that GGUF has, which puts HRM's high-level stack after the low-level one."""
    match = _HRM_STACK.search(path) if base.architecture == "hrm_text" else None
    if match is None:
        return path
    layer = int(match["layer"]) + (base.n_layers // 2 if match["stack"] == "H" else 0)
    return f"model.layers.{layer}.{path[match.end() :]}"


def _slices_of(base: BaseModel, path: str) -> list[TensorSlice]:
    """Return the slices of a weight, given its canonical name."""
    rules = KNOWN.get(base.architecture, PLAIN)
    slices = (
        expert_slices(base, path, interleaved=rules.interleaved)
        or head_norm_slice(base, path)
        or altup_slice(base, path)
    )
    if slices:
        return slices
    layer, module, kind = layer_and_module(path)
    if module in rules.splits:
        return rules.splits[module](base, layer, kind)
    fused = fused_slices(base, layer, module, kind, rules.rows)
    if fused:
        return fused
    tensor = tensor_of(base, path)
    return [] if tensor is None else [_slice(base, rules, tensor, unpermuted=is_unpermuted(path))]


def adaptable_weights(base: BaseModel) -> dict[str, list[TensorSlice]]:
    """Return the base's weights that a LoRA may change: their slices by the name in the Hugging Face model.

    Raises:
        ArchitectureError: if gguflora does not know the modules of the architecture.
    """
    placed = {weight: _slices_if_any(base, weight) for weight in candidates(base)}
    return {weight: slices for weight, slices in placed.items() if slices}


def _slices_if_any(base: BaseModel, weight: str) -> list[TensorSlice]:
    """Return `slices_of` a weight, or an empty list if this layer does not have it (as in models with mixed layers)."""
    try:
        slices = slices_of(base, weight)
    except MismatchError:
        return []
    return slices if all(tensor_slice.tensor in base.shapes for tensor_slice in slices) else []


def _slice(base: BaseModel, rules: Rules, tensor: str, *, unpermuted: bool) -> TensorSlice:
    region = region_of(base, tensor)
    if region is None:
        return TensorSlice(tensor)
    layer, module, _ = layer_and_module(tensor)
    rows, columns = rules.rows.get(module), rules.columns.get(module)
    if unpermuted and rows in {rotary_q, rotary_k}:
        rows = None  # the weight has GGUF's order already
    shape = base.shapes[region.tensor]
    return TensorSlice(
        region.tensor,
        region.start,
        rows=rows(base, layer, region.n_rows) if rows else region.all_rows,
        columns=columns(base, layer, shape[-1]) if columns else None,
        transposed=module == "ffn_gate_inp_shexp" and len(shape) == 1,  # older files hold the single row as a vector
        shift=1.0 if rules.plus_one and rules.plus_one.search(tensor) else 0.0,
    )


def key_order(base: BaseModel, layer: int, n_kv: int) -> Indices:
    """Return the order of a layer's ``n_kv`` key elements (all heads) in llama.cpp, as indices into Hugging Face's."""
    return KNOWN.get(base.architecture, PLAIN).rows.get("attn_k", unchanged)(base, layer, n_kv)


def check_known(base: BaseModel) -> None:
    """Raise ``ArchitectureError`` if neither gguflora nor gguf knows the base's architecture."""
    if base.architecture not in KNOWN and base.architecture != CLIP:
        check_named(base)


def is_conv1d(base: BaseModel, weight: str) -> bool:
    """Whether Hugging Face stores this weight as (n_in, n_out), so that a replacement for it must be transposed."""
    pattern = KNOWN.get(base.architecture, PLAIN).conv1d
    return bool(pattern and pattern.search(weight))


def is_transposed_expert(base: BaseModel, weight: str) -> bool:
    """Whether Hugging Face stores an expert of a stack, ``<parameter>.<e>``, as (n_in, n_out)."""
    stack, _, expert = weight.rpartition(".")
    return KNOWN.get(base.architecture, PLAIN).experts_transposed and expert.isdecimal() and ".experts." in stack


def decay_of(base: BaseModel, weight: str) -> TensorSlice | None:
    """Return the slice for ``A_log`` of a state-space layer, which GGUF stores as ``-exp(A_log)``; None for others."""
    if not weight.endswith("A_log"):
        return None
    layer, _, _ = layer_and_module(canonical(weight))
    tensor = f"blk.{layer}.ssm_a"
    order = KNOWN.get(base.architecture, PLAIN).rows.get("ssm_dt")  # one value per head, ordered like ssm_dt
    rows = order(base, layer, base.shapes[tensor][0]) if order and tensor in base.shapes else None
    return TensorSlice(tensor, rows=rows)


def can_untie(base: BaseModel) -> bool:
    """Whether llama.cpp loads a separate output weight for the base's architecture."""
    return KNOWN.get(base.architecture, PLAIN).has_output


def is_cut(base: BaseModel) -> bool:
    """Whether the converter drops the last rows of the token embedding, which do not belong to a token."""
    return KNOWN.get(base.architecture, PLAIN).cuts_vocabulary


def cut_positions(base: BaseModel, tensor: str, n_rows: int) -> int:
    """Return the number of leading rows of a weight that the converter drops: RoBERTa's unused first positions."""
    if base.architecture != "bert" or tensor != "position_embd.weight":
        return 0
    excess = n_rows - base.shapes.get(tensor, (n_rows,))[0]
    return excess if 0 < excess < _MAX_SKIPPED_POSITIONS else 0
