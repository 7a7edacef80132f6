"""Where a Hugging Face weight lies in a base model: the tensor slices of `slices_of`."""

from __future__ import annotations

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.experts import slices_of_expert
from gguflora.architectures.hf_names import candidates
from gguflora.architectures.names import canonical, check_named, layer_and_module, tensor_of
from gguflora.architectures.orders import as_they_are
from gguflora.architectures.regions import region_of
from gguflora.architectures.rules import KNOWN, PLAIN, Rules
from gguflora.architectures.splits import norm_of_head
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.errors import MismatchError
from gguflora.quants.arrays import Indices

_MOST = 1 << 10
"""Positions that RoBERTa may skip: one more than the number of its padding token."""


def slices_of(base: BaseModel, weight: str) -> list[TensorSlice]:
    """Where a Hugging Face weight lies in the base: its slices, none if it has no place there.

    Args:
        base: the base model.
        weight: the weight's name, for example ``model.layers.0.self_attn.q_proj.weight``; expert e of a stacked
            parameter (n_experts, ..) is named ``<parameter>.<e>``. The weight is taken to be (n_out, n_in), also where
            the Hugging Face model keeps it transposed (GPT-2's Conv1D, the experts of gpt-oss and Llama 4).

    Raises:
        ArchitectureError: if gguf knows no tensor names for the base's architecture.
        MismatchError: if the base's tensors cannot hold the weight as its architecture says.
    """
    rules, path = KNOWN.get(base.architecture, PLAIN), canonical(weight)
    slices = slices_of_expert(base, path, interleaved=rules.interleaved) or norm_of_head(base, path)
    if slices:
        return slices
    layer, module, kind = layer_and_module(path)
    if module in rules.splits:
        return rules.splits[module](base, layer, kind)
    tensor = tensor_of(base, path)
    return [] if tensor is None else [_slice(base, rules, tensor)]


def adaptable_weights(base: BaseModel) -> dict[str, list[TensorSlice]]:
    """The base's weights that a LoRA may change, with their slices, by their names in the Hugging Face model.

    Raises:
        ArchitectureError: if the names of the architecture's modules are not known.
    """
    placed = {weight: _slices_if_any(base, weight) for weight in candidates(base)}
    return {weight: slices for weight, slices in placed.items() if slices}


def _slices_if_any(base: BaseModel, weight: str) -> list[TensorSlice]:
    """`slices_of` a weight that the base may have; none if it does not (a linear layer's in one of attention)."""
    try:
        slices = slices_of(base, weight)
    except MismatchError:
        return []
    return slices if all(tensor_slice.tensor in base.shapes for tensor_slice in slices) else []


def _slice(base: BaseModel, rules: Rules, tensor: str) -> TensorSlice:
    region = region_of(base, tensor)
    if region is None:
        return TensorSlice(tensor)
    layer, module, _ = layer_and_module(tensor)
    rows, columns = rules.rows.get(module), rules.columns.get(module)
    shape = base.shapes[region.tensor]
    return TensorSlice(
        region.tensor,
        region.start,
        rows=rows(base, layer, region.n_rows) if rows else region.all_rows,
        columns=columns(base, layer, shape[-1]) if columns else None,
        transposed=module == "ffn_gate_inp_shexp" and len(shape) == 1,  # older files have this one row as a vector
        shift=1.0 if rules.plus_one and rules.plus_one.search(tensor) else 0.0,
    )


def key_order(base: BaseModel, layer: int, n_kv: int) -> Indices:
    """The order in which llama.cpp keeps the ``n_kv`` numbers of a layer's keys, of all heads, of the Hugging Face."""
    return KNOWN.get(base.architecture, PLAIN).rows.get("attn_k", as_they_are)(base, layer, n_kv)


def check_known(base: BaseModel) -> None:
    """Raise ``ArchitectureError`` if neither gguflora nor gguf knows the base's architecture."""
    if base.architecture not in KNOWN:
        check_named(base)


def is_conv1d(base: BaseModel, weight: str) -> bool:
    """Whether Hugging Face keeps this weight as (n_in, n_out), so that one saved whole must be transposed."""
    pattern = KNOWN.get(base.architecture, PLAIN).conv1d
    return bool(pattern and pattern.search(weight))


def is_transposed_expert(base: BaseModel, weight: str) -> bool:
    """Whether Hugging Face keeps an expert's part of a stack, ``<parameter>.<e>``, as (n_in, n_out)."""
    stack, _, expert = weight.rpartition(".")
    return KNOWN.get(base.architecture, PLAIN).experts_transposed and expert.isdecimal() and ".experts." in stack


def decay_of(base: BaseModel, weight: str) -> TensorSlice | None:
    """The place of a state space's ``A_log``, which GGUF holds as ``-exp(A_log)``, or None if it is not that."""
    if not weight.endswith("A_log"):
        return None
    layer, _, _ = layer_and_module(canonical(weight))
    tensor = f"blk.{layer}.ssm_a"
    order = KNOWN.get(base.architecture, PLAIN).rows.get("ssm_dt")  # of the heads, as in the biases of time steps
    rows = order(base, layer, base.shapes[tensor][0]) if order and tensor in base.shapes else None
    return TensorSlice(tensor, rows=rows)


def can_untie(base: BaseModel) -> bool:
    """Whether llama.cpp would load an output weight of its own beside the base's token embedding."""
    return KNOWN.get(base.architecture, PLAIN).has_output


def is_cut(base: BaseModel) -> bool:
    """Whether GGUF leaves out the last rows of the token embedding, which stand for no token."""
    return KNOWN.get(base.architecture, PLAIN).cuts_vocabulary


def cut_positions(base: BaseModel, tensor: str, n_rows: int) -> int:
    """How many of the first rows of a weight of ``n_rows`` GGUF leaves out: RoBERTa's positions before the first."""
    excess = n_rows - base.shapes.get(tensor, (n_rows,))[0]
    return excess if base.architecture == "bert" and tensor == "position_embd.weight" and 0 < excess < _MOST else 0


def unknown_warning(base: BaseModel) -> str | None:
    """What to tell the user about an architecture that gguflora has no rules for."""
    if base.architecture in KNOWN:
        return None
    return f"architecture {base.architecture} is not known to gguflora: tensors were matched by name and shape only"
