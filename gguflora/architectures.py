"""Where a Hugging Face module lies in a GGUF file, and in which order its rows lie there.

Names come from gguf's ``TensorNameMap``; what llama.cpp's converter does beyond renaming is stated here, a rule a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gguflora import quants
from gguflora.adapters import Adapter
from gguflora.base_model import BaseModel
from gguflora.deltas import LowRank
from gguflora.errors import AdapterError, ArchitectureError, MismatchError, UnsupportedAdapterError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile
from gguflora.files.safetensors import Array, as_float32

MAX_COPY_DIFFERENCE: Final = 0.4
"""Of a base's weight and a copy of it: more than any quantization to 2 bits or more makes."""
COPY_WEIGHTS: Final = 1 << 20
"""Compared at once."""

RowOrder = Callable[[BaseModel, str, int], NDArray[np.intp]]
"""From a base, a tensor and its layer to the order in which GGUF stores the tensor's rows."""


def _rotary_q(base: BaseModel, tensor: str, layer: int) -> NDArray[np.intp]:
    return _interleaved(base, tensor, base.n_head[layer : layer + 1])


def _rotary_k(base: BaseModel, tensor: str, layer: int) -> NDArray[np.intp]:
    return _interleaved(base, tensor, base.n_head_kv[layer : layer + 1])


def _interleaved(base: BaseModel, tensor: str, n_heads: tuple[int, ...]) -> NDArray[np.intp]:
    """Within each head: row 0 of the first half, row 0 of the second, row 1 of the first, ...

    Hugging Face rotates row i with row i + head_dim / 2; ggml's plain rotary embedding rotates neighbours.
    """
    heads, rows = n_heads[0] if n_heads else 0, base.shapes[tensor][0]
    if heads < 1 or rows % (2 * heads):
        raise MismatchError(f"{base.path}: {tensor!r} has {rows} rows, which {heads} attention heads cannot share")
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


ROW_ORDERS: Final[dict[str, dict[str, RowOrder]]] = {
    "llama": {"attn_q": _rotary_q, "attn_k": _rotary_k},  # mistral too
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
}
"""The architectures gguflora knows, each with the tensors whose rows GGUF stores in another order."""


def place(adapter: Adapter, base: BaseModel) -> dict[str, LowRank]:
    """The adapter's changes by GGUF tensor, rows in GGUF's order, every one checked against the base.

    Raises:
        ArchitectureError: if the base's architecture is unknown, or modules of the adapter have no place in it.
        MismatchError: if shapes or architectures differ.
        UnsupportedAdapterError: if a tied embedding is changed.
    """
    if base.architecture not in ROW_ORDERS:
        raise ArchitectureError(
            f"{base.path}: architecture {base.architecture!r} is not supported; supported: {', '.join(ROW_ORDERS)}"
        )
    if adapter.architecture is None:
        return _place_modules(adapter, base)
    if adapter.architecture != base.architecture:
        raise MismatchError(
            f"{adapter.path}: was made for architecture {adapter.architecture!r}, "
            f"but {base.path} is {base.architecture!r}"
        )
    for tensor, change in adapter.changes.items():
        _check_fits(f"{adapter.path}: {tensor!r}", base, tensor, change)
    return dict(adapter.changes)


def _place_modules(adapter: Adapter, base: BaseModel) -> dict[str, LowRank]:
    names = _tensor_names(base)
    tensors = {module: _tensor_of(names, module) for module in adapter.changes}
    strangers = [module for module, tensor in tensors.items() if tensor is None]
    if strangers:
        raise ArchitectureError(
            f"{adapter.path}: {len(strangers)} of {len(tensors)} modules have no place in {base.path} "
            f"({base.architecture}): {', '.join(strangers[:8])}{' ...' if len(strangers) > 8 else ''}; "
            "is it the right base?"
        )
    placed: dict[str, LowRank] = {}
    for module, tensor in tensors.items():
        assert tensor is not None
        if tensor in placed:
            raise AdapterError(f"{adapter.path}: two modules change {tensor!r}, the second is {module!r}")
        _check_fits(f"{adapter.path}: module {module!r}", base, tensor, adapter.changes[module])
        placed[tensor] = _in_gguf_order(base, tensor, adapter.changes[module])
    _check_copies(adapter, base, names)
    order = {name: index for index, name in enumerate(base.shapes)}
    return dict(sorted(placed.items(), key=lambda item: order[item[0]]))


def _check_copies(adapter: Adapter, base: BaseModel, names: Any) -> None:  # noqa: ANN401
    """The base's weights that lie beside an adapted embedding must be those of this base: they would replace them."""
    for module, copy in adapter.copies.items():
        what, tensor = f"{adapter.path}: '{module}.base_layer.weight'", _tensor_of(names, module)
        if tensor not in (TOKEN_EMBEDDING, OUTPUT) or module not in adapter.changes:
            raise UnsupportedAdapterError(f"{what} would replace a weight of the base, which this version cannot do")
        if copy.shape != base.shapes[tensor]:
            raise UnsupportedAdapterError(
                f"{what} is {copy.shape}, but {tensor!r} of {base.path} is {base.shapes[tensor]}: "
                "the vocabulary was resized, which this version cannot do"
            )
        if base.path.is_file() and (difference := _difference(base, tensor, copy)) > MAX_COPY_DIFFERENCE:
            raise UnsupportedAdapterError(
                f"{what} differs from {tensor!r} of {base.path} by {difference:.0%}: it was trained or belongs to "
                "another base; this version cannot replace weights"
            )


def _difference(base: BaseModel, tensor: str, copy: Array) -> float:
    """Norm of the difference of a weight and the base's, dequantized, relative to the norm of the base's."""
    error = norm = 0.0
    with GgufFile(base.path) as file:
        entry = file.tensors[tensor]
        step = max(1, COPY_WEIGHTS // entry.n_in)
        for first in range(0, entry.n_rows, step):
            last = min(first + step, entry.n_rows)
            own = quants.dequantize(file.read_rows(entry, first, last), entry.type.id)
            error += float(np.square(own - as_float32(copy[first:last]), dtype=np.float64).sum())
            norm += float(np.square(own, dtype=np.float64).sum())
    return float(np.sqrt(error / norm)) if norm else float(error > 0)


def _tensor_names(base: BaseModel) -> Any:  # noqa: ANN401  (gguf.TensorNameMap)
    import gguf  # noqa: PLC0415  (slow to import)

    known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[base.architecture], base.n_layers)


def _tensor_of(names: Any, module: str) -> str | None:  # noqa: ANN401
    """The GGUF name of a module's weight, or None.

    Multimodal models hold the language model one level deeper, bare models (``AutoModel``) one level higher.
    """
    path = module.replace("language_model.", "")
    name = names.get_name(path) or names.get_name(f"model.{path}")
    return f"{name}.weight" if name else None


def _in_gguf_order(base: BaseModel, tensor: str, change: LowRank) -> LowRank:
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    order = ROW_ORDERS[base.architecture].get(found[2]) if found else None
    return change.with_rows(order(base, tensor, int(found[1]))) if found and order else change


def _check_fits(what: str, base: BaseModel, tensor: str, change: LowRank) -> None:
    shape = base.shapes.get(tensor)
    if tensor == OUTPUT and base.is_tied:
        raise UnsupportedAdapterError(
            f"{what} changes the output weight, but {base.path} has none of its own: it is tied to the token embedding"
        )
    if shape is None:
        raise MismatchError(f"{what} changes {tensor!r}, which {base.path} does not have; is it the right base?")
    if change.shape != shape:
        raise MismatchError(
            f"{what} changes a weight of shape {change.shape}, but {tensor!r} of {base.path} is {shape}; "
            "is it the right base?"
        )
    if tensor == TOKEN_EMBEDDING and base.is_tied:
        raise UnsupportedAdapterError(
            f"{what} changes the token embedding of {base.path}, which is also its output weight (tied): "
            "llama.cpp aborts on such an adapter, and a merge would change the output as well"
        )
