"""A vocabulary that grew while an adapter was trained: the new tokens, from the tokenizer saved with the adapter."""

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
    """Metadata of a base with its list of tokens made ``n_tokens`` long; empty if it is that long already.

    Rows for which the tokenizer has no token are padding, and get names like llama.cpp's converter gives them.

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
            f"was resized. Put the tokenizer it was trained with ({_TOKENIZER_FILES[0]}) into the adapter's directory"
        )
    news = [added.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(len(tokens), n_tokens)]
    grown: dict[str, list[Any]] = {TOKENS: [*tokens, *(text for text, _ in news)]}
    if types := base.metadata.get(TOKEN_TYPES):
        grown[TOKEN_TYPES] = [*types, *(kind for _, kind in news)]
    if scores := base.metadata.get(SCORES):
        grown[SCORES] = [*scores, *([_SCORE_OF_ADDED] * len(news))]
    entries = {key: encode_entry(key, values) for key, values in grown.items()}
    size_key = f"{base.architecture}.vocab_size"
    return entries | ({size_key: encode_entry(size_key, n_tokens)} if size_key in base.metadata else {})


def _added_tokens(folder: Path) -> dict[int, tuple[str, int]] | None:
    """Text and type of the tokens that a tokenizer adds to its model's, by number; None if there is no tokenizer."""
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
