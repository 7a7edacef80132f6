"""Singular values of an adapter's deltas, and what lower ranks would keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures.names import layer_and_module
from gguflora.quants.arrays import Float64Array

WHOLE: Final = "all"


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one delta.

    Attributes:
        name: name of the weight or tensor.
        kind: kind of module, such as ``q_proj`` or ``attn_q``.
        rank: rank of the stored factors.
        values: the ``rank`` singular values, largest first.
        bytes_a_rank: bytes that each rank adds to the factors.
    """

    name: str
    kind: str
    rank: int
    values: tuple[float, ...]
    bytes_a_rank: int


@dataclass(frozen=True, slots=True)
class RankChoice:
    """What an adapter would keep if its rank were reduced.

    Attributes:
        kind: kind of module, or "all".
        rank: highest rank of a delta.
        size: bytes of the factors at this rank.
        energy: share of the deltas' squared norms that remains.
        saving: share of the bytes that is saved.
    """

    kind: str
    rank: int
    size: int
    energy: float
    saving: float


def singular_values(delta: LowRank) -> Float64Array:
    """Return the singular values of ``scaling * b @ a``, largest first, without computing the product."""
    _, r_b = np.linalg.qr(delta.scaling * as_float64(delta.b))
    _, r_a = np.linalg.qr(as_float64(delta.a).T)
    values: Float64Array = np.linalg.svd(r_b @ r_a.T, compute_uv=False)
    return values


def spectra_of(pairs: Mapping[str, LowRank]) -> tuple[Spectrum, ...]:
    """Return the spectrum of each delta."""
    return tuple(_spectrum(name, delta) for name, delta in pairs.items())


def _spectrum(name: str, delta: LowRank) -> Spectrum:
    n_out, n_in = delta.shape
    size = n_out * delta.b.dtype.itemsize + n_in * delta.a.dtype.itemsize
    return Spectrum(name, kind_of(name), delta.rank, tuple(singular_values(delta).tolist()), size)


def kind_of(name: str) -> str:
    """Return the kind of module: the last part of the name except ``weight`` and expert numbers."""
    parts = layer_and_module(name)[1].split(".")
    words = [part for part in parts if not part.isdecimal() and part != "weight"]
    return words[-1] if words else name


def rank_choices(spectra: Sequence[Spectrum]) -> tuple[RankChoice, ...]:
    """Return what the powers of two up to the highest rank, and that rank, would keep: for all deltas and each kind."""
    kinds = [WHOLE, *dict.fromkeys(spectrum.kind for spectrum in spectra)]
    return tuple(choice for kind in kinds for choice in _choices(kind, spectra))


def _choices(kind: str, spectra: Sequence[Spectrum]) -> list[RankChoice]:
    chosen = [spectrum for spectrum in spectra if kind in {WHOLE, spectrum.kind}]
    highest = max(spectrum.rank for spectrum in chosen)
    ranks = [1 << power for power in range(highest.bit_length()) if 1 << power < highest] + [highest]
    now = sum(spectrum.rank * spectrum.bytes_a_rank for spectrum in chosen)
    total = sum(_energy(spectrum, spectrum.rank) for spectrum in chosen)
    choices = []
    for rank in ranks:
        size = sum(min(rank, spectrum.rank) * spectrum.bytes_a_rank for spectrum in chosen)
        kept = sum(_energy(spectrum, rank) for spectrum in chosen)
        choices.append(RankChoice(kind, rank, size, kept / total if total else 1.0, 1 - size / now))
    return choices


def _energy(spectrum: Spectrum, rank: int) -> float:
    return float(sum(value * value for value in spectrum.values[:rank]))
