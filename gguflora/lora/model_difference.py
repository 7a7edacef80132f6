"""The difference of two models, read matrix by matrix in blocks of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.architectures import KNOWN, aborts_at_run_time, ignored_at_run_time
from gguflora.architectures.base_model import BaseModel, describe
from gguflora.architectures.mapping import adaptable_weights
from gguflora.errors import MismatchError
from gguflora.files.checkpoint import Checkpoint, StoredWeight
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile, TensorEntry
from gguflora.files.small_files import CONFIG_BYTES, read_small_text
from gguflora.lora.factored import is_embedding
from gguflora.quants import kernels
from gguflora.quants.arrays import Float32Array

_CONVOLUTION: Final = re.compile(r"conv1d\.")
_STACKED: Final = re.compile(r"\.experts\.\w+\.\d+$")
_TRANSPOSED_EXPERTS: Final = {"gpt_oss"}
"""Models whose experts are stored as (n_in, n_out) and adapted by PEFT as (n_out, n_in); Llama 4's are not turned."""
_BLOCK: Final = 1 << 20
_VECTOR: Final = "a norm or bias, which a LoRA cannot change"
_TYING: Final = "ensure_weight_tying"
"""PEFT's option that gives the output weight the LoRA of the embedding to which it is tied."""
_MAMBA: Final = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "falcon-h1"})
_REFUSED: Final = "PEFT does not adapt the output projection of Mamba layers"
_SHARED: Final = frozenset({"t5", "t5encoder"})
_SHARED_EMBEDDING: Final = "several modules share the embedding, which PEFT cannot adapt as one"
_OUTPUTS: Final = ("lm_head.weight", "embed_out.weight", "output.weight")
_NEW_NAMES: Final = {"embed_out.weight": "lm_head.weight"}
"""Names in a checkpoint of GPT-NeoX by those in transformers 5."""
_NORM: Final = re.compile(r"norm|^ln(?:_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Difference:
    """A weight that both models have.

    Attributes:
        name: name of the weight or tensor; expert e of a stack is ``<name>.<e>``.
        n_rows: number of rows as stored.
        n_columns: number of columns as stored.
        transposed: whether the Hugging Face model stores it as (n_in, n_out).
        problem: why a LoRA cannot hold its delta; None if it can.
        saved_by: module that a PEFT directory can hold as a whole instead (``modules_to_save``); None if it cannot.
        rounded_to: 16-bit type of the tuned model's values, ``F16`` or ``BF16``; None for other types.
        rows: ``rows(start, stop)`` reads these rows of the tuned model and of the base, as float32.
    """

    name: str
    n_rows: int
    n_columns: int
    transposed: bool
    problem: str | None
    saved_by: str | None
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


def open_differences(tuned: Path, base: Path, *, as_peft: bool) -> AbstractContextManager[Differences]:
    """Open two GGUF files or two Hugging Face directories for comparison.

    Args:
        tuned: the fine-tuned model.
        base: the model before.
        as_peft: whether the LoRA becomes a PEFT directory, which can hold other changes than a GGUF file.

    Raises:
        MismatchError: if one is a file and the other a directory, or their architectures differ.
        FormatError: if one cannot be read.
    """
    if tuned.is_dir() != base.is_dir():
        raise MismatchError(f"{tuned} and {base}: give two GGUF files or two Hugging Face directories")
    return _open_directories(tuned, base, as_peft) if tuned.is_dir() else _open_files(tuned, base, as_peft)


@contextmanager
def _open_files(tuned_path: Path, base_path: Path, as_peft: bool) -> Iterator[Differences]:
    with GgufFile(tuned_path) as tuned, GgufFile(base_path) as base:
        if tuned.architecture != base.architecture:
            raise MismatchError(f"{tuned_path} is {tuned.architecture!r}, but {base_path} is {base.architecture!r}")
        left_out = _find_unmatched(
            {name: tensor.shape for name, tensor in tuned.tensors.items()},
            {name: tensor.shape for name, tensor in base.tensors.items()},
        )
        model = describe(base)
        problem_of = _problems_in_peft(model) if as_peft else partial(_problem_in_gguf, model)
        found = [
            difference
            for name in base.tensors
            if name not in left_out
            for difference in _tensor_differences(tuned, base, name, problem_of)
        ]
        fields = {_TYING: True} if as_peft and model.is_tied and model.architecture not in _SHARED else {}
        yield Differences(base.architecture, tuple(found), left_out, fields)


def _problem_in_gguf(model: BaseModel, tensor: str) -> str | None:
    """Return why llama.cpp would not apply a LoRA of a tensor; None if it does."""
    if tensor == TOKEN_EMBEDDING and model.is_tied:
        return "the token embedding, to which the output weight is tied: llama.cpp would abort on a LoRA of it"
    return ignored_at_run_time(model, tensor) or aborts_at_run_time(model, tensor)


def _problems_in_peft(model: BaseModel) -> Callable[[str], str | None]:
    known = {tensor_slice.tensor for slices in adaptable_weights(model).values() for tensor_slice in slices}

    def problem(tensor: str) -> str | None:
        if tensor not in known:
            return "no module of the Hugging Face model holds it"
        if tensor == TOKEN_EMBEDDING and model.architecture in _SHARED:
            return _SHARED_EMBEDDING
        return _REFUSED if model.architecture in _MAMBA and tensor.endswith("ssm_out.weight") else None

    return problem


def _tensor_differences(
    tuned: GgufFile, base: GgufFile, name: str, problem_of: Callable[[str], str | None]
) -> Iterator[Difference]:
    ours, theirs = tuned.tensors[name], base.tensors[name]
    problem = _VECTOR if len(ours.shape) == 1 else problem_of(name)
    n_rows = ours.shape[-2] if len(ours.shape) > 1 else 1
    for offset in range(0, ours.n_rows, n_rows):
        expert = f".{offset // n_rows}" if len(ours.shape) > 2 else ""

        def rows(start: int, stop: int, offset: int = offset) -> tuple[Float32Array, Float32Array]:
            return (
                _read(tuned, ours, offset + start, offset + stop),
                _read(base, theirs, offset + start, offset + stop),
            )

        half = _half_type(ours.type.name)
        yield Difference(f"{name}{expert}", n_rows, ours.n_in, False, problem, None, half, rows)


def _read(file: GgufFile, tensor: TensorEntry, start: int, stop: int) -> Float32Array:
    values = np.empty((stop - start, tensor.n_in), np.float32)
    kernels.dequantize_rows(file.read_rows(tensor, start, stop), tensor.type, values)
    return values


@contextmanager
def _open_directories(tuned_path: Path, base_path: Path, as_peft: bool) -> Iterator[Differences]:
    config = _read_config(base_path)
    with closing(Checkpoint(tuned_path)) as tuned, closing(Checkpoint(base_path)) as base:
        left_out = _find_unmatched(
            {name: (weight.n_rows, weight.n_columns) for name, weight in tuned.weights.items()},
            {name: (weight.n_rows, weight.n_columns) for name, weight in base.weights.items()},
        )
        is_tied = _is_tied(base, config)
        grown = _grown(tuned, base, left_out) if as_peft and not config.get("is_encoder_decoder") else []
        names = [name for name in base.weights if name not in left_out or name in grown]
        left_out = {name: reason for name, reason in left_out.items() if name not in grown}
        if is_tied:  # the output weight may be stored a second time
            names = [name for name in names if name not in _OUTPUTS or not any(map(is_embedding, names))]
        found = [_weight_difference(tuned, base, name, config, is_tied and not as_peft) for name in names]
        fields: dict[str, Any] = {}
        if any(item.transposed and _is_layer(item.name) for item in found):
            fields["fan_in_fan_out"] = True
        if is_tied and as_peft and not config.get("is_encoder_decoder"):
            fields[_TYING] = True
        yield Differences(None, tuple(found), left_out, fields)


def _grown(tuned: Checkpoint, base: Checkpoint, left_out: Mapping[str, str]) -> list[str]:
    """Return the embeddings and output weights that have more rows in the tuned model, for its new tokens."""
    both = [name for name in left_out if name in tuned.weights and name in base.weights]
    sizes = {name: (tuned.weights[name], base.weights[name]) for name in both if is_vocabulary(name)}
    return [
        name
        for name, (ours, theirs) in sizes.items()
        if ours.n_columns == theirs.n_columns and ours.n_rows > theirs.n_rows
    ]


def is_vocabulary(name: str) -> bool:
    """Whether a weight of a Hugging Face model has a row for each token."""
    return is_embedding(name) or name in _OUTPUTS


def _is_tied(base: Checkpoint, config: dict[str, Any]) -> bool:
    """Whether a Hugging Face model uses its token embedding as output weight, too.

    ``config.json`` may not say it, since the default depends on the class. Then a model for generation is tied if it
    has no output weight of its own, or one that equals the embedding.
    """
    text = config.get("text_config")
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    if flag is not None:
        return bool(flag)
    classes = config.get("architectures") or [""]
    if not re.search(r"LM|Generation|^$", str(classes[0])):
        return False
    output = next((base.weights[name] for name in _OUTPUTS if name in base.weights), None)
    if output is None:
        return True
    shape = output.n_rows, output.n_columns
    inputs = [weight for name, weight in base.weights.items() if is_embedding(name)]
    return any((item.n_rows, item.n_columns) == shape and _are_equal(base, item, output) for item in inputs)


def _are_equal(base: Checkpoint, one: StoredWeight, other: StoredWeight) -> bool:
    step = max(1, _BLOCK // one.n_columns)
    for start in range(0, one.n_rows, step):
        rows = np.arange(start, min(start + step, one.n_rows))
        if not np.array_equal(base.read_rows(one, rows), base.read_rows(other, rows)):
            return False
    return True


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_small_text(folder / "config.json", CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise MismatchError(f"{folder}/config.json: cannot be read as a model's configuration: {error}") from error
    return config if isinstance(config, dict) else {}


def _is_layer(name: str) -> bool:
    return name.endswith(".weight")


def _weight_difference(
    tuned: Checkpoint, base: Checkpoint, name: str, config: dict[str, Any], refuse_embedding: bool
) -> Difference:
    ours, theirs = tuned.weights[name], base.weights[name]
    problem, module = None, name.rpartition(".")[0]
    if ours.n_columns == 1 or name.endswith("bias"):
        problem = _VECTOR
    elif _CONVOLUTION.search(name):
        problem = "a convolution, which a LoRA of linear layers cannot change"
    elif not (_is_layer(name) or _STACKED.search(name)):
        problem = "no weight of a linear layer"
    elif str(config.get("model_type")) in _MAMBA and name.endswith("out_proj.weight"):
        problem = _REFUSED
    elif is_embedding(name) and config.get("is_encoder_decoder"):
        problem = _SHARED_EMBEDDING
    elif is_embedding(name) and refuse_embedding:
        problem = "the token embedding, to which the output weight is tied"
    elif ours.n_rows > theirs.n_rows:
        problem = "it has more rows than the base's, for new tokens"
    kind = str(config.get("model_type"))
    conv1d = KNOWN["gpt2"].conv1d if kind == "gpt2" else None
    transposed = bool(conv1d and conv1d.search(name)) or (kind in _TRANSPOSED_EXPERTS and bool(_STACKED.search(name)))

    def rows(start: int, stop: int) -> tuple[Float32Array, Float32Array]:
        numbers = np.arange(start, stop)
        values = tuned.read_rows(ours, numbers)
        before = np.zeros_like(values)
        before[: max(theirs.n_rows - start, 0)] = base.read_rows(theirs, numbers[numbers < theirs.n_rows])
        return values, before

    known_as = _NEW_NAMES.get(name, name)
    is_norm = problem == _VECTOR and _NORM.search(module.rpartition(".")[2])
    saved_by = known_as.rpartition(".")[0] if is_norm or is_vocabulary(name) else None
    half = _half_type(ours.dtype)
    return Difference(known_as, ours.n_rows, ours.n_columns, transposed, problem, saved_by, half, rows)


def _half_type(kind: str) -> str | None:
    return kind if kind in {"F16", "BF16"} else None


def _find_unmatched(tuned: dict[str, Any], base: dict[str, Any]) -> dict[str, str]:
    reasons = dict.fromkeys(tuned.keys() - base.keys(), "only the tuned model has it")
    reasons |= dict.fromkeys(base.keys() - tuned.keys(), "only the base has it")
    for name in tuned.keys() & base.keys():
        if tuned[name] != base[name]:
            reasons[name] = f"its shape is {tuned[name]} in the tuned model and {base[name]} in the base"
    return dict(sorted(reasons.items()))
