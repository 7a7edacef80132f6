"""Extend the base's vocabulary with the tokens of the tokenizer that was saved with an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.gguf import GgufFile, encode_entry

TOKENS: Final = "tokenizer.ggml.tokens"
TOKEN_TYPES: Final = "tokenizer.ggml.token_type"  # noqa: S105  (not a password)
SCORES: Final = "tokenizer.ggml.scores"

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_SCORE_OF_ADDED: Final = -1000.0
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def grown_vocabulary(base: GgufFile, folder: Path, n_tokens: int) -> dict[str, bytes]:
    """Return the metadata entries of a vocabulary with ``n_tokens`` tokens, or none if the base has as many.

    Rows without a token are padding and are named ``[PAD<number>]``, as llama.cpp's converter does.

    Args:
        base: the base model.
        folder: directory of the adapter, with its tokenizer.
        n_tokens: number of tokens of the new vocabulary.

    Returns:
        The encoded entries by key.

    Raises:
        UnsupportedAdapterError: if the adapter's directory has no tokenizer.
        AdapterError: if its tokenizer cannot be read.
    """
    tokens: list[str] = base.metadata.get(TOKENS) or []
    if not tokens or len(tokens) >= n_tokens:
        return {}
    added = _added_tokens(folder)
    if added is None:
        raise UnsupportedAdapterError(
            f"{folder}: its embedding has {n_tokens} rows, but {base.path} has {len(tokens)} tokens: the vocabulary "
            f"was resized. Copy the tokenizer of the training ({_TOKENIZER_FILES[0]}) to the adapter's directory"
        )
    new_tokens = [added.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(len(tokens), n_tokens)]
    grown: dict[str, list[Any]] = {TOKENS: [*tokens, *(text for text, _ in new_tokens)]}
    if types := base.metadata.get(TOKEN_TYPES):
        grown[TOKEN_TYPES] = [*types, *(kind for _, kind in new_tokens)]
    if scores := base.metadata.get(SCORES):
        grown[SCORES] = [*scores, *([_SCORE_OF_ADDED] * len(new_tokens))]
    entries = {key: encode_entry(key, values) for key, values in grown.items()}
    size_key = f"{base.architecture}.vocab_size"
    return entries | ({size_key: encode_entry(size_key, n_tokens)} if size_key in base.metadata else {})


def _added_tokens(folder: Path) -> dict[int, tuple[str, int]] | None:
    """Return text and type of a tokenizer's added tokens by number, or None if there is no tokenizer."""
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            try:
                return dict(_read_tokens(name, json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise AdapterError(f"{path}: cannot be read as a tokenizer: {error!r:.200}") from error
    return None


def _read_tokens(name: str, content: Mapping[str, Any]) -> Iterator[tuple[int, tuple[str, int]]]:
    if name == "added_tokens.json":
        listed = [{"id": index, "content": text} for text, index in content.items()]
    elif name == "tokenizer_config.json":
        listed = [{"id": index, **token} for index, token in content.get("added_tokens_decoder", {}).items()]
    else:
        listed = content.get("added_tokens", [])
    for token in listed:
        yield int(token["id"]), (str(token["content"]), _CONTROL if token.get("special") else _USER_DEFINED)
