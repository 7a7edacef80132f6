"""Second moments of the inputs of weights, behind calibrated merges: what they are, and their file.

H, the mean of ``outer(x, x)`` over the inputs x of a weight, is kept as ``v.T @ v + diag(d)`` with `RANK` directions. A
file is a GGUF file of the type ``gguflora-moments`` with three F32 tensors for each weight: ``<name>.v``
(n_matrices, RANK, n_in), ``<name>.d`` (n_matrices, n_in) and ``<name>.counts`` (n_matrices,), the number of inputs.
Weights with the same inputs share them: ``gguflora.moments.same`` lists pairs of names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.errors import FormatError, GgufError, MismatchError
from gguflora.files.atomic import atomic_output
from gguflora.files.gguf import GgufFile, TensorEntry
from gguflora.quants.arrays import Float32Array
from gguflora.system.nameless import path_of

RANK: Final = 48
_KIND: Final = "gguflora-moments"
_SAME: Final = "gguflora.moments.same"


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments ``v.T @ v + diag(d)`` of the inputs of each matrix of a weight.

    Attributes:
        v: (n_matrices, RANK, n_in).
        d: (n_matrices, n_in).
        counts: number of inputs of each matrix, (n_matrices,); where it is 0 nothing is known.
    """

    v: Float32Array
    d: Float32Array
    counts: Float32Array


AllMoments = Mapping[str, Moments]


def write_moments(target: Path, moments: AllMoments, *, force: bool) -> None:
    """Write moments to a file.

    Raises:
        OutputError: if it cannot be written.
    """
    import gguf  # noqa: PLC0415  (slow to import)

    first: dict[int, str] = {}
    same = []
    with atomic_output(target, force=force) as output:
        writer = gguf.GGUFWriter(path_of(output), "")
        writer.add_string("general.type", _KIND)
        for name, found in sorted(moments.items()):
            owner = first.setdefault(id(found), name)
            if owner != name:
                same += [name, owner]
                continue
            writer.add_tensor(f"{name}.v", found.v)
            writer.add_tensor(f"{name}.d", found.d)
            writer.add_tensor(f"{name}.counts", found.counts)
        if same:
            writer.add_array(_SAME, same)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_moments(path: str | os.PathLike[str]) -> dict[str, Moments]:
    """Read a file of `write_moments`.

    Raises:
        FormatError: if the file is damaged, or holds something else.
    """
    with GgufFile(path) as file:
        if file.metadata.get("general.type") != _KIND:
            raise GgufError(
                f"{path}: holds no second moments (general.type {file.metadata.get('general.type')!r}, expected "
                f"{_KIND!r}); 'gguflora merge --calibrate --save-moments FILE' writes them"
            )
        names = [name.removesuffix(".v") for name in file.tensors if name.endswith(".v")]
        found = {name: _read(file, name) for name in names}
        same = file.metadata.get(_SAME) or []
        for name, owner in zip(same[::2], same[1::2], strict=False):
            if owner not in found:
                raise FormatError(f"{path}: {name!r} has the moments of {owner!r}, which are missing")
            found[name] = found[owner]
    return found


def _read(file: GgufFile, name: str) -> Moments:
    v, d, counts = (_floats(file, f"{name}.{part}") for part in ("v", "d", "counts"))
    n_in = v.shape[-1]
    v, d, counts = v.reshape(-1, RANK, n_in), d.reshape(-1, n_in), counts.reshape(-1)
    if not len(v) == len(d) == len(counts):
        raise FormatError(f"{file.path}: {name!r} has moments of {len(v)}, {len(d)} and {len(counts)} matrices")
    if not (np.isfinite(v).all() and (d >= 0).all() and np.isfinite(d).all() and (counts >= 0).all()):
        raise FormatError(f"{file.path}: the moments of {name!r} are not finite, or negative")
    return Moments(v, d, counts)


def _floats(file: GgufFile, name: str) -> Float32Array:
    tensor: TensorEntry | None = file.tensors.get(name)
    if tensor is None or tensor.type.name != "F32":
        raise FormatError(f"{file.path}: {name!r} is missing or not F32; the moments are incomplete")
    values: Float32Array = file.read_rows(tensor, 0, tensor.n_rows).reshape(-1).view(np.float32).reshape(tensor.shape)
    if name.endswith(".v") and (len(tensor.shape) < 2 or tensor.shape[-2] != RANK):
        raise FormatError(f"{file.path}: {name!r} has shape {tensor.shape}, expected {RANK} directions")
    return values


def check_moments(moments: AllMoments, name: str, n_matrices: int, n_in: int) -> None:
    """Raise ``MismatchError`` unless the moments of a weight have its size."""
    found = moments[name]
    if found.d.shape != (n_matrices, n_in):
        raise MismatchError(
            f"the moments of {name!r} are of {found.d.shape[0]} matrices with {found.d.shape[1]} columns, expected "
            f"{n_matrices} with {n_in}; were they collected on another model?"
        )


def hash_moments(moments: AllMoments) -> bytes:
    """Return a hash of moments, equal if they make the same merge."""
    digest = hashlib.sha256()
    for name, found in sorted(moments.items()):
        digest.update(name.encode() + found.v.tobytes() + found.d.tobytes() + found.counts.tobytes())
    return digest.digest()
