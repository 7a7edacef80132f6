"""An adapter as pairs of factors, which is what one can compute with.

Names are those of a Hugging Face model's weights while no GGUF file is in play, else those of GGUF tensors; `for_base`
turns the first into the second, `export` the second into the first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
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
from gguflora.files.safetensors import as_float32
from gguflora.lora.factors import Factors, factor_adapter
from gguflora.placement.place import place

_EXPERT: Final = re.compile(r"(?P<tensor>(?:.+\.)?blk\..+)\.(?P<expert>\d+)")
_EMBEDDING: Final = re.compile(
    r"(?:.+\.)?(?:(?:\w+_)?embeddings|embed_tokens|tok_embeddings|embed_in|wte|wpe|shared)\.weight"
)
_KEPT_FIELDS: Final = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")

Pairs = Mapping[str, LowRank]

NEARLY_ALL: Final = 0.9999
"""Share of the squared norm that is kept of changes that are not of low rank, where they are only looked at."""


@dataclass(frozen=True, slots=True)
class FactoredAdapter:
    """An adapter that is pairs of factors and nothing else.

    Attributes:
        name: of the adapter.
        path: of its weights.
        sha256: of them.
        pairs: by name of the weight or tensor; expert e of a GGUF tensor is named ``<tensor>.<e>``.
        architecture: of the base, if the names are those of GGUF tensors.
        invocation_tokens: of an activated LoRA.
        fields: what a PEFT configuration of it should say besides.
        warnings: what the user should know.
    """

    name: str
    path: Path
    sha256: str
    pairs: Pairs
    architecture: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_factored(
    path: str | os.PathLike[str], base: BaseModel | None, rank: int | None = None, energy: float | None = None
) -> FactoredAdapter:
    """Read an adapter whose changes are all of low rank, or that may be approximated on its base.

    Args:
        path: PEFT directory or GGUF LoRA file.
        base: its base, for changes that only a base's weights make factors of.
        rank: approximate such changes with this rank.
        energy: or with the lowest rank that keeps this share of their squared norm.

    Raises:
        UnsupportedAdapterError: if a change is not of low rank.
        GgufloraError: if something cannot be read.
    """
    adapter = read_adapter(path)
    pairs = _plain_pairs(adapter)
    fields = _fields(Path(path)) if adapter.architecture is None else {}
    whole = FactoredAdapter(
        adapter.name,
        adapter.path,
        adapter.sha256,
        pairs or {},
        adapter.architecture,
        adapter.invocation_tokens,
        fields,
        adapter.warnings,
    )
    if pairs is not None:
        return whole
    if base is None:
        odd = [name for name, deltas in adapter.deltas.items() if not _is_plain(deltas)]
        raise UnsupportedAdapterError(
            f"{adapter.path}: {adapter.method}: {len(odd) or 'all'} changes are no pair of factors without the base "
            f"({listed(odd) or 'they depend on its shapes'}); give it with --base"
        )
    factored = factor_adapter(adapter, base, rank, energy)
    texts = [f"{item.tensor}: approximated, relative error {item.error:.2g}" for item in factored if item.error]
    texts += [text for item in factored for text in item.cautions]
    warnings = tuple(dict.fromkeys([*adapter.warnings, *texts]))
    return replace(whole, pairs=unstacked(factored), architecture=base.architecture, warnings=warnings)


def _plain_pairs(adapter: Adapter) -> Pairs | None:
    """The changes where each is one pair of factors; copies of the base's weights saved beside them are left out."""
    if adapter.from_base_shapes:
        return None
    trained = {name: _trained(deltas) for name, deltas in adapter.deltas.items()}
    left = {name: deltas for name, deltas in trained.items() if deltas}
    pairs = {name: deltas[0] for name, deltas in left.items() if len(deltas) == 1}
    low = {name: delta for name, delta in pairs.items() if isinstance(delta, LowRank)}
    return low if low and len(low) == len(left) else None


def _trained(deltas: Sequence[Delta | ShapeDependentDelta]) -> list[Delta | ShapeDependentDelta]:
    return [delta for delta in deltas if not (isinstance(delta, Replace) and delta.is_base_copy)]


def _is_plain(deltas: Sequence[Delta | ShapeDependentDelta]) -> bool:
    return [isinstance(delta, LowRank) for delta in _trained(deltas)] in ([], [True])


def _fields(folder: Path) -> dict[str, Any]:
    found = read_config(folder).fields
    return {name: found[name] for name in _KEPT_FIELDS if name in found}


def for_base(adapter: FactoredAdapter, base: BaseModel) -> FactoredAdapter:
    """The same adapter, by the names and in the row order of a base's GGUF tensors, checked against it.

    Raises:
        GgufloraError: if it does not fit the base.
    """
    if adapter.architecture is not None:
        place(_as_adapter(adapter), base)  # which checks it
        return adapter
    factored = factor_adapter(_as_adapter(adapter), base, None, None)
    return replace(adapter, pairs=unstacked(factored), architecture=base.architecture)


def _as_adapter(adapter: FactoredAdapter) -> Adapter:
    deltas = {name: (delta,) for name, delta in adapter.pairs.items()}
    return Adapter(adapter.name, adapter.path, adapter.sha256, deltas, "LORA", adapter.architecture)


def unstacked(factored: Sequence[Factors]) -> dict[str, LowRank]:
    """Pairs by tensor, of a stack of experts by ``<tensor>.<e>``."""
    pairs = {}
    for item in factored:
        if item.a.ndim == 2:
            pairs[item.tensor] = LowRank(item.a, item.b, item.scaling)
        else:
            for expert in range(len(item.a)):
                pairs[f"{item.tensor}.{expert}"] = LowRank(item.a[expert], item.b[expert], item.scaling)
    return pairs


def stacked(pairs: Pairs) -> list[Factors]:
    """The inverse of `unstacked`; experts of different rank are filled up with zeros."""
    groups: dict[str, dict[int, LowRank]] = {}
    for name, delta in pairs.items():
        tensor, expert = split_expert(name)
        groups.setdefault(tensor, {})[-1 if expert is None else expert] = delta
    return [_stack(tensor, group) for tensor, group in groups.items()]


def split_expert(name: str) -> tuple[str, int | None]:
    """A GGUF tensor's name and the number of an expert in it, if the name has one."""
    found = _EXPERT.fullmatch(name)
    return (found["tensor"], int(found["expert"])) if found else (name, None)


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
    """Whether a weight or tensor is a token embedding, whose factors PEFT and GGUF name the other way round."""
    return name == TOKEN_EMBEDDING or _EMBEDDING.fullmatch(name) is not None
