"""The weights of a vision or audio tower and its projector in an ``mmproj`` file (``general.architecture`` is clip).

Source: gguf's ``TensorNameMap`` of MMPROJ, and the classes below ``MmprojModel`` in llama.cpp's ``conversion/*.py``;
tests/merging/test_mmproj.py runs the converter on a model of each projector in `CHECKED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.orders import rotary_k, rotary_q
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.errors import UnsupportedAdapterError

CLIP: Final = "clip"

CHECKED: Final = frozenset(
    {
        *("gemma3", "idefics3", "internvl", "llama4", "pixtral", "qwen2.5vl_merger", "qwen2a", "qwen2vl_merger"),
        *("qwen3vl_merger", "ultravox", "voxtral"),
    }
)
"""Projector types whose converter is known to do no more to linear layers and norms than this module does."""

_CONVOLUTIONS: Final = {
    "gemma3nv": "Gemma 3n, whose vision tower is a network of convolutions (MobileNetV5), and gguflora merges only "
    "linear layers; its audio tower lies in the same file and has not been checked",
}
"""Projector types that are refused for what the tower is."""

_KINDS: Final = (".weight", ".bias")
_LAYER: Final = re.compile(r"v\.blk\.(\d+)\.")
_QKV: Final = re.compile(r"(?P<before>.*\.)(?:(?P<attn>attn\.)qkv|attn_qkv)(?P<kind>\.weight|\.bias)?")
_ROTATED: Final = re.compile(r".*\.attention\.(?P<side>[qk])_proj(?:\.weight|\.bias)?")
_DEEPSTACK: Final = re.compile(r"visual\.deepstack_merger_list\.(\d+)\.(?:norm|linear_(fc[12]))(\.weight|\.bias)")
_DEEPSTACK_LAYER: Final = re.compile(r"v\.deepstack\.(\d{1,9})\.")
_MERGER: Final = {
    "visual.merger.linear_fc1": "mm.0",
    "visual.merger.linear_fc2": "mm.2",
    "visual.merger.norm": "v.post_ln",
}
"""Modules of Qwen3-VL's merger."""
_INTERNVL: Final = {
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
"""InternVL's projector in transformers, and under the name of the Hub."""


def vision_slices(base: BaseModel, weight: str, part: str) -> list[TensorSlice]:
    """Return the slices of tensors that hold a weight of a vision tower or projector; an empty list if there are none.

    Args:
        base: an mmproj file.
        weight: name of the weight.
        part: the same name from the component that names the part, such as ``vision_tower.``.

    Raises:
        UnsupportedAdapterError: for a convolution, whose weight GGUF reshapes or splits.
    """
    path = re.sub(r"_weight$", ".weight", part)  # Gemma 3's mm_input_projection_weight
    tensor = _tensor_of(base, path)
    if tensor is None:
        return _thirds(base, path)
    if len(base.shapes[tensor]) > 2 or f"{tensor}.1" in base.shapes:
        raise UnsupportedAdapterError(
            f"{base.path}: {weight!r} is a convolution, whose weight GGUF stores in another shape ({tensor!r}); only "
            "linear layers and norms of a vision part can be merged. Train without this module"
        )
    rows = None
    rotated = _ROTATED.fullmatch(path)
    if rotated and base.projector == "pixtral":
        order = rotary_q if rotated["side"] == "q" else rotary_k
        layer = _LAYER.match(tensor)
        rows = order(base, int(layer[1]) if layer else 0, base.shapes[tensor][0])
    shift = 1.0 if base.projector == "gemma3" and tensor == "mm.soft_emb_norm.weight" else 0.0
    return [TensorSlice(tensor, rows=rows, shift=shift)]


def doubt_about_vision(base: BaseModel) -> str | None:
    """Return why the layout of an mmproj file is not known, or None if it is."""
    if base.projector in CHECKED:
        return None
    if base.projector in _CONVOLUTIONS:
        return f"a projector of type {base.projector!r} belongs to {_CONVOLUTIONS[base.projector]}"
    return (
        f"gguflora has not checked what llama.cpp's converter does to a projector of type {base.projector or 'none'!r} "
        f"(checked: {', '.join(sorted(CHECKED))})"
    )


def _tensor_of(base: BaseModel, path: str) -> str | None:
    """Return the tensor of the base that holds a weight, or None."""
    return next((name for name in _tensor_names(base, path) if name in base.shapes), None)


def _tensor_names(base: BaseModel, path: str) -> Iterator[str]:
    kind = next((kind for kind in _KINDS if path.endswith(kind)), "")
    module = path.removesuffix(kind)
    if base.projector == "llama4" and module == "multi_modal_projector.linear_1":
        yield f"mm.model.fc{kind}"
    if base.projector == "internvl" and module in _INTERNVL:
        path = f"{_INTERNVL[module]}{kind}"
    if base.projector == "qwen3vl_merger":
        if module in _MERGER:
            yield f"{_MERGER[module]}{kind}"
        if match := _DEEPSTACK.fullmatch(path):
            yield from _deepstack(base, int(match[1]), match[2] or "norm", match[3])
    for candidate in _spellings(path):
        name: str | None = _name_map(base.n_layers).get_name(candidate, _KINDS)
        if name:
            yield name


def _deepstack(base: BaseModel, index: int, module: str, kind: str) -> Iterator[str]:
    """Yield the name of a module of Qwen3-VL's ``deepstack_merger_list``: GGUF numbers them by the tower's layers."""
    layers = sorted({int(found[1]) for found in map(_DEEPSTACK_LAYER.match, base.shapes) if found})
    if index < len(layers):
        yield f"v.deepstack.{layers[index]}.{module}{kind}"


def _spellings(path: str) -> Iterator[str]:
    """Yield the names under which the name map may have a weight: those of transformers 4 and 5, and of the Hub."""
    yield path
    yield f"model.{path}"
    owner, _, rest = path.partition(".")
    if owner == "vision_tower" and not rest.startswith("vision_model."):
        yield f"vision_tower.vision_model.{rest}"
    if owner == "multi_modal_projector":
        yield f"audio.{path}"
    if owner == "vision_model":
        yield f"vision_tower.{path}"


def _thirds(base: BaseModel, path: str) -> list[TensorSlice]:
    """Return the slices of a fused ``attn.qkv`` whose thirds GGUF stores as q, k and v."""
    match = _QKV.fullmatch(path)
    if match is None:
        return []
    kind = match["kind"] or ""
    for spelling in ("attn.{}", "self_attn.{}_proj"):
        tensors = [_tensor_of(base, f"{match['before']}{spelling.format(side)}{kind}") for side in "qkv"]
        if all(tensors):
            break
    slices, start = [], 0
    for tensor in tensors:
        if tensor is None:
            return []
        n_rows = base.shapes[tensor][0]
        slices.append(TensorSlice(tensor, rows=np.arange(start, start + n_rows)))
        start += n_rows
    return slices


_MOST_LAYERS: Final = 1 << 10
"""Of a tower; the map takes some kilobytes for each, and a damaged file may claim billions."""


@lru_cache(maxsize=4)
def _name_map(n_layers: int) -> Any:  # noqa: ANN401  (gguf.TensorNameMap)
    import gguf  # noqa: PLC0415  (slow to import)

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, min(max(n_layers, 4), _MOST_LAYERS))
