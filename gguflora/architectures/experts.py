"""The weights of experts, which GGUF stacks in one tensor (n_experts, n_out, n_in).

Checkpoints have a module for each expert (``experts.3.gate_proj.weight``, ``experts.3.w1.weight``). transformers 5
holds all experts of a layer in one parameter, with gate and up fused (``experts.gate_up_proj``); here its expert 3 is
named ``experts.gate_up_proj.3``. unsloth's gpt-oss has ``experts.gate_up_projs.3.weight``. GraniteMoE checkpoints have
``input_linear.weight`` and ``output_linear.weight``, those of Step-3.5 ``moe.gate_proj.weight``.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.regions import region_of
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.quants.arrays import Indices

_LAYER: Final = r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:\w+\.)?"
_ONE: Final = r"experts\.(?P<expert>\d+)\.(?P<name>gate_proj|up_proj|down_proj|w1|w2|w3)(?P<kind>\.weight|\.bias)"
_UNSLOTH: Final = r"experts\.(?P<name>gate_up_proj|down_proj)s\.(?P<expert>\d+)(?P<kind>\.weight)"
_OF_ALL: Final = (
    r"(?:experts\.(?P<name>gate_up_proj|gate_proj|up_proj|down_proj)|(?P<linear>input_linear|output_linear)\.weight|"
    r"moe\.(?P<stack>gate_proj|up_proj|down_proj)\.weight)"
    r"\.(?P<expert>\d+)"
)
_MODULE: Final = re.compile(_LAYER + _ONE)
_LISTED: Final = re.compile(_LAYER + _UNSLOTH)
_STACKED: Final = re.compile(_LAYER + _OF_ALL)
_BIASES: Final = re.compile(_LAYER + r"experts\.(?P<name>gate_up_proj|down_proj)_bias")

_TENSORS: Final = {
    **{"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
    **{"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
    "output_linear": "ffn_down_exps",
}
"""GGUF's name of each kind of weight; a kind that is missing here holds gate and up."""


def expert_slices(base: BaseModel, path: str, *, interleaved: bool) -> list[TensorSlice]:
    """Return the slices of an expert's weight or of a stack of biases; an empty list if ``path`` names neither.

    Args:
        base: the base model.
        path: canonical name of the weight.
        interleaved: whether the rows of fused gate and up alternate.
    """
    match = _MODULE.fullmatch(path) or _LISTED.fullmatch(path) or _STACKED.fullmatch(path)
    if match:
        parts = match.groupdict()
        name, kind = parts["name"] or parts.get("linear") or parts["stack"], parts.get("kind") or ".weight"
        tensors = _tensors(int(match["layer"]), name, kind)
        return _fused(base, tensors, int(match["expert"]), interleaved)
    if biases := _BIASES.fullmatch(path):
        return _bias_columns(base, _tensors(int(biases["layer"]), biases["name"], ".bias"), interleaved)
    return []


def _tensors(layer: int, name: str, kind: str) -> list[str]:
    names = [_TENSORS[name]] if name in _TENSORS else ["ffn_gate_exps", "ffn_up_exps"]
    return [f"blk.{layer}.{tensor}{kind}" for tensor in names]


def _fused(base: BaseModel, tensors: list[str], expert: int, interleaved: bool) -> list[TensorSlice]:
    regions = [region_of(base, tensor) for tensor in tensors]
    known = [region for region in regions if region is not None]
    if len(known) < len(tensors):
        return [TensorSlice(tensor) for tensor in tensors]
    orders = _shares([region.n_rows for region in known], interleaved)
    return [
        TensorSlice(region.tensor, region.start + expert * region.stride, rows=rows)
        for region, rows in zip(known, orders, strict=True)
    ]


def _bias_columns(base: BaseModel, tensors: list[str], interleaved: bool) -> list[TensorSlice]:
    if any(tensor not in base.shapes for tensor in tensors):
        return [TensorSlice(tensor) for tensor in tensors]
    orders = _shares([base.shapes[tensor][-1] for tensor in tensors], interleaved)
    return [TensorSlice(tensor, columns=columns) for tensor, columns in zip(tensors, orders, strict=True)]


def _shares(sizes: list[int], interleaved: bool) -> list[Indices]:
    """Return the rows of a fused weight that belong to each of its parts."""
    if interleaved and len(sizes) > 1:
        return [np.arange(index, len(sizes) * size, len(sizes)) for index, size in enumerate(sizes)]
    stops = np.cumsum(sizes)
    return [np.arange(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
