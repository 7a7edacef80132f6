"""``extract``: compute a LoRA from the difference of two models.

Each matrix D of the difference is approximated by a randomised block Krylov method (Musco and Musco 2015, algorithm
2): a random block is multiplied by ``D^T D`` again and again, D is projected on all blocks together, and the passes end
when the error has stopped falling. Every pass reads both models in blocks of rows, and D is not held in memory. Where
an exact decomposition is no slower, which small matrices and high ranks have in common, D is held and decomposed.
`gguflora.lora.weighted_svd` removes the noise of 16-bit rounding where that is possible.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.adapters.deltas import LowRank
from gguflora.architectures.base_model import read_base
from gguflora.errors import AdapterError
from gguflora.files.remote import remote_inputs
from gguflora.lora.expert_stacks import stack_experts
from gguflora.lora.factored import FactoredAdapter, is_embedding
from gguflora.lora.model_difference import Difference, Differences, open_differences
from gguflora.lora.output import check_output, is_gguf, write_adapter
from gguflora.lora.weighted_svd import HIGHEST_RANK, svd_of_product, without_rounding
from gguflora.quants.arrays import Float32Array, Float64Array
from gguflora.quants.threads import run_rows

Progress = Callable[[int, int], None]

_OVERSAMPLING: Final = 8
"""Columns of the random block beyond the rank."""
_CLOSE_ENOUGH: Final = 1e-3
"""The passes end when the squared error is expected to fall by no more than this share of it."""
_SLOWEST: Final = 0.9
"""Highest ratio of one pass's gain to that of the pass before that the expectation allows for."""
_EXACT_VALUES: Final = 1 << 23
"""Largest matrix that is held in memory to be decomposed exactly."""
_EXACT_COST: Final = 4.5
"""Measured time of ``eigh`` of a k x k matrix, in multiples of k^3 multiplications of a product of matrices."""
_KRYLOV_COST: Final = 36
"""Measured time of three passes, in multiples of the products of D and one column of the block."""
_TOO_LARGE: Final = 0.5
"""Above this relative error a PEFT directory holds an embedding or output weight as a whole."""
_NEGLIGIBLE: Final = 1e-9
"""A remainder below this share of a difference's squared norm is ignored."""


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What `extract` did.

    Attributes:
        output: path of the GGUF LoRA file or PEFT directory.
        tensors: number of weights that the LoRA changes.
        ranks: smallest and largest rank of the factors.
        size: bytes of the factors.
        unchanged: number of weights that are equal in both models.
        errors: relative distance (Frobenius norm) of each delta from the models' difference, by name. It includes what
            the rank cuts off and the rounding of the models' weights.
        left_out: why a weight that differs is not in the LoRA, by name.
        saved: weights that a PEFT directory holds as they are in the tuned model (``modules_to_save``): norms, and
            embeddings and output weights that have grown or that the rank would cut to less than three quarters.
        seconds: wall time.
        warnings: messages for the user.
    """

    output: Path
    tensors: int
    ranks: tuple[int, int]
    size: int
    unchanged: int
    errors: dict[str, float]
    left_out: dict[str, str]
    saved: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "output": str(self.output)}


@remote_inputs(finetuned="model", base="model")
def extract(
    finetuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    energy: float | None = None,
    iterations: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    outtype: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the LoRA that best approximates the difference between a fine-tuned model and its base.

    For F16 and BF16 models, if little more than rounding is left beyond the rank (up to 64), the result is the
    likeliest delta before rounding rather than the one closest to the rounded difference. It is then several times
    closer to the LoRA that was merged.

    Args:
        finetuned: fine-tuned model: GGUF file of any quant types, or Hugging Face directory.
        base: the model before fine-tuning, in the same format.
        out: path to write: a GGUF LoRA file if the name ends with ``.gguf``, else a PEFT directory.
        rank: highest rank of a delta.
        energy: if given, use for each delta the lowest rank, up to ``rank``, that keeps this share of its squared
            norm.
        iterations: number of multiplications with ``D^T D``; each reads both models once more. By default as many as
            the error needs to come within 0.1 % of the lowest possible one.
        seed: seed of the random subspace; the result does not depend on ``threads``.
        threads: number of threads; by default one for each core that this process may use.
        outtype: type of the factors in a GGUF file.
        force: overwrite ``out``.
        progress: called with (weights done, weights in total); calls come from several threads but never overlap.

    Raises:
        AdapterError: if the models do not differ, or hold NaN or infinity.
        GgufloraError: if something cannot be read, does not fit together or cannot be written.
    """
    _check_options(rank, energy, iterations)
    started, target, tuned, before = time.perf_counter(), Path(out), Path(finetuned), Path(base)
    check_output(target, [tuned, before], outtype=outtype, force=force)
    as_peft = not is_gguf(target)
    with open_differences(tuned, before, as_peft=as_peft) as found:
        is_stacked = as_peft and found.architecture is None
        differences = replace(found, weights=tuple(stack_experts(found.weights))) if is_stacked else found
        work = _Extraction(differences, rank, energy, iterations, seed, progress, as_peft=as_peft)
        run_rows(len(differences.weights), 1, work.approximate, threads)
        saved = {} if not as_peft else work.saved_modules()
    if not work.pairs:
        raise AdapterError(f"{tuned}: no weight that a LoRA could change differs from {before}")
    fields = dict(differences.fields)
    if not any(is_embedding(name) for name in work.pairs):
        fields.pop("ensure_weight_tying", None)
    architecture = differences.architecture
    adapter = FactoredAdapter(
        target.stem, tuned, "", work.ordered_pairs(), architecture, fields=fields, saved=saved, warnings=work.warnings()
    )
    needs_base = is_gguf(target) == (architecture is None)
    model = read_base(before) if needs_base or architecture is not None else None
    made_from = {"source": f"{tuned.name} - {before.name}", "extracted": f"rank {rank}"}
    written = write_adapter(adapter, target, model, outtype, made_from)
    return ExtractReport(
        output=target,
        tensors=written.tensors,
        ranks=written.ranks,
        size=written.size,
        unchanged=work.unchanged,
        errors={name: work.errors[name] for name in adapter.pairs if name in work.errors},
        left_out=work.left_out,
        saved=tuple(saved),
        seconds=time.perf_counter() - started,
        warnings=written.warnings,
    )


def _check_options(rank: int, energy: float | None, iterations: int | None) -> None:
    if rank < 1:
        raise AdapterError(f"rank is {rank}, expected a positive whole number")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy is {energy}, expected a share from 0 to 1, for example 0.99")
    if iterations is not None and iterations < 0:
        raise AdapterError(f"iterations is {iterations}, expected a whole number from 0")


class _Extraction:
    """The deltas computed so far. Several threads call `approximate`."""

    def __init__(
        self,
        differences: Differences,
        rank: int,
        energy: float | None,
        iterations: int | None,
        seed: int,
        progress: Progress | None,
        *,
        as_peft: bool,
    ) -> None:
        self._weights, self._rank, self._energy = differences.weights, rank, energy
        self._iterations, self._seed, self._progress = iterations, seed, progress
        self._lock, self._done = threading.Lock(), 0
        self._total = sum(item.n_rows * item.n_columns for item in self._weights)
        self._changed_modules: set[str] = set()
        self._saves = differences.architecture is None and as_peft
        self._is_tied = "ensure_weight_tying" in differences.fields
        self.pairs: dict[str, LowRank] = {}
        self.errors: dict[str, float] = {}
        self.left_out = dict(differences.left_out)
        self.unchanged = 0

    def approximate(self, start: int, stop: int) -> None:
        """Compute the deltas of weights ``start`` to ``stop``."""
        for item in self._weights[start:stop]:
            result = (
                _approximate(item, self._rank, self._energy, self._iterations, self._seed) if not item.problem else None
            )
            norm = item.relative_norm() if item.problem else 0.0
            is_lost = result is not None and result[1] > _TOO_LARGE and item.saved_by is not None and self._saves
            with self._lock:
                if is_lost and item.saved_by:
                    self._changed_modules.add(item.saved_by)
                elif result is not None:
                    self.pairs[item.name], self.errors[item.name] = result
                elif norm and item.saved_by and self._saves:
                    self._changed_modules.add(item.saved_by)
                elif norm:
                    self.left_out[item.name] = f"{item.problem}; it differs by {norm:.2g} of its norm"
                else:
                    self.unchanged += 1
                self._done += item.n_rows * item.n_columns
                if self._progress:
                    self._progress(self._done, self._total)

    def saved_modules(self) -> dict[str, Float32Array]:
        """Return the norms and embeddings that it cannot hold otherwise, as the tuned model has them.

        Call it before the files close. If the output weight is tied to the embedding, both are returned, since PEFT
        copies a module that it saves.
        """
        items = [item for item in self._weights if item.saved_by in self._changed_modules]
        saved = {item.name: item.rows(0, item.n_rows)[0] for item in items}
        inputs = [name for name in saved if is_embedding(name) and not name.endswith("wpe.weight")]
        if inputs and self._is_tied:
            saved["lm_head.weight"] = saved[inputs[0]]
        return {name: values[:, 0] if values.shape[1] == 1 else values for name, values in saved.items()}

    def ordered_pairs(self) -> dict[str, LowRank]:
        """Return the deltas in the models' order, with zeros for the unchanged experts of a changed stack."""
        changed_stacks = {_stack_of(name) for name in self.pairs} - {None}
        pairs = {}
        for item in self._weights:
            if item.name in self.pairs:
                pairs[item.name] = self.pairs[item.name]
            elif _stack_of(item.name) in changed_stacks:
                a, b = np.zeros((1, item.n_columns), np.float32), np.zeros((item.n_rows, 1), np.float32)
                zero = LowRank(a, b, 1.0)
                pairs[item.name] = zero.transposed() if item.transposed else zero
        return pairs

    def warnings(self) -> tuple[str, ...]:
        """Return a warning for each weight that differs but is not in the LoRA."""
        return tuple(f"{name} is left out: {reason}" for name, reason in self.left_out.items())


def _stack_of(name: str) -> str | None:
    """Return the name of the expert stack that a weight belongs to, or None."""
    stack, _, expert = name.rpartition(".")
    return stack if expert.isdecimal() else None


def _approximate(
    item: Difference, rank: int, energy: float | None, iterations: int | None, seed: int
) -> tuple[LowRank, float] | None:
    """Return the low-rank delta and its relative error, or None if the models do not differ."""
    rng = np.random.default_rng([seed, zlib.crc32(item.name.encode())])
    if iterations is None and _is_exact_faster(item, rank):
        y, v, norm = _decompose(item, rank)
    else:
        y, v, norm = _krylov(item, rank, iterations, rng)
    if not norm:
        return None
    b, a, kept = _truncate(y, v, norm, rank, energy)
    remainder = max(norm - kept, 0.0)
    if item.rounded_to is not None and b.shape[1] <= HIGHEST_RANK and remainder > _NEGLIGIBLE * norm:
        refined = without_rounding(item, b, a, remainder)
        if refined is not None:
            b, a = refined
            remainder = _squared_distance(item, b, a)
    u, sizes, v = svd_of_product(b, a)
    roots = np.sqrt(sizes)
    delta = LowRank((roots[:, None] * v).astype(np.float32), (u * roots).astype(np.float32), 1.0)
    return (delta.transposed() if item.transposed else delta), float(np.sqrt(remainder / norm))


def _is_exact_faster(item: Difference, rank: int) -> bool:
    """Whether the eigenvectors of the smaller of ``D^T D`` and ``D D^T`` take no longer than three passes."""
    values, side = item.n_rows * item.n_columns, min(item.n_rows, item.n_columns)
    exact = side * (values + _EXACT_COST * side**2)
    return values <= _EXACT_VALUES and exact <= _KRYLOV_COST * (rank + _OVERSAMPLING) * values


def _decompose(item: Difference, rank: int) -> tuple[Float64Array, Float64Array, float]:
    """Return ``D v`` for the leading right singular vectors v of D, v, and the squared norm of D."""
    delta, norm = np.empty((item.n_rows, item.n_columns)), 0.0
    for start, block in item.blocks():
        delta[start : start + len(block)] = block
        norm += _squared_norm(item, block)
    if item.n_rows >= item.n_columns or not norm:
        v = np.linalg.eigh(delta.T @ delta)[1][:, -rank:]
    else:
        v = np.linalg.qr(delta.T @ np.linalg.eigh(delta @ delta.T)[1][:, -rank:])[0]
    return delta @ v, v, norm


def _krylov(
    item: Difference, rank: int, iterations: int | None, rng: np.random.Generator
) -> tuple[Float64Array, Float64Array, float]:
    """Return ``D v``, an orthonormal basis v that holds the leading directions of D, and the squared norm of D."""
    width = min(rank + _OVERSAMPLING, item.n_rows, item.n_columns)
    basis = block = np.linalg.qr(rng.standard_normal((item.n_columns, width)))[0]
    images, errors = np.empty((item.n_rows, 0)), list[float]()
    while True:
        image, following, norm = _multiply(item, block)
        images = np.hstack([images, image])
        if not norm:
            return images, basis, norm
        squares = np.linalg.eigvalsh(images.T @ images)[::-1]
        errors.append(max(norm - float(squares[:rank].sum()), 0.0))
        is_enough = _is_converged(errors, norm) if iterations is None else len(errors) > iterations
        room = item.n_columns - basis.shape[1]
        if is_enough or room <= 0:
            return images, basis, norm
        block = _orthonormal(following, basis)[:, :room]
        if not block.shape[1]:
            return images, basis, norm
        basis = np.hstack([basis, block])


def _orthonormal(block: Float64Array, basis: Float64Array) -> Float64Array:
    """Return an orthonormal basis of the part of a block that is orthogonal to a basis; narrower if there is less."""
    scale = float(np.linalg.norm(block))
    for _ in range(2):
        block = block - basis @ (basis.T @ block)
    q, sizes, _ = np.linalg.svd(block, full_matrices=False)
    new = q[:, sizes > 1e-12 * scale]
    return np.linalg.qr(new - basis @ (basis.T @ new))[0] if new.shape[1] else new


def _is_converged(errors: Sequence[float], norm: float) -> bool:
    """Whether further passes would lower the squared error by no more than `_CLOSE_ENOUGH` if gains go on shrinking."""
    if errors[-1] <= _NEGLIGIBLE * norm:
        return True
    if len(errors) < 3:
        return False
    before, last = errors[-3] - errors[-2], errors[-2] - errors[-1]
    if last <= 0:
        return True
    ratio = min(last / before, _SLOWEST) if before > 0 else _SLOWEST
    return last * ratio / (1 - ratio) <= _CLOSE_ENOUGH * errors[-1]


def _multiply(item: Difference, v: Float64Array) -> tuple[Float64Array, Float64Array, float]:
    """Return ``D v``, ``D^T D v`` and the squared norm of D."""
    image, product, norm = np.empty((item.n_rows, v.shape[1])), np.zeros(v.shape), 0.0
    for start, block in item.blocks():
        part = block.astype(np.float64) @ v  # float32 errors would hide small deltas
        image[start : start + len(block)] = part
        product += block.T @ part.astype(np.float32)
        norm += _squared_norm(item, block)
    return image, product, norm


def _squared_norm(item: Difference, block: Float32Array) -> float:
    norm = float((block.astype(np.float64) ** 2).sum())
    if not np.isfinite(norm):
        raise AdapterError(f"{item.name}: one of the models holds NaN or infinity")
    return norm


def _truncate(
    y: Float64Array, v: Float64Array, norm: float, rank: int, energy: float | None
) -> tuple[Float64Array, Float64Array, float]:
    """Truncate ``y v^T`` to the requested rank; return b, a and their squared norm."""
    q, r = np.linalg.qr(y)
    u, sizes, w = np.linalg.svd(r)
    kept = min(rank, int((sizes > 0).sum()))
    sums = np.cumsum(sizes**2)
    if energy is not None:
        kept = min(kept, int(np.searchsorted(sums, energy * norm)) + 1)
    return (q @ u[:, :kept]) * sizes[:kept], w[:kept] @ v.T, float(sums[kept - 1])


def _squared_distance(item: Difference, b: Float64Array, a: Float64Array) -> float:
    """Return the squared norm of ``D - b a``."""
    total = 0.0
    for start, block in item.blocks():
        total += float(((block - b[start : start + len(block)] @ a) ** 2).sum())
    return total
