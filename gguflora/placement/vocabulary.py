"""Compare the tokenizer that was saved with an adapter with the metadata of a base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora.adapters.adapter import Adapter
from gguflora.adapters.sentencepiece_model import read_pieces
from gguflora.adapters.tokenizer import (
    BYTE,
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

KIND: Final = "tokenizer.ggml.model"

_SCORE_OF_ADDED: Final = -1000.0
_SCORE_OF_PADDING: Final = -10000.0
_WITH_PIECES: Final = frozenset({"llama", "t5"})
"""GGUF's kinds of tokenizers that the converter reads from a SentencePiece model."""
_KINDS: Final = {
    "gpt2": "a BPE of bytes",
    "llama": "SentencePiece's BPE",
    "t5": "a unigram model",
    "bert": "WordPiece",
}
_FITTING: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt2": ("gpt2",),
    "llama": ("llama", "t5"),
    "t5": ("t5",),
    "bert": ("bert",),
}
"""The kinds of tokenizer.json whose tokens a GGUF file of each kind can hold."""
_SOME_BYTE: Final = "<0x0A>"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ID_NAMES: Final = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""GGUF's names of special tokens, where they differ; "seperator" is spelled so in gguf-py/gguf/constants.py."""


@dataclass(frozen=True, slots=True)
class TokenizerDifference:
    """How the tokenizer in an adapter's directory differs from a base's metadata.

    Attributes:
        changed: the metadata values that differ, as llama.cpp's converter would write them for the merged model.
        beyond: texts of added tokens for which the merged embedding has no row.
        another_kind: why the tokens were not compared; empty if they were.
    """

    changed: Entries
    beyond: Sequence[str] = ()
    another_kind: str = ""


@dataclass(frozen=True, slots=True)
class _Token:
    """A token as GGUF writes it; a score of None means that the source has none."""

    text: str
    kind: int
    score: float | None = None


def compare_tokenizer(base: GgufFile, adapter: Adapter, n_tokens: int = 0) -> TokenizerDifference:
    """Compare the metadata that llama.cpp's converter would write for the merged model with the base's.

    Numbers without a token are padding and are named ``[PAD<number>]``, as by the converter.

    Args:
        base: the base model.
        adapter: the adapter; its directory may hold a tokenizer.
        n_tokens: number of tokens of a larger vocabulary; 0 if the base's size stays.

    Raises:
        UnsupportedAdapterError: if the vocabulary grows and the adapter's directory has no tokenizer.
        AdapterError: if its tokenizer cannot be read.
    """
    if adapter.architecture is not None or is_mmproj(base):  # a GGUF LoRA has no directory of its own
        return TokenizerDifference({})
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
        other = _other_kind(base, tokenizer)
        if other and len(tokens) < n_tokens:
            raise UnsupportedAdapterError(f"{folder}: the vocabulary was resized to {n_tokens} tokens, but {other}")
        if other:
            return TokenizerDifference(_templates(base, tokenizer), another_kind=f"{folder}: {other}")
        changed = _token_lists(base, tokenizer, tokens, n_tokens)
        changed |= _merges(base, tokenizer)
        changed |= _special_ids(base, tokenizer, max(len(tokens), n_tokens))
        changed |= _added_around(base, tokenizer)
    return TokenizerDifference(changed | _templates(base, tokenizer), _tokens_beyond(base, tokenizer, n_tokens))


def _other_kind(base: GgufFile, tokenizer: AdapterTokenizer) -> str:
    """Return why the tokens of two tokenizers cannot be compared; empty if they can."""
    kind = str(base.metadata.get(KIND))
    if kind not in _FITTING or not tokenizer.kind or _fits(base, kind, tokenizer.kind):
        return ""
    if tokenizer.piece_file is not None and kind in _WITH_PIECES:
        return ""
    return (
        f"its tokenizer.json is {_KINDS[tokenizer.kind]}, but the base's tokenizer is {_KINDS[kind]}: the base's "
        "tokens are kept. Remove the file if it does not belong to the adapter"
    )


def _fits(base: GgufFile, kind: str, other: str) -> bool:
    """Whether a GGUF file with a kind of tokenizer can hold the tokens of a tokenizer.json of another kind."""
    if (kind, other) == ("gpt2", "llama"):  # the converter reads Gemma 3's tokenizer.json as BPE of bytes
        return _SOME_BYTE in (base.metadata.get(TOKENS) or [])
    return other in _FITTING.get(kind, ())


def _token_lists(base: GgufFile, tokenizer: AdapterTokenizer, before: list[str], n_tokens: int) -> Entries:
    tokens, n_before = list(before), len(before)
    types = list(base.metadata.get(TOKEN_TYPES) or [])
    scores = list(base.metadata.get(SCORES) or [])
    tokens += [f"[PAD{index}]" for index in range(n_before, n_tokens)]
    types += [UNUSED] * (len(tokens) - n_before) if types else []
    scores += [_SCORE_OF_PADDING] * (len(tokens) - n_before) if scores else []
    for index, token in _known_tokens(base, tokenizer):
        if index >= len(tokens):
            continue
        if _is_same(tokens[index], types[index] if types else None, token):
            if scores and token.score is not None and types and types[index] == token.kind:
                scores[index] = token.score
            continue
        tokens[index] = token.text
        if types:
            types[index] = token.kind
        if scores:
            scores[index] = _SCORE_OF_ADDED if token.score is None else token.score
    lists = {TOKENS: tokens, TOKEN_TYPES: types, SCORES: scores}
    changed: Entries = {key: values for key, values in lists.items() if values != (base.metadata.get(key) or [])}
    size_key = f"{base.architecture}.vocab_size"
    if n_tokens > n_before and size_key in base.metadata:
        changed[size_key] = n_tokens
    return changed


def _is_same(text: str, kind: int | None, token: _Token) -> bool:
    """Whether a token of the base has the text of one of the adapter's, and no other type that says something."""
    if text != token.text:
        return False
    if token.kind in {NORMAL, kind}:
        return True  # a special token may be missing among the added ones of an incomplete tokenizer
    return token.score is None and kind not in {NORMAL, CONTROL, USER_DEFINED, UNUSED}


def _known_tokens(base: GgufFile, tokenizer: AdapterTokenizer) -> Iterator[tuple[int, _Token]]:
    """Yield the numbers and tokens of the adapter's tokenizer, as the converter writes them for the base's kind."""
    kind = str(base.metadata.get(KIND))
    if kind in _WITH_PIECES and tokenizer.piece_file is not None:
        yield from _of_pieces(tokenizer, tokenizer.piece_file)
        return
    is_fitting = _fits(base, kind, tokenizer.kind)
    if kind == "llama" and is_fitting:
        yield from _of_sentencepiece_json(tokenizer)
        return
    for index, text in tokenizer.vocabulary.items() if is_fitting else ():
        if index not in tokenizer.added:
            score = tokenizer.scores.get(index)
            own = _with_phantom_space(text) if kind == "bert" else text
            yield index, _Token(own, NORMAL, None if score is None else float(np.float32(score)))
    for index, token in tokenizer.added.items():
        text, token_type = token.normalized()
        yield index, _Token(_with_phantom_space(text) if kind == "bert" and token_type != CONTROL else text, token_type)


def _of_pieces(tokenizer: AdapterTokenizer, piece_file: Path) -> Iterator[tuple[int, _Token]]:
    """Yield the tokens of a SentencePiece model and those added to it (``_create_vocab_sentencepiece``)."""
    tokens = {index: _Token(piece.text, piece.kind, piece.score) for index, piece in enumerate(read_pieces(piece_file))}
    tokens |= {index: _Token(token.text, USER_DEFINED) for index, token in tokenizer.listed.items()}
    named = tokenizer.decoder or {
        index: token for index, token in tokenizer.added.items() if index not in tokenizer.listed
    }
    yield from (tokens | {index: _Token(*token.normalized()) for index, token in named.items()}).items()


def _of_sentencepiece_json(tokenizer: AdapterTokenizer) -> Iterator[tuple[int, _Token]]:
    """Yield the tokens of SentencePiece's BPE in a tokenizer.json (``LlamaHfVocab``)."""
    named = tokenizer.special_texts
    special = {index for index, token in tokenizer.added.items() if (token.text in named if named else token.special)}
    for index, text in tokenizer.vocabulary.items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(text) else CONTROL if index in special else NORMAL
        yield index, _Token(text, kind)
    for index, token in tokenizer.added.items():
        if index not in tokenizer.vocabulary:
            yield index, _Token(token.text, CONTROL if index in special else USER_DEFINED)


def _with_phantom_space(text: str) -> str:
    """Return a token of WordPiece as GGUF writes it: a space before those that begin a word."""
    return text[2:] if text.startswith("##") else f"\u2581{text}"


def _merges(base: GgufFile, tokenizer: AdapterTokenizer) -> Entries:
    merges = list(tokenizer.merges)
    is_bpe = base.metadata.get(KIND) == "gpt2"
    return {MERGES: merges} if is_bpe and merges and merges != base.metadata.get(MERGES) else {}


def _added_around(base: GgufFile, tokenizer: AdapterTokenizer) -> Entries:
    """Return what differs of the rules to begin and end texts with BOS and EOS; files without rules are left as is."""
    adds = {f"tokenizer.ggml.add_{name}_token": value for name, value in tokenizer.adds.items()}
    return {key: value for key, value in adds.items() if key in base.metadata and base.metadata[key] != value}


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
    return [token.text for index, token in tokenizer.added.items() if rows and index >= rows]
