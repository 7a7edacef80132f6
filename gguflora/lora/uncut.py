"""Adapters whose deltas are whole: factors where a delta is of low rank, else a matrix that is computed when needed.

Everything that cuts ranks reads adapters this way, brings them to the names of the output, and cuts once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from gguflora.adapters.adapter import read_adapter
from gguflora.adapters.deltas import LowRank, Replace
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import UnsupportedAdapterError, listed
from gguflora.lora.factored import FactoredAdapter, adapter_of, factored_adapter, for_base
from gguflora.lora.factors import uncut_factors
from gguflora.lora.low_rank import Dense, Uncut
from gguflora.lora.saved_weights import split_saved
from gguflora.lora.to_hf import hf_deltas, hf_fields
from gguflora.placement.place import place


@dataclass(frozen=True, slots=True)
class UncutAdapter:
    """An adapter with whole deltas.

    Attributes:
        source: the adapter without its deltas.
        deltas: the deltas, named as in `FactoredAdapter.pairs`.
        saved: weights that a PEFT directory holds as a whole, by name in the Hugging Face model.
    """

    source: FactoredAdapter
    deltas: Mapping[str, Uncut]
    saved: Mapping[str, Replace] = field(default_factory=dict)

    @property
    def dense(self) -> list[str]:
        """Names of the deltas that are not of low rank."""
        return [name for name, delta in self.deltas.items() if isinstance(delta, Dense)]

    def low_rank(self) -> FactoredAdapter:
        """Return the adapter as factors; call it only if no delta is dense."""
        pairs = {name: delta for name, delta in self.deltas.items() if isinstance(delta, LowRank)}
        return replace(self.source, pairs=pairs)


def read_uncut(
    path: str | os.PathLike[str], base: BaseModel | None, files: ExitStack, *, keep_saved: bool = False
) -> UncutAdapter:
    """Read an adapter without approximating any delta.

    Args:
        path: PEFT directory or GGUF LoRA file.
        base: its base model, for deltas that depend on the base.
        files: keeps the base's file open; dense deltas can be computed until it is closed.
        keep_saved: whether weights that are replaced as a whole stay so, as a PEFT directory can hold them.

    Raises:
        UnsupportedAdapterError: if a delta needs the base's weights and there are none.
        GgufloraError: if something cannot be read.
    """
    adapter = read_adapter(path)
    saved: dict[str, Replace] = {}
    if keep_saved:
        adapter, saved = split_saved(adapter)
    if saved and not adapter.deltas and adapter.from_base_shapes is None:
        raise UnsupportedAdapterError(
            f"{adapter.path}: holds only whole weights ({listed(list(saved))}) and no factors; merge it instead"
        )
    source, is_plain = factored_adapter(adapter, path, base)
    if is_plain or base is None:
        return UncutAdapter(replace(source, pairs={}), source.pairs, saved)
    deltas, cautions = uncut_factors(adapter, base, files)
    warnings = tuple(dict.fromkeys([*adapter.warnings, *cautions]))
    return UncutAdapter(replace(source, architecture=base.architecture, warnings=warnings), deltas, saved)


def on_base(adapter: UncutAdapter, base: BaseModel) -> UncutAdapter:
    """Convert an adapter to the names of a base's GGUF tensors, and check that it fits.

    Raises:
        GgufloraError: if it does not fit the base.
    """
    if adapter.source.architecture is not None:
        known = adapter.low_rank()
        if known.pairs:
            for_base(known, base)  # raises if it does not fit
        return adapter
    placed = for_base(adapter.low_rank(), base)  # deltas named after Hugging Face weights are of low rank
    return replace(adapter, source=replace(placed, pairs={}), deltas=placed.pairs)


def on_model(adapter: UncutAdapter, base: BaseModel) -> UncutAdapter:
    """Convert an adapter to the names of the Hugging Face model's weights, and check that it fits.

    Raises:
        ArchitectureError: if a tensor has no counterpart in the Hugging Face model.
        GgufloraError: if it does not fit the base.
    """
    if adapter.source.architecture is None:
        place(adapter_of(adapter.low_rank()), base)  # raises if it does not fit
        return adapter
    placed = on_base(adapter, base)
    source = hf_fields(placed.source, base)
    return replace(placed, source=source, deltas=hf_deltas(placed.deltas, base, placed.source.path))
