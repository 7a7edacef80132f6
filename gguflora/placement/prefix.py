"""Fit a soft prompt to a base model: as embeddings or as keys and values that precede the first token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from gguflora.adapters.soft_prompt import SoftPrompt, read_soft_prompt
from gguflora.architectures import KNOWN
from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.mapping import key_order
from gguflora.errors import MismatchError, UnsupportedAdapterError
from gguflora.files.gguf import TOKEN_EMBEDDING
from gguflora.quants.arrays import Float32Array

_SCALES_EMBEDDINGS: Final = frozenset({"gemma", "gemma2"})
"""Architectures whose llama.cpp graph multiplies input embeddings by sqrt(n_embd). In transformers, only the lookup of
tokens does that, so the embeddings of a soft prompt are divided by it here."""

_ENCODERS: Final = dict.fromkeys(("bert", "t5"), "is not a decoder")
_NOT_EMBEDDINGS: Final[dict[str, str]] = {
    **_ENCODERS,
    "glm4": "aborts in llama.cpp on input embeddings",
    "minicpm": "scales embeddings in a way that has not been compared with PEFT",
}
_NOT_KEYS_AND_VALUES: Final[dict[str, str]] = {
    **_ENCODERS,
    "baichuan": "orders its keys in a way that has not been compared with PEFT",
    "deepseek2": "caches latent vectors, not keys and values",
    "falcon": "caches one key for all heads, while PEFT learns one for each",
    "internlm2": "orders its keys in a way that has not been compared with PEFT",
}


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A soft prompt fitted to a base: either embeddings, or keys and values, at the positions before the first token.

    Attributes:
        sha256: SHA-256 of the soft prompt, in hexadecimal.
        n_tokens: number of positions that the prefix takes, from position 0.
        embeddings: input embeddings for llama.cpp's graph, (n_tokens, n_embd); None for keys and values.
        keys: rotated keys of each layer, (n_tokens, n_kv), in the order of GGUF's rows.
        values: values of each layer, (n_tokens, n_kv).
    """

    sha256: str
    n_tokens: int
    embeddings: Float32Array | None
    keys: tuple[Float32Array, ...] = ()
    values: tuple[Float32Array, ...] = ()


def read_prefix(path: Path, base: BaseModel, task: int | None = None) -> Prefix:
    """Read the soft prompt of a PEFT directory, and fit it to a base model.

    Args:
        path: the PEFT directory.
        base: the base model.
        task: number of the task for MULTITASK_PROMPT_TUNING.

    Raises:
        AdapterError, FormatError: see `read_soft_prompt`.
        MismatchError, UnsupportedAdapterError: see `fit_prefix`.
    """
    return fit_prefix(read_soft_prompt(path, task), base)


def fit_prefix(prompt: SoftPrompt, base: BaseModel) -> Prefix:
    """Fit a soft prompt to a base model.

    Raises:
        MismatchError: if the soft prompt was trained for another model.
        UnsupportedAdapterError: if llama.cpp cannot apply it to this architecture.
    """
    return _with_keys(prompt, base) if prompt.is_keys_and_values else _with_embeddings(prompt, base)


def _with_embeddings(prompt: SoftPrompt, base: BaseModel) -> Prefix:
    _check_architecture(prompt, base, _NOT_EMBEDDINGS)
    n_embd = base.shapes[TOKEN_EMBEDDING][-1]
    if prompt.values.shape[1] != n_embd:
        raise MismatchError(
            f"{prompt.path}: virtual tokens of {prompt.values.shape[1]} numbers, but embeddings of {base.path} have "
            f"{n_embd}; load it on the base it was trained on"
        )
    scale = np.float32(n_embd) ** np.float32(-0.5) if base.architecture in _SCALES_EMBEDDINGS else np.float32(1)
    return Prefix(prompt.sha256, prompt.n_virtual, np.ascontiguousarray(prompt.values * scale))


def _with_keys(prompt: SoftPrompt, base: BaseModel) -> Prefix:
    _check_architecture(prompt, base, _NOT_KEYS_AND_VALUES)
    n_kv, rest = divmod(prompt.values.shape[1], 2 * base.n_layers)
    if rest:
        raise MismatchError(
            f"{prompt.path}: {prompt.values.shape[1]} numbers for each virtual token cannot be divided into keys and "
            f"values of the {base.n_layers} layers of {base.path}; load it on the base it was trained on"
        )
    layers = prompt.values.reshape(prompt.n_virtual, base.n_layers, 2, n_kv)
    return Prefix(
        prompt.sha256,
        prompt.n_virtual,
        None,
        keys=tuple(layers[:, layer, 0, key_order(base, layer, n_kv)] for layer in range(base.n_layers)),
        values=tuple(layers[:, layer, 1] for layer in range(base.n_layers)),
    )


def _check_architecture(prompt: SoftPrompt, base: BaseModel, refused: Mapping[str, str]) -> None:
    unknown = None if base.architecture in KNOWN else "is not known to gguflora, and llama.cpp may abort on it"
    reason = refused.get(base.architecture, unknown)
    if reason:
        raise UnsupportedAdapterError(
            f"{prompt.path}: {prompt.method} cannot be run on {base.path}: {base.architecture} {reason}; train LORA"
        )
