"""Compare the tokenizer that was saved with an adapter with the metadata of a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.tokenizer import (
    CONTROL,
    NORMAL,
    TOKENIZER_FILES,
    UNUSED,
    USER_DEFINED,
    AdapterTokenizer,
    read_tokenizer,
)
from gguflora.architectures.base_model import is_mmproj
from gguflora.errors import UnsupportedAdapterError, listed
from gguflora.files.gguf import TOKEN_EMBEDDING, GgufFile

Entries = dict[str, Any]
"""Metadata values by key."""

TOKENS: Final = "tokenizer.ggml.tokens"
TOKEN_TYPES: Final = "tokenizer.ggml.token_type"  # noqa: S105  (not a password)
SCORES: Final = "tokenizer.ggml.scores"
MERGES: Final = "tokenizer.ggml.merges"
TEMPLATE: Final = "tokenizer.chat_template"

_SCORE_OF_ADDED: Final = -1000.0
_ID_NAMES: Final = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""GGUF's names of special tokens, where they differ; "seperator" is spelled so in gguf-py/gguf/constants.py."""


def compare_tokenizer(base: GgufFile, adapter: Adapter, n_tokens: int = 0) -> tuple[Entries, list[str]]:
    """Compare the metadata that llama.cpp's converter would write for the merged model with the base's.

    Numbers without a token are padding and are named ``[PAD<number>]``, as by the converter.

    Args:
        base: the base model.
        adapter: the adapter; its directory may hold a tokenizer.
        n_tokens: number of tokens of a larger vocabulary; 0 if the base's size stays.

    Returns:
        The metadata that differs, and the texts of added tokens for which the merged embedding has no row.

    Raises:
        UnsupportedAdapterError: if the vocabulary grows and the adapter's directory has no tokenizer.
        AdapterError: if its tokenizer cannot be read.
    """
    if adapter.architecture is not None or is_mmproj(base):  # a GGUF LoRA has no directory of its own
        return {}, []
    folder = adapter.path.parent
    tokenizer = read_tokenizer(folder)
    tokens = base.metadata.get(TOKENS) or []
    changed: Entries = {}
    if tokens and (tokenizer.has_tokens or len(tokens) < n_tokens):
        if not tokenizer.has_tokens:
            raise UnsupportedAdapterError(
                f"{folder}: its embedding has {n_tokens} rows, but {base.path} has {len(tokens)} tokens: the "
                f"vocabulary was resized. Copy the tokenizer of the training ({TOKENIZER_FILES[0]}) to the adapter's "
                "directory"
            )
        changed = _token_lists(base, tokenizer, tokens, n_tokens)
        changed |= _merges(base, tokenizer)
        changed |= _special_ids(base, tokenizer, max(len(tokens), n_tokens))
    return changed | _templates(base, tokenizer), _tokens_beyond(base, tokenizer, n_tokens)


def _token_lists(base: GgufFile, tokenizer: AdapterTokenizer, before: list[str], n_tokens: int) -> Entries:
    tokens, n_before = list(before), len(before)
    types = list(base.metadata.get(TOKEN_TYPES) or [])
    scores = list(base.metadata.get(SCORES) or [])
    tokens += [f"[PAD{index}]" for index in range(n_before, n_tokens)]
    types += [UNUSED] * (len(tokens) - n_before) if types else []
    scores += [_SCORE_OF_ADDED] * (len(tokens) - n_before) if scores else []
    for index, (text, kind) in _known_tokens(base, tokenizer):
        if index >= len(tokens):
            continue
        is_other_type = bool(types) and types[index] in {NORMAL, CONTROL, USER_DEFINED, UNUSED} and types[index] != kind
        if tokens[index] == text and (kind == NORMAL or not is_other_type):
            continue  # a special token may be missing among the added ones of an incomplete tokenizer
        tokens[index] = text
        if types:
            types[index] = kind
        if scores:
            scores[index] = _SCORE_OF_ADDED
    lists = {TOKENS: tokens, TOKEN_TYPES: types, SCORES: scores}
    changed: Entries = {key: values for key, values in lists.items() if values != (base.metadata.get(key) or [])}
    size_key = f"{base.architecture}.vocab_size"
    if n_tokens > n_before and size_key in base.metadata:
        changed[size_key] = n_tokens
    return changed


def _known_tokens(base: GgufFile, tokenizer: AdapterTokenizer) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield number, text and type of the tokens that both sides write alike: added ones, and a byte-level BPE's own."""
    if base.metadata.get("tokenizer.ggml.model") == "gpt2":
        for index, text in tokenizer.vocabulary.items():
            if index not in tokenizer.added:
                yield index, (text, NORMAL)
    yield from tokenizer.added.items()


def _merges(base: GgufFile, tokenizer: AdapterTokenizer) -> Entries:
    merges = list(tokenizer.merges)
    is_bpe = base.metadata.get("tokenizer.ggml.model") == "gpt2"
    return {MERGES: merges} if is_bpe and merges and merges != base.metadata.get(MERGES) else {}


def _special_ids(base: GgufFile, tokenizer: AdapterTokenizer, n_tokens: int) -> Entries:
    ids = {
        f"tokenizer.ggml.{_ID_NAMES.get(name, name)}_token_id": index for name, index in tokenizer.special_ids.items()
    }
    return {key: index for key, index in ids.items() if index < n_tokens and base.metadata.get(key) != index}


def _templates(base: GgufFile, tokenizer: AdapterTokenizer) -> Entries:
    named = sorted(name for name in tokenizer.templates if name != "default")
    values: Entries = {
        TEMPLATE if name == "default" else f"{TEMPLATE}.{name}": text for name, text in tokenizer.templates.items()
    }
    if named and set(named) != set(base.metadata.get("tokenizer.chat_templates") or []):
        values["tokenizer.chat_templates"] = named
    return {key: value for key, value in values.items() if base.metadata.get(key) != value}


def describe_changes(base: GgufFile, changed: Mapping[str, Any]) -> list[str]:
    """Return what changed metadata means to a reader, one text for each difference."""
    texts = []
    if TOKENS in changed:
        before, after = base.metadata.get(TOKENS) or [], changed[TOKENS]
        ids = [index for index, text in enumerate(after) if index >= len(before) or before[index] != text]
        texts.append(f"{len(ids)} tokens ({listed([f'{after[index]!r} = {index}' for index in ids], 3)})")
    elif TOKEN_TYPES in changed:
        texts.append("types of tokens")
    if MERGES in changed:
        texts.append("merges")
    names = {TOKENS, TOKEN_TYPES, SCORES, MERGES, f"{base.architecture}.vocab_size"}
    for key, value in changed.items():
        if key.startswith(TEMPLATE) or key in {"tokenizer.chat_templates"}:
            texts.append("chat template" if key == TEMPLATE else key)
        elif key not in names:
            texts.append(f"{key.removeprefix('tokenizer.ggml.')} = {value} (base: {base.metadata.get(key)})")
    return texts


def _tokens_beyond(base: GgufFile, tokenizer: AdapterTokenizer, n_tokens: int) -> list[str]:
    rows = n_tokens or (base.tensors[TOKEN_EMBEDDING].n_rows if TOKEN_EMBEDDING in base.tensors else 0)
    return [text for index, (text, _) in tokenizer.added.items() if rows and index >= rows]
