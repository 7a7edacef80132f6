"""Map the deltas of an adapter to the tensors of a base, and check that they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.deltas import (
    Delta,
    FunctionDelta,
    LowRank,
    Replace,
    ReplaceRows,
    ShapeDependentDelta,
    as_float64,
    equal,
)
from gguflora.adapters.peft.pooler import is_left_out
from gguflora.architectures import TensorSlice
from gguflora.architectures.base_model import BaseModel, flat_shape
from gguflora.architectures.mapping import (
    check_known,
    cut_positions,
    decay_of,
    is_conv1d,
    is_cut,
    is_transposed_expert,
    slices_of,
)
from gguflora.architectures.modules import linear_modules
from gguflora.architectures.names import CLASSIFIER, is_classifier, is_foreign, nearest_names
from gguflora.architectures.unruled import doubt_about
from gguflora.architectures.vision import CLIP, doubt_about_vision
from gguflora.errors import ArchitectureError, MismatchError, listed
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Shape
from gguflora.quants.arrays import Float64Array

FLOATS: Final = {"F32", "F16", "BF16", "F64"}
"""Types of unquantized weights."""

_PER_LAYER_EMBEDDING: Final = "per_layer_token_embd.weight"
"""Gemma 3n's embedding for each layer, which GGUF pads to the rows of the token embedding."""

_MAX_PADDING: Final = 1024
"""Upper bound of the rows that pad a vocabulary; a larger difference means another vocabulary."""


@dataclass(frozen=True, slots=True, eq=False)
class PlacedDelta:
    """A delta of a Hugging Face weight, restricted to one slice of a GGUF tensor.

    Attributes:
        weight: name of the Hugging Face weight; for a GGUF LoRA, of the GGUF tensor.
        delta: the delta of the weight.
        tensor_slice: the part of the weight and its place in the tensor.
    """

    weight: str
    delta: Delta
    tensor_slice: TensorSlice

    @property
    def shape(self) -> Shape:
        """Shape (rows, columns) of the slice as GGUF stores it."""
        columns = self.delta.shape[1] if self.tensor_slice.columns is None else len(self.tensor_slice.columns)
        n_rows = self.delta.shape[0] if self.tensor_slice.rows is None else len(self.tensor_slice.rows)
        return (columns, n_rows) if self.tensor_slice.transposed else (n_rows, columns)

    def low_rank(self) -> LowRank | None:
        """Return the delta of the slice as GGUF stores it, or None if it is not low-rank."""
        if not isinstance(self.delta, LowRank):
            return None
        part = self.delta.at(self.tensor_slice.rows, self.tensor_slice.columns)
        return part.transposed() if self.tensor_slice.transposed else part

    @property
    def by_rows(self) -> bool:
        """Whether `compute` works on some of the rows; otherwise use `take` on the delta of the whole weight."""
        return not (self.delta.whole or self.tensor_slice.transposed or self.tensor_slice.columns is not None)

    def compute(self, stored: Float64Array, start: int) -> Float64Array:
        """Return ``W' - W`` of some rows of the slice.

        Args:
            stored: values of the rows in the base, (n, columns).
            start: number of the first of these rows in the slice.
        """
        numbers = np.arange(start, start + len(stored))
        rows = numbers if self.tensor_slice.rows is None else self.tensor_slice.rows[numbers]
        return self.delta.compute(stored - self.tensor_slice.shift, rows)

    def take(self, weight: Float64Array) -> Float64Array:
        """Return this slice of an array with the shape of the Hugging Face weight, in GGUF's orientation."""
        part = weight if self.tensor_slice.rows is None else weight[self.tensor_slice.rows]
        part = part if self.tensor_slice.columns is None else part[:, self.tensor_slice.columns]
        return part.T if self.tensor_slice.transposed else part

    def put(self, stored: Float64Array, weight: Float64Array) -> None:
        """Write the values of this slice, as GGUF stores them, to their place in the Hugging Face weight."""
        part = (stored.T if self.tensor_slice.transposed else stored) - self.tensor_slice.shift
        rows = np.arange(part.shape[0]) if self.tensor_slice.rows is None else self.tensor_slice.rows
        columns = np.arange(part.shape[1]) if self.tensor_slice.columns is None else self.tensor_slice.columns
        weight[np.ix_(rows, columns)] = part


@dataclass(frozen=True, slots=True)
class _BaseModelShapes:
    """The `BaseShapes` of a base model."""

    base: BaseModel

    def shape(self, weight: str) -> tuple[int, int]:
        if is_left_out(weight):
            width = self.base.shapes.get(TOKEN_EMBEDDING, (0, 0))[-1]
            return width, 1 if weight.endswith(".bias") else width
        slices = slices_of(self.base, weight)
        if not slices:
            raise ArchitectureError(
                f"{self.base.path} ({self.base.architecture}) has no place for the weight {weight!r}; is it the right "
                "base?"
            )
        shape = _weight_shape(self.base, slices)
        if shape is None:
            raise MismatchError(f"{self.base.path} does not have {slices[0].tensor!r} for {weight!r}")
        return shape

    def linear_modules(self) -> list[str]:
        return [module for module in linear_modules(self.base) if self._has(f"{module}.weight")]

    def _has(self, weight: str) -> bool:
        if is_left_out(weight):
            return True
        try:
            slices = slices_of(self.base, weight)
        except MismatchError:  # its place depends on tensors that this layer does not have
            return False
        tied = {OUTPUT} if self.base.is_tied else set()
        return bool(slices) and all(tensor_slice.tensor in self.base.shapes.keys() | tied for tensor_slice in slices)


def place(adapter: Adapter, base: BaseModel) -> dict[str, list[PlacedDelta]]:
    """Map the deltas of an adapter to the base's tensors, and check each against the base.

    Returns:
        The placed deltas by GGUF tensor, in the order of the base's tensors. If the base's output weight is tied to
        the token embedding, deltas of the output are listed as ``output.weight``.

    Raises:
        ArchitectureError: if the base's architecture is unknown, or weights of the adapter have no place in it.
        MismatchError: if shapes or architectures differ.
    """
    check_known(base)
    if adapter.architecture not in {None, base.architecture}:
        raise MismatchError(
            f"{adapter.path}: was made for architecture {adapter.architecture!r}, "
            f"but {base.path} is {base.architecture!r}"
        )
    placed: dict[str, list[PlacedDelta]] = {}
    unknown_weights, doubts = [], dict[str, list[str]]()
    all_deltas = adapter.deltas_of(_BaseModelShapes(base))
    _check_stacks(adapter, base, all_deltas)
    for weight, deltas in all_deltas.items():
        if (_are_optional(deltas) and not _has(base, weight)) or is_left_out(weight):
            continue
        slices = _slices(base, weight, deltas) if adapter.architecture is None else [_slice_of_tensor(base, weight)]
        if not slices:
            unknown_weights.append(weight)
            continue
        if adapter.architecture is None and (doubt := _doubt(base, weight, slices)):
            doubts.setdefault(doubt, []).append(weight)
            continue
        where = f"{adapter.path}: {weight!r}"
        resolved = [_with_shape(where, base, _as_linear(base, weight, delta), slices) for delta in deltas]
        for tensor_slice in slices:
            padded = [_with_padding(base, tensor_slice, delta) for delta in resolved]
            items = [PlacedDelta(weight, delta, _without_padding(base, tensor_slice, delta)) for delta in padded]
            _check_covers(where, base, [item for item in items if item.tensor_slice is tensor_slice], slices)
            vocabulary = new_vocabulary(item.delta for item in items if item.tensor_slice.rows is None)
            for item in items:
                _check_fits(where, base, item, vocabulary)
            _check_one_name(adapter, base, placed.get(tensor_slice.tensor, ()), weight, tensor_slice)
            placed.setdefault(tensor_slice.tensor, []).extend(items)
    if unknown_weights:
        raise _unknown_error(adapter, base, unknown_weights, len(all_deltas))
    if doubts:
        raise ArchitectureError(
            f"{adapter.path}: gguflora does not know how {base.path} ({base.architecture}) holds some of its weights: "
            + "; ".join(f"{doubt} ({listed(weights, 4)})" for doubt, weights in doubts.items())
            + ". trust_names (--trust-names) applies the adapter by name and shape all the same; if rows have another "
            "order, the result is wrong"
        )
    if base.is_tied and TOKEN_EMBEDDING in placed:
        _tie(adapter, placed)
    order = {name: index for index, name in enumerate(base.shapes)}
    return dict(sorted(placed.items(), key=lambda entry: order.get(entry[0], len(order))))


def _unknown_error(adapter: Adapter, base: BaseModel, unknown: Sequence[str], n_weights: int) -> ArchitectureError:
    """Say which weights have no place in the base, and what may be meant."""
    shown = ", ".join(unknown[:8]) + (" ..." if len(unknown) > 8 else "")
    foreign = [weight for weight in unknown if is_foreign(weight)]
    nearest = {weight: near for weight in unknown[:3] if (near := nearest_names(base, weight))}
    if base.architecture == CLIP and (doubt := doubt_about_vision(base)):
        hint = doubt
    elif foreign:
        hint = (
            f"{len(foreign)} belong to another part of a multimodal model, which this file does not hold: take "
            "the language part with --text-only (text_only=True). llama.cpp computes the other part without adapters; "
            "gguflora merge MMPROJ.gguf --lora ... merges it into the model's mmproj file"
        )
    elif heads := [weight for weight in unknown if is_classifier(weight)]:
        hint = (
            f"{listed(heads, 2)} is a classification head, and the file holds none ({CLASSIFIER}). llama.cpp computes "
            "one for models of the BERT family, and where a qwen3 or llama-embed file holds one; take the head out of "
            "the adapter to use the rest"
        )
    elif nearest:
        hint = "; ".join(f"nearest to {weight} is {' or '.join(near)}" for weight, near in nearest.items())
    elif len(unknown) == n_weights:
        hint = "none of its names is one of this architecture; is it the right base?"
    else:
        hint = f"looked for them among the {len(base.shapes)} tensors of the base, by the names of {base.architecture}"
    return ArchitectureError(
        f"{adapter.path}: {len(unknown)} of {n_weights} weights have no place in {base.path} "
        f"({base.architecture}): {shown}; {hint}"
    )


def _check_one_name(
    adapter: Adapter, base: BaseModel, placed: Iterable[PlacedDelta], weight: str, tensor_slice: TensorSlice
) -> None:
    """Raise if an earlier weight with another name has the same place, so that the names are ambiguous."""
    if base.architecture == "t5" and tensor_slice.tensor == TOKEN_EMBEDDING:
        return  # one embedding under three names
    for item in placed:
        if item.weight != weight and _same_place(item.tensor_slice, tensor_slice):
            raise ArchitectureError(
                f"{adapter.path}: {item.weight!r} and {weight!r} both belong to {tensor_slice.tensor!r} of "
                f"{base.path}; keep the tensors of one of them"
            )


def _same_place(one: TensorSlice, other: TensorSlice) -> bool:
    return (
        one.start == other.start
        and (one.rows is None) == (other.rows is None)
        and (one.columns is None) == (other.columns is None)
        and np.array_equal(one.rows if one.rows is not None else 0, other.rows if other.rows is not None else 0)
        and np.array_equal(
            one.columns if one.columns is not None else 0, other.columns if other.columns is not None else 0
        )
    )


def _doubt(base: BaseModel, weight: str, slices: Sequence[TensorSlice]) -> str | None:
    """Return why the layout of a weight is not known; None if it is, or if the user trusts the names."""
    if base.trust_names:
        return None
    tensors = dict.fromkeys(tensor_slice.tensor for tensor_slice in slices)
    return next((doubt for tensor in tensors if (doubt := doubt_about(base, weight, tensor))), None)


def _is_copy(item: PlacedDelta) -> bool:
    return isinstance(item.delta, Replace) and item.delta.is_base_copy


def _slice_of_tensor(base: BaseModel, name: str) -> TensorSlice:
    """Return the slice for a name in a GGUF LoRA: a tensor, or ``<tensor>.<e>`` for expert e of a tensor."""
    tensor, _, expert = name.rpartition(".")
    shape = base.shapes.get(tensor, ())
    if not expert.isdecimal() or len(shape) != 3:
        return TensorSlice(name)
    return TensorSlice(tensor, int(expert) * shape[1], rows=np.arange(shape[1]))


def _check_stacks(adapter: Adapter, base: BaseModel, weights: Iterable[str]) -> None:
    """Raise unless the adapter changes all experts of a stack, ``<parameter>.<e>``, or none."""
    stacks = Counter(weight.rpartition(".")[0] for weight in weights if weight.rpartition(".")[2].isdecimal())
    for stack, count in stacks.items():
        tensor = (
            stack
            if adapter.architecture
            else next((tensor_slice.tensor for tensor_slice in slices_of(base, f"{stack}.0")), "")
        )
        shape = base.shapes.get(tensor, ())
        if len(shape) == 3 and shape[0] != count:
            raise MismatchError(
                f"{adapter.path}: {stack!r} changes {count} experts, but {tensor!r} of {base.path} has {shape[0]}; is "
                "it the right base?"
            )


def _slices(base: BaseModel, weight: str, deltas: Sequence[Delta | ShapeDependentDelta]) -> list[TensorSlice]:
    """Return `slices_of` a weight, and in two special cases more.

    ``A_log`` has a place for deltas that replace it. The output weight has a place even if GGUF knows the architecture
    only with a tied one.
    """
    decay = decay_of(base, weight)
    if decay is not None:
        return [decay] if all(isinstance(delta, Replace) for delta in deltas) else []
    slices = slices_of(base, weight)
    is_output = weight == "lm_head.weight" or weight.endswith(".lm_head.weight")
    return [TensorSlice(OUTPUT)] if not slices and base.is_tied and is_output else slices


def _tie(adapter: Adapter, placed: dict[str, list[PlacedDelta]]) -> None:
    """Apply deltas of the embedding to a tied output as well, as PEFT does.

    Trained tokens apply to both. Other deltas apply to both if the adapter was trained with tied weights; such an
    adapter may hold them once or twice.
    """
    embedding = placed[TOKEN_EMBEDDING]
    if _are_saved_apart(embedding, placed.get(OUTPUT, [])):
        return
    output = [item for item in placed.get(OUTPUT, []) if not _is_copy(item)]
    trained = [item for item in embedding if not _is_copy(item)]
    if len(trained) == len(output) and all(
        equal(one.delta, other.delta) for one, other in zip(trained, output, strict=True)
    ):
        placed[OUTPUT] = embedding
        return
    shares_all = adapter.ensure_weight_tying and not output
    shared = [item for item in embedding if shares_all or _is_copy(item) or isinstance(item.delta, ReplaceRows)]
    if shared:
        placed[OUTPUT] = [*shared, *output]


def _are_saved_apart(embedding: Sequence[PlacedDelta], output: Sequence[PlacedDelta]) -> bool:
    """Whether an adapter holds embedding and output as whole weights that differ, so that its model did not tie them.

    Each is then compared with the base on its own: a copy is left out, and an output that was changed unties the base.
    """
    first, second = (next((item.delta for item in items if _is_copy(item)), None) for items in (embedding, output))
    return first is not None and second is not None and not equal(first, second)


def _as_linear(base: BaseModel, weight: str, delta: Delta | ShapeDependentDelta) -> Delta | ShapeDependentDelta:
    """Return the delta with (n_out, n_in) orientation; a `Replace` has that of the Hugging Face model at first."""
    if not isinstance(delta, Replace):
        return delta
    if is_conv1d(base, weight) or is_transposed_expert(base, weight):
        return replace(delta, values=delta.values.T)
    if decay_of(base, weight) is not None:
        return replace(delta, values=-np.exp(as_float64(delta.values)))
    return delta


def _are_optional(deltas: Sequence[Delta | ShapeDependentDelta]) -> bool:
    return all(isinstance(delta, ShapeDependentDelta) and delta.optional for delta in deltas)


def _has(base: BaseModel, weight: str) -> bool:
    try:
        return any(tensor_slice.tensor in base.shapes.keys() - base.absent for tensor_slice in slices_of(base, weight))
    except MismatchError:  # its place depends on the shape it should have
        return False


def _with_shape(
    where: str, base: BaseModel, delta: Delta | ShapeDependentDelta, slices: Sequence[TensorSlice]
) -> Delta:
    if not isinstance(delta, ShapeDependentDelta):
        return delta
    shape = _weight_shape(base, slices)
    if shape is None:
        raise MismatchError(f"{where} changes {slices[0].tensor!r}, which {base.path} does not have")
    if any(known not in {None, size} for known, size in zip(delta.known, shape, strict=True)):
        known = ", ".join("any" if size is None else str(size) for size in delta.known)
        raise MismatchError(
            f"{where} changes a weight of shape ({known}), but {slices[0].tensor!r} of {base.path} holds one of shape "
            f"{shape}; is it the right base?"
        )
    return delta.build(shape)


def _weight_shape(base: BaseModel, slices: Sequence[TensorSlice]) -> tuple[int, int] | None:
    """Return the shape of the Hugging Face weight that a base holds in these slices, or None if it does not have it."""
    tensor_slice = slices[0]
    shape = base.shapes.get(TOKEN_EMBEDDING if tensor_slice.tensor == OUTPUT and base.is_tied else tensor_slice.tensor)
    if shape is None:
        return None
    n_out, n_in = (shape[0], 1) if len(shape) == 1 else shape[-2:]
    n_out, n_in = (n_in, n_out) if tensor_slice.transposed else (n_out, n_in)
    return _extent(slices, n_out, n_in)


def _extent(slices: Sequence[TensorSlice], n_out: int, n_in: int) -> tuple[int, int]:
    """Return the rows and columns that slices hold together; n_out and n_in where they do not number them."""
    rows = sum(len(tensor_slice.rows) for tensor_slice in slices if tensor_slice.rows is not None)
    columns = sum(len(tensor_slice.columns) for tensor_slice in slices if tensor_slice.columns is not None)
    return rows or n_out, columns or n_in


def _with_padding(base: BaseModel, tensor_slice: TensorSlice, delta: Delta) -> Delta:
    """Return a LoRA of embedding or output with rows of zeros for the rows that pad the base's vocabulary."""
    if not isinstance(delta, LowRank) or tensor_slice.tensor not in {TOKEN_EMBEDDING, OUTPUT, _PER_LAYER_EMBEDDING}:
        return delta
    held = tensor_slice.tensor if tensor_slice.tensor in base.shapes else TOKEN_EMBEDDING
    rows = base.shapes.get(held, (0,))[0]
    excess = rows - delta.shape[0]
    if not 0 < excess <= _MAX_PADDING:
        return delta
    return replace(delta, b=np.pad(delta.b, ((0, excess), (0, 0))))


def _without_padding(base: BaseModel, tensor_slice: TensorSlice, delta: Delta) -> TensorSlice:
    """Return the slice without the rows that GGUF drops: padding of a vocabulary to a multiple of 64, and positions."""
    skipped = cut_positions(base, tensor_slice.tensor, delta.shape[0])
    if skipped:
        return replace(tensor_slice, rows=np.arange(skipped, delta.shape[0]))
    rows = base.shapes[TOKEN_EMBEDDING][0] if tensor_slice.tensor in {TOKEN_EMBEDDING, OUTPUT} and is_cut(base) else 0
    excess = delta.shape[0] - rows
    if not rows or delta.shape[0] % 64 or not 0 < excess <= 64:
        return tensor_slice
    return replace(tensor_slice, rows=np.arange(rows))


def cautions(base: GgufFile, placed: Mapping[str, Sequence[PlacedDelta]]) -> tuple[str, ...]:
    """Return warnings for deltas that are computed from weights which the base holds quantized."""
    warnings = [
        item.delta.caution
        for name, items in placed.items()
        for item in items
        if isinstance(item.delta, FunctionDelta)
        and item.delta.caution
        and (base.tensors.get(name) or base.tensors[TOKEN_EMBEDDING]).type.name not in FLOATS
    ]
    return tuple(dict.fromkeys(warnings))


def _check_covers(where: str, base: BaseModel, items: list[PlacedDelta], slices: list[TensorSlice]) -> None:
    """Raise unless the slices, which hold every row and column once, add up to the shape of each delta."""
    for item in items:
        extent = _extent(slices, *item.delta.shape)
        if extent != item.delta.shape:
            raise MismatchError(
                f"{where} changes a weight of shape {item.delta.shape}, but {item.tensor_slice.tensor!r} of "
                f"{base.path} holds one of shape {extent}; is it the right base?"
            )


def new_vocabulary(deltas: Iterable[Delta]) -> int:
    """Return the number of rows that embedding and output need for these deltas; 0 if none replaces rows."""
    sizes = (delta.shape[0] for delta in deltas if isinstance(delta, Replace | ReplaceRows))
    return max(sizes, default=0)


def _check_fits(where: str, base: BaseModel, item: PlacedDelta, vocabulary: int) -> None:
    tensor, start = item.tensor_slice.tensor, item.tensor_slice.start
    shape = base.shapes.get(TOKEN_EMBEDDING if tensor == OUTPUT and base.is_tied else tensor)
    if shape is None:
        raise MismatchError(f"{where} changes {tensor!r}, which {base.path} does not have; is it the right base?")
    rows, columns = flat_shape(shape)
    part_rows, part_columns = item.shape
    if isinstance(item.delta, Replace | ReplaceRows) and tensor in {TOKEN_EMBEDDING, OUTPUT}:
        fits = part_columns == columns  # a resized vocabulary has another number of rows
    elif start or len(shape) > 2 or item.tensor_slice.rows is not None:
        fits = part_columns == columns and start + part_rows <= rows
    else:
        rows = max(rows, vocabulary) if tensor in {TOKEN_EMBEDDING, OUTPUT} else rows
        fits = (part_rows, part_columns) == (rows, columns)
    if not fits and tensor in {TOKEN_EMBEDDING, OUTPUT} and part_columns == columns and part_rows > rows:
        raise MismatchError(
            f"{where} was trained with a vocabulary of {part_rows} tokens, and {base.path} has {rows}; the "
            "adapter does not hold the weights of the new tokens. Save it with save_embedding_layers=True, or convert "
            "the resized model to GGUF and take that as the base"
        )
    if not fits:
        raise MismatchError(
            f"{where} changes a weight of shape {item.delta.shape}, but {tensor!r} of {base.path} is {shape}; "
            "is it the right base?"
        )
