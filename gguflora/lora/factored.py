"""Adapters as pairs of low-rank factors, the form that the LoRA algebra works on.

Pairs are named after the weights of a Hugging Face model, or after GGUF tensors once a GGUF file is involved.
`for_base` converts the first kind of names to the second, `to_hf.for_model` the second to the first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.adapters.adapter import Adapter, read_adapter
from gguflora.adapters.deltas import (
    Delta,
    LowRank,
    Replace,
    ShapeDependentDelta,
    fold,
)
from gguflora.adapters.peft.config import read_config
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import UnsupportedAdapterError, listed
from gguflora.files.gguf import TOKEN_EMBEDDING
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factors import Factors, factor_adapter, unstacked
from gguflora.placement.place import place

_EXPERT: Final = re.compile(r"(?P<tensor>(?:.+\.)?blk\..+)\.(?P<expert>\d+)")
_EMBEDDING: Final = re.compile(
    r"(?:.+\.)?(?:(?:\w+_)?embeddings|embed_tokens|tok_embeddings|embed_in|wte|wpe|shared)\.weight"
)
_KEPT_FIELDS: Final = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")

Pairs = Mapping[str, LowRank]

NEARLY_ALL: Final = 0.9999
"""Share of the squared norm to keep where deltas that are not of low rank are only described, not written."""


@dataclass(frozen=True, slots=True)
class FactoredAdapter:
    """An adapter that consists of pairs of factors only.

    Attributes:
        name: name of the adapter.
        path: path of its weights.
        sha256: SHA-256 of its weights.
        pairs: factors by name of the weight or tensor; expert e of a GGUF tensor is named ``<tensor>.<e>``.
        architecture: GGUF name of the base's architecture if the pairs are named after GGUF tensors, else None.
        invocation_tokens: tokens that activate an aLoRA; empty for other adapters.
        fields: additional fields for ``adapter_config.json``.
        saved: weights that a PEFT directory holds as a whole (``modules_to_save``), by name.
        warnings: messages for the user.
    """

    name: str
    path: Path
    sha256: str
    pairs: Pairs
    architecture: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Array] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class ComputedPairs(Mapping[str, LowRank]):
    """Pairs that are computed when they are read, and not kept. Their scaling is 1.

    Args:
        names: names of the weights or tensors.
        compute: returns the factors of one of them.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], LowRank]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> LowRank:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_factored(
    path: str | os.PathLike[str], base: BaseModel | None, rank: int | None = None, energy: float | None = None
) -> FactoredAdapter:
    """Read an adapter as pairs of factors; approximate deltas that are not of low rank if asked to.

    Args:
        path: PEFT directory or GGUF LoRA file.
        base: its base model, for deltas whose factors depend on the base.
        rank: approximate such deltas with this rank.
        energy: approximate such deltas with the lowest rank that keeps this share of their squared norm.

    Raises:
        UnsupportedAdapterError: if a delta is not of low rank and may not be approximated.
        GgufloraError: if something cannot be read.
    """
    return factor(read_adapter(path), path, base, rank, energy)


def factor(
    adapter: Adapter,
    path: str | os.PathLike[str],
    base: BaseModel | None,
    rank: int | None = None,
    energy: float | None = None,
) -> FactoredAdapter:
    """Return an adapter that was read from a path as pairs of factors, see `read_factored`."""
    whole, is_plain = factored_adapter(adapter, path, base)
    if is_plain or base is None:
        return whole
    factored = factor_adapter(adapter, base, rank, energy)
    texts = [f"{item.tensor}: approximated, relative error {item.error:.2g}" for item in factored if item.error]
    texts += [text for item in factored for text in item.cautions]
    warnings = tuple(dict.fromkeys([*adapter.warnings, *texts]))
    return replace(whole, pairs=unstacked(factored), architecture=base.architecture, warnings=warnings)


def factored_adapter(
    adapter: Adapter, path: str | os.PathLike[str], base: BaseModel | None
) -> tuple[FactoredAdapter, bool]:
    """Return what is known of an adapter without its base, and whether that is all.

    Args:
        adapter: the adapter.
        path: where it was read from.
        base: its base model, if it is known.

    Raises:
        UnsupportedAdapterError: if the factors depend on the base, which is not known.
    """
    pairs = _plain_pairs(adapter)
    fields = _config_fields(Path(path)) if adapter.architecture is None else {}
    known = FactoredAdapter(
        adapter.name,
        adapter.path,
        adapter.sha256,
        pairs or {},
        adapter.architecture,
        adapter.invocation_tokens,
        fields,
        warnings=adapter.warnings,
    )
    if pairs is not None:
        left_out = sorted(adapter.deltas.keys() - pairs.keys())
        text = f"left out {listed(left_out, 4)}, saved beside the adapter but not trained by it"
        return (replace(known, warnings=(*known.warnings, text)) if left_out else known), True
    if base is None:
        dependent = [name for name, deltas in adapter.deltas.items() if not _is_plain(deltas)]
        raise UnsupportedAdapterError(
            f"{adapter.path}: {adapter.method}: the factors of {len(dependent) or 'all'} changes depend on the base "
            f"({listed(dependent) or 'on its shapes'}); give it with --base"
        )
    return known, False


def _plain_pairs(adapter: Adapter) -> Pairs | None:
    """Return the factors if every delta is one pair of factors, else None. Saved copies of base weights are skipped."""
    if adapter.from_base_shapes:
        return None
    trained = {name: _without_base_copies(deltas) for name, deltas in adapter.deltas.items()}
    left = {name: deltas for name, deltas in trained.items() if deltas}
    pairs = {name: deltas[0] for name, deltas in left.items() if len(deltas) == 1}
    low = {name: delta for name, delta in pairs.items() if isinstance(delta, LowRank)}
    return low if low and len(low) == len(left) else None


def _without_base_copies(deltas: Sequence[Delta | ShapeDependentDelta]) -> list[Delta | ShapeDependentDelta]:
    return [delta for delta in deltas if not (isinstance(delta, Replace) and delta.is_base_copy)]


def _is_plain(deltas: Sequence[Delta | ShapeDependentDelta]) -> bool:
    return [isinstance(delta, LowRank) for delta in _without_base_copies(deltas)] in ([], [True])


def _config_fields(folder: Path) -> dict[str, Any]:
    fields = read_config(folder).fields
    return {name: fields[name] for name in _KEPT_FIELDS if name in fields}


def for_base(adapter: FactoredAdapter, base: BaseModel) -> FactoredAdapter:
    """Convert an adapter to the names and the row order of a base's GGUF tensors, and check that it fits.

    Raises:
        GgufloraError: if it does not fit the base.
    """
    if adapter.architecture is not None:
        if not isinstance(adapter.pairs, ComputedPairs):  # what they are computed from was checked
            place(adapter_of(adapter), base)  # raises if it does not fit
        return adapter
    factored = factor_adapter(adapter_of(adapter), base, None, None)
    return replace(adapter, pairs=unstacked(factored), architecture=base.architecture)


def adapter_of(adapter: FactoredAdapter) -> Adapter:
    """Return a factored adapter as one that can be placed on a base."""
    deltas = {name: (delta,) for name, delta in adapter.pairs.items()}
    return Adapter(adapter.name, adapter.path, adapter.sha256, deltas, "LORA", adapter.architecture)


def stack_dims(pairs: Pairs) -> dict[str, int]:
    """Return the number of dimensions of the factors of each tensor that `stacked` yields, in its order."""
    experts = (split_expert(name) for name in pairs)
    return {tensor: 2 if expert is None else 3 for tensor, expert in experts}


def stacked(pairs: Pairs) -> Iterator[Factors]:
    """Undo `unstacked`, tensor by tensor. Experts of a lower rank are padded with zeros."""
    groups: dict[str, dict[int, str]] = {}
    for name in pairs:
        tensor, expert = split_expert(name)
        groups.setdefault(tensor, {})[-1 if expert is None else expert] = name
    for tensor, group in groups.items():
        yield _stack(tensor, {expert: pairs[name] for expert, name in group.items()})


def split_expert(name: str) -> tuple[str, int | None]:
    """Split ``<tensor>.<e>`` into the tensor's name and the expert's index, which is None if there is none."""
    match = _EXPERT.fullmatch(name)
    return (match["tensor"], int(match["expert"])) if match else (name, None)


def _stack(tensor: str, group: Mapping[int, LowRank]) -> Factors:
    if group.keys() == {-1}:
        return Factors(tensor, group[-1].a, group[-1].b, group[-1].scaling)
    n_experts, rank = max(group) + 1, max(delta.rank for delta in group.values())
    same = len({(delta.scaling, delta.rank) for delta in group.values()}) == 1
    scaling = next(iter(group.values())).scaling if same else 1.0
    n_out, n_in = next(iter(group.values())).shape
    a = np.zeros((n_experts, rank, n_in), np.float32)
    b = np.zeros((n_experts, n_out, rank), np.float32)
    for expert, delta in group.items():
        a[expert, : delta.rank] = as_float32(delta.a)
        b[expert, :, : delta.rank] = as_float32(delta.b) if same else fold(delta)
    return Factors(tensor, a, b, scaling)


def is_embedding(name: str) -> bool:
    """Whether a weight or tensor is an embedding; PEFT and GGUF swap the names A and B of its factors."""
    return name == TOKEN_EMBEDDING or _EMBEDDING.fullmatch(name) is not None
