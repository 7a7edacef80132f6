"""Collect second moments: run a base with its hot adapters over a text, and sketch the inputs of weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gguflora.architectures.base_model import read_whole_base
from gguflora.errors import FormatError, HotSwapError, MissingExtraError, UnsupportedAdapterError
from gguflora.merging.moments import RANK, Moments
from gguflora.quants.arrays import Float32Array, Float64Array

if TYPE_CHECKING:
    from gguflora.runtime.input_watch import Inputs

TOKENS: Final = 4096
_WINDOW: Final = 512
_SHIFT: Final = 1e-6
"""Added to a sketch's matrix, relative to its trace, for a stable factorization."""


def collect_moments(
    base: Path,
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    weights: Mapping[str, tuple[int, int]],
    texts: Sequence[str | os.PathLike[str]],
    threads: int,
) -> tuple[dict[str, Moments], list[str]]:
    """Run a base with adapters over about `TOKENS` tokens: the built-in text, half of it the user's if given.

    Args:
        base: the GGUF file; for a split model, its first file.
        adapters: paths and scales. If llama.cpp cannot apply them all, the base runs alone.
        weights: number of matrices and of columns by name of the weight.
        texts: the user's texts.
        threads: number of threads.

    Returns:
        The moments of all weights that the model used, and warnings.

    Raises:
        MissingExtraError: if llama-cpp-python is not installed.
        FormatError: if a text is too short or cannot be read.
        HotSwapError: if llama.cpp cannot run the model.
    """
    try:
        from gguflora.calibration.observe import observe, windows_of  # noqa: PLC0415  (needs llama_cpp)
        from gguflora.runtime.logits import LogitsModel  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("calibrating a merge", "llama-cpp-python", "runtime") from error
    loras, warnings = _hot(base, adapters)
    with LogitsModel(base, threads, repack=False) as model:
        window = min(_WINDOW, model.n_ctx_train)
        count = max(1, TOKENS // window)
        own = [part for text in texts for part in windows_of(model, Path(text), window)]
        own = spread(own, count // 2)
        windows = [*own, *spread(windows_of(model, None, window), count - len(own))]
        inputs = observe(model, windows, weights, loras=loras, omega=_omega)
    made: dict[int, Moments] = {}
    for name, found in inputs.items():
        if id(found.squares) not in made:
            _check_range(base, name, found)
            made[id(found.squares)] = _moments(found.counts, found.squares, found.sketch)
    if not made:
        raise FormatError(f"{base}: no changed weight was multiplied with anything; is it a text generator?")
    return {name: made[id(found.squares)] for name, found in inputs.items()}, warnings


def _hot(
    base: Path, adapters: Sequence[tuple[str | os.PathLike[str], float]]
) -> tuple[list[tuple[Path, float]], list[str]]:
    """Return the adapters as files for llama.cpp; none and a warning if it cannot apply all of them."""
    from gguflora.runtime.adapter_files import open_adapter  # noqa: PLC0415  (needs llama_cpp)

    model, loras = read_whole_base(base), []
    for path, scale in adapters:
        try:
            loras.append((open_adapter(Path(path), model).file, scale))
        except (HotSwapError, UnsupportedAdapterError) as error:
            return [], [f"{path}: cannot be applied hot, so the merge is calibrated on the base alone: {error}"]
    return loras, []


def spread(windows: Sequence[list[int]], count: int) -> list[list[int]]:
    """Choose up to ``count`` windows that lie evenly in a text."""
    if len(windows) <= count:
        return list(windows)
    return [windows[number * len(windows) // count] for number in range(count)]


@lru_cache(maxsize=8)
def _omega(n_in: int) -> Float32Array:
    """Return a random matrix (n_in, 64) with orthonormal columns (zeros beyond n_in), the same at every call."""
    from gguflora.runtime.input_watch import SKETCH  # noqa: PLC0415  (needs the extension)

    random = np.random.default_rng(n_in).standard_normal((n_in, min(n_in, SKETCH)))
    omega = np.zeros((n_in, SKETCH), np.float32)
    omega[:, : random.shape[1]] = np.linalg.qr(random)[0]
    return omega


def _check_range(base: Path, name: str, found: Inputs) -> None:
    """Raise ``HotSwapError`` if squares of inputs do not fit in float32, in which moments are kept."""
    sketch, largest = found.sketch, np.finfo(np.float32).max
    if found.squares.max(initial=0.0) > largest or (sketch is not None and not np.isfinite(sketch).all()):
        raise HotSwapError(f"{base}: the inputs of {name!r} are too large to sum up their squares in float32")


def _moments(counts: np.ndarray, squares: Float64Array, sketch: Float32Array | None) -> Moments:
    assert sketch is not None
    n_matrices, n_in = squares.shape
    each = np.broadcast_to(counts, n_matrices).astype(np.float64)
    v, d = np.zeros((n_matrices, RANK, n_in), np.float32), np.zeros((n_matrices, n_in), np.float32)
    for index in np.flatnonzero(each):
        diagonal = squares[index] / each[index]
        v[index] = _nystroem(sketch[index].astype(np.float64) / each[index], _omega(n_in).astype(np.float64))
        d[index] = np.maximum(diagonal - (v[index].astype(np.float64) ** 2).sum(0), 0.0)
    return Moments(v, d, each.astype(np.float32))


def _nystroem(sketch: Float64Array, omega: Float64Array) -> Float64Array:
    """Return v (RANK, n_in) with v.T @ v near H, given H @ omega: fixed-rank Nystroem (Tropp et al. 2017, algorithm 3).

    Args:
        sketch: H @ omega.
        omega: orthonormal columns; zero columns are ignored.
    """
    used = omega.any(axis=0)
    sketch, omega = sketch[:, used], omega[:, used]
    shift = _SHIFT * max(float(np.trace(omega.T @ sketch)), 1e-30)
    shifted = sketch + shift * omega
    core = omega.T @ shifted
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    root = vectors / np.sqrt(np.maximum(values, shift))
    factor = shifted @ root
    squares, right = np.linalg.eigh(factor.T @ factor)  # its right singular vectors, in a fifth of the time of an SVD
    kept = np.argsort(squares)[::-1][:RANK]
    shares = np.sqrt(np.maximum(squares[kept] - shift, 0.0) / np.maximum(squares[kept], shift))
    v = np.zeros((RANK, len(sketch)))
    v[: len(kept)] = (factor @ (right[:, kept] * shares)).T
    return v
