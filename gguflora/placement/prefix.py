"""A soft prompt fitted to a base model: what llama.cpp is given in place of tokens in front of the first one."""

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

_SCALED_AGAIN: Final = frozenset({"gemma", "gemma2"})
"""Whose graph multiplies embeddings given as numbers by sqrt(n_embd), which in transformers only the lookup does."""

_ENCODERS: Final = dict.fromkeys(("bert", "t5"), "is no decoder")
_NOT_EMBEDDINGS: Final[dict[str, str]] = {
    **_ENCODERS,
    "glm4": "aborts in llama.cpp when it is given embeddings",
    "minicpm": "scales embeddings in a way that was not held against PEFT",
}
_NOT_KEYS_AND_VALUES: Final[dict[str, str]] = {
    **_ENCODERS,
    "baichuan": "orders its keys in a way that was not held against PEFT",
    "deepseek2": "keeps latent vectors, not keys and values",
    "falcon": "keeps keys once that PEFT learns for every head",
    "internlm2": "orders its keys in a way that was not held against PEFT",
}


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What precedes the first token: either embeddings, or keys and values.

    Attributes:
        sha256: of the soft prompt.
        n_tokens: positions that it takes, from 0.
        embeddings: (n_tokens, n_embd), as llama.cpp's graph takes them; None if it is keys and values.
        keys: (n_tokens, n_kv) of each layer, rotated, in the order of GGUF's rows.
        values: (n_tokens, n_kv) of each layer.
    """

    sha256: str
    n_tokens: int
    embeddings: Float32Array | None
    keys: tuple[Float32Array, ...] = ()
    values: tuple[Float32Array, ...] = ()


def read_prefix(path: Path, base: BaseModel, task: int | None = None) -> Prefix:
    """The soft prompt of a PEFT directory, fitted to a base model.

    Raises:
        AdapterError, FormatError: as `read_soft_prompt`.
        MismatchError, UnsupportedAdapterError: as `fit_prefix`.
    """
    return fit_prefix(read_soft_prompt(path, task), base)


def fit_prefix(prompt: SoftPrompt, base: BaseModel) -> Prefix:
    """A soft prompt, fitted to a base model.

    Raises:
        MismatchError: if it was made for another model.
        UnsupportedAdapterError: if llama.cpp could not apply it to this architecture.
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
    scale = np.float32(n_embd) ** np.float32(-0.5) if base.architecture in _SCALED_AGAIN else np.float32(1)
    return Prefix(prompt.sha256, prompt.n_virtual, np.ascontiguousarray(prompt.values * scale))


def _with_keys(prompt: SoftPrompt, base: BaseModel) -> Prefix:
    _check_architecture(prompt, base, _NOT_KEYS_AND_VALUES)
    n_kv, rest = divmod(prompt.values.shape[1], 2 * base.n_layers)
    if rest:
        raise MismatchError(
            f"{prompt.path}: {prompt.values.shape[1]} numbers for each virtual token, which are no keys and values of "
            f"the {base.n_layers} layers of {base.path}; load it on the base it was trained on"
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
