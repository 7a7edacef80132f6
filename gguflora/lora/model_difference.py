"""The difference of two models, read matrix by matrix in blocks of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.architectures import KNOWN
from gguflora.errors import MismatchError
from gguflora.files.checkpoint import Checkpoint
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.quants import kernels
from gguflora.quants.arrays import Float32Array

_CONVOLUTION: Final = re.compile(r"conv1d\.")
_STACKED: Final = re.compile(r"\.experts\.\w+\.\d+$")
_TRANSPOSED_EXPERTS: Final = {"gpt_oss", "llama4", "llama4_text"}
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """A weight that both models have.

    Attributes:
        name: name of the weight or tensor; expert e of a stack is ``<name>.<e>``.
        n_rows: number of rows as stored.
        n_columns: number of columns as stored.
        transposed: whether the Hugging Face model stores it as (n_in, n_out).
        problem: why a LoRA cannot hold its delta; None if it can.
        rounded_to: 16-bit type of the tuned model's values, ``F16`` or ``BF16``; None for other types.
        rows: ``rows(start, stop)`` reads these rows of the tuned model and of the base, as float32.
    """

    name: str
    n_rows: int
    n_columns: int
    transposed: bool
    problem: str | None
    rounded_to: str | None
    rows: Callable[[int, int], tuple[Float32Array, Float32Array]]

    def blocks(self) -> Iterator[tuple[int, Float32Array]]:
        """Yield the difference in blocks of rows, each with the index of its first row."""
        for start, tuned, base in self.both():
            yield start, tuned - base

    def relative_norm(self) -> float:
        """Return the norm of the difference divided by the norm of the base; the norm itself if the base is zero."""
        delta = base_norm = 0.0
        for _, tuned, base in self.both():
            delta += float(((tuned - base).astype(np.float64) ** 2).sum())
            base_norm += float((base.astype(np.float64) ** 2).sum())
        return float(np.sqrt(delta / base_norm)) if base_norm else float(np.sqrt(delta))

    def both(self) -> Iterator[tuple[int, Float32Array, Float32Array]]:
        """Yield the values of both models in blocks of rows: index of the first row, tuned values, base values."""
        step = max(1, _BLOCK // self.n_columns)
        for start in range(0, self.n_rows, step):
            yield start, *self.rows(start, min(start + step, self.n_rows))


@dataclass(frozen=True, slots=True)
class Differences:
    """The differences of two models.

    Attributes:
        architecture: architecture of both models if they are GGUF files, else None.
        weights: the weights that both models have.
        left_out: why a weight cannot be compared, by name: only one model has it, or the shapes differ.
        fields: additional fields for ``adapter_config.json``.
    """

    architecture: str | None
    weights: tuple[Difference, ...]
    left_out: dict[str, str]
    fields: dict[str, Any]


def open_differences(tuned: Path, base: Path) -> AbstractContextManager[Differences]:
    """Open two GGUF files or two Hugging Face directories for comparison.

    Raises:
        MismatchError: if one is a file and the other a directory, or their architectures differ.
        FormatError: if one cannot be read.
    """
    if tuned.is_dir() != base.is_dir():
        raise MismatchError(f"{tuned} and {base}: give two GGUF files or two Hugging Face directories")
    return _open_directories(tuned, base) if tuned.is_dir() else _open_files(tuned, base)


@contextmanager
def _open_files(tuned_path: Path, base_path: Path) -> Iterator[Differences]:
    with GgufFile(tuned_path) as tuned, GgufFile(base_path) as base:
        if tuned.architecture != base.architecture:
            raise MismatchError(f"{tuned_path} is {tuned.architecture!r}, but {base_path} is {base.architecture!r}")
        left_out = _find_unmatched(
            {name: tensor.shape for name, tensor in tuned.tensors.items()},
            {name: tensor.shape for name, tensor in base.tensors.items()},
        )
        is_tied = OUTPUT not in base.tensors
        found = [
            difference
            for name in base.tensors
            if name not in left_out
            for difference in _tensor_differences(tuned, base, name, is_tied=is_tied)
        ]
        yield Differences(base.architecture, tuple(found), left_out, {})


def _tensor_differences(tuned: GgufFile, base: GgufFile, name: str, *, is_tied: bool) -> Iterator[Difference]:
    ours, theirs = tuned.tensors[name], base.tensors[name]
    problem = None
    if len(ours.shape) == 1:
        problem = "a norm or bias, which a LoRA cannot change"
    elif name == TOKEN_EMBEDDING and is_tied:
        problem = "the token embedding, to which the output weight is tied: llama.cpp would abort on a LoRA of it"
    n_rows = ours.shape[-2] if len(ours.shape) > 1 else 1
    for offset in range(0, ours.n_rows, n_rows):
        expert = f".{offset // n_rows}" if len(ours.shape) > 2 else ""

        def rows(start: int, stop: int, offset: int = offset) -> tuple[Float32Array, Float32Array]:
            return (
                _read(tuned, ours, offset + start, offset + stop),
                _read(base, theirs, offset + start, offset + stop),
            )

        yield Difference(f"{name}{expert}", n_rows, ours.n_in, False, problem, _half_type(ours.type.name), rows)


def _read(file: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Float32Array:
    values = np.empty((stop - start, tensor.n_in), np.float32)
    kernels.dequantize_rows(file.read_rows(tensor, start, stop), tensor.type, values)
    return values


@contextmanager
def _open_directories(tuned_path: Path, base_path: Path) -> Iterator[Differences]:
    config = _read_config(base_path)
    with closing(Checkpoint(tuned_path)) as tuned, closing(Checkpoint(base_path)) as base:
        left_out = _find_unmatched(
            {name: (weight.n_rows, weight.n_columns) for name, weight in tuned.weights.items()},
            {name: (weight.n_rows, weight.n_columns) for name, weight in base.weights.items()},
        )
        found = [_weight_difference(tuned, base, name, config) for name in base.weights if name not in left_out]
        fields = {"fan_in_fan_out": True} if any(item.transposed and _is_layer(item.name) for item in found) else {}
        yield Differences(None, tuple(found), left_out, fields)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(f"{folder}/config.json: cannot be read as a model's configuration: {error}") from error
    return config if isinstance(config, dict) else {}


def _is_layer(name: str) -> bool:
    return name.endswith(".weight")


def _weight_difference(tuned: Checkpoint, base: Checkpoint, name: str, config: dict[str, Any]) -> Difference:
    ours, theirs = tuned.weights[name], base.weights[name]
    problem = None
    if ours.n_columns == 1 or name.endswith("bias"):
        problem = "a norm or bias, which a LoRA cannot change"
    elif _CONVOLUTION.search(name):
        problem = "a convolution, which a LoRA of linear layers cannot change"
    elif not (_is_layer(name) or _STACKED.search(name)):
        problem = "no weight of a linear layer"
    elif name.endswith(("embed_tokens.weight", "wte.weight")) and config.get("tie_word_embeddings"):
        problem = "the token embedding, to which the output weight is tied"
    kind = str(config.get("model_type"))
    conv1d = KNOWN["gpt2"].conv1d if kind == "gpt2" else None
    transposed = bool(conv1d and conv1d.search(name)) or (kind in _TRANSPOSED_EXPERTS and bool(_STACKED.search(name)))

    def rows(start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        numbers = np.arange(start, stop)
        return tuned.read_rows(ours, numbers), base.read_rows(theirs, numbers)

    return Difference(name, ours.n_rows, ours.n_columns, transposed, problem, _half_type(ours.dtype), rows)


def _half_type(kind: str) -> str | None:
    return kind if kind in {"F16", "BF16"} else None


def _find_unmatched(tuned: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    reasons = dict.fromkeys(tuned.keys() - base.keys(), "only the tuned model has it")
    reasons |= dict.fromkeys(base.keys() - tuned.keys(), "only the base has it")
    for name in tuned.keys() & base.keys():
        if tuned[name] != base[name]:
            reasons[name] = f"its shape is {tuned[name]} in the tuned model and {base[name]} in the base"
    return dict(sorted(reasons.items()))
