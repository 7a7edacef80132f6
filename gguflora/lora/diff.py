"""``diff``: compare two adapters."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.adapters.deltas import LowRank, as_float64
from gguflora.architectures.base_model import BaseModel, read_base
from gguflora.errors import MismatchError
from gguflora.files.remote import remote_inputs
from gguflora.lora.factored import (
    NEARLY_ALL,
    FactoredAdapter,
    for_base,
    read_factored,
)
from gguflora.quants.arrays import Float64Array

_NEGLIGIBLE: Final = 1e-6
"""Singular values below this share of the largest count as zero."""


@dataclass(frozen=True, slots=True)
class DifferentChange:
    """A weight that both adapters change.

    Attributes:
        name: name of the weight or tensor.
        cosine: cosine similarity of the two deltas, each flattened to a vector.
        norms: Frobenius norms of the deltas of A and B.
        overlap_in: share of the smaller space of input directions that lies in the larger: 0 if they are orthogonal,
            1 if it lies inside.
        overlap_out: the same share for the output directions.
        difference: norm of B - A divided by the norm of A.
    """

    name: str
    cosine: float
    norms: tuple[float, float]
    overlap_in: float
    overlap_out: float
    difference: float


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What `diff` found.

    Attributes:
        a: path of the first adapter.
        b: path of the second adapter.
        cosine: cosine similarity of all deltas together.
        norms: Frobenius norms of all deltas of A and of B together.
        changes: comparison of each weight that both adapters change.
        only_a: norm of each delta that only A has, by name.
        only_b: norm of each delta that only B has, by name.
        warnings: messages for the user.
    """

    a: Path
    b: Path
    cosine: float
    norms: tuple[float, float]
    changes: tuple[DifferentChange, ...]
    only_a: dict[str, float]
    only_b: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def norm_ratio(self) -> float:
        """Norm of B's deltas divided by the norm of A's."""
        return self.norms[1] / self.norms[0] if self.norms[0] else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        ratio = self.norm_ratio if math.isfinite(self.norm_ratio) else None
        return {**asdict(self), "a": str(self.a), "b": str(self.b), "norm_ratio": ratio}


@remote_inputs(a="adapter", b="adapter", base="config")
def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> DiffReport:
    """Compare two adapters of the same base. Everything is computed from the factors, never from dense matrices.

    Args:
        a: first adapter: PEFT directory or GGUF LoRA file.
        b: second adapter.
        base: their base model; needed to compare PEFT with GGUF, and for deltas that are not of low rank.

    Raises:
        MismatchError: if the bases differ, or if the file formats differ and no base is given.
        GgufloraError: if something cannot be read.
    """
    model = None if base is None else read_base(base)
    one, other = (read_factored(path, model, energy=NEARLY_ALL) for path in (a, b))
    if one.architecture != other.architecture:
        one, other = _on_base(one, other, model)
    changes = tuple(
        _compare(name, delta, other.pairs[name]) for name, delta in one.pairs.items() if name in other.pairs
    )
    only_a = {name: _norm(delta) for name, delta in one.pairs.items() if name not in other.pairs}
    only_b = {name: _norm(delta) for name, delta in other.pairs.items() if name not in one.pairs}
    norm_a = math.hypot(*(delta.norms[0] for delta in changes), *only_a.values())
    norm_b = math.hypot(*(delta.norms[1] for delta in changes), *only_b.values())
    product = sum(delta.cosine * delta.norms[0] * delta.norms[1] for delta in changes)
    return DiffReport(
        a=Path(a),
        b=Path(b),
        cosine=_ratio(product, norm_a * norm_b),
        norms=(norm_a, norm_b),
        changes=changes,
        only_a=only_a,
        only_b=only_b,
        warnings=tuple(dict.fromkeys([*one.warnings, *other.warnings])),
    )


def _on_base(
    one: FactoredAdapter, other: FactoredAdapter, base: BaseModel | None
) -> tuple[FactoredAdapter, FactoredAdapter]:
    if base is None:
        raise MismatchError(
            f"{one.path} is for {one.architecture or 'a Hugging Face model'}, {other.path} for "
            f"{other.architecture or 'a Hugging Face model'}: give their base model with --base"
        )
    return for_base(one, base), for_base(other, base)


def _compare(name: str, one: LowRank, other: LowRank) -> DifferentChange:
    if one.shape != other.shape:
        raise MismatchError(
            f"{name}: the shapes are {one.shape} and {other.shape}, so the adapters have different bases"
        )
    norm_a, norm_b, product = _norm(one), _norm(other), _inner(one, other)
    gap = math.sqrt(max(norm_a**2 + norm_b**2 - 2 * product, 0.0))
    (out_a, in_a), (out_b, in_b) = _directions(one), _directions(other)
    return DifferentChange(
        name=name,
        cosine=_ratio(product, norm_a * norm_b),
        norms=(norm_a, norm_b),
        overlap_in=_overlap(in_a, in_b),
        overlap_out=_overlap(out_a, out_b),
        difference=_ratio(gap, norm_a),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _inner(one: LowRank, other: LowRank) -> float:
    """Frobenius inner product of two deltas: ``tr((b1 a1)^T b2 a2) = sum((b1^T b2) * (a1 a2^T))``."""
    left = as_float64(one.b).T @ as_float64(other.b)
    right = as_float64(one.a) @ as_float64(other.a).T
    return one.scaling * other.scaling * float((left * right).sum())


def _norm(delta: LowRank) -> float:
    return math.sqrt(max(_inner(delta, delta), 0.0))


def _directions(delta: LowRank) -> tuple[Float64Array, Float64Array]:
    """Return orthonormal bases of the delta's output and input directions, (n_out, r) and (n_in, r)."""
    q_b, r_b = np.linalg.qr(as_float64(delta.b))
    q_a, r_a = np.linalg.qr(as_float64(delta.a).T)
    u, sizes, vt = np.linalg.svd(r_b @ r_a.T)
    rank = int((sizes > _NEGLIGIBLE * sizes[0]).sum()) if sizes[0] else 0
    return q_b @ u[:, :rank], q_a @ vt[:rank].T


def _overlap(one: Float64Array, other: Float64Array) -> float:
    smaller = min(one.shape[1], other.shape[1])
    return float((np.square(one.T @ other)).sum()) / smaller if smaller else 0.0
