"""Read the tokenizer that was saved with an adapter, as far as a GGUF file's metadata holds it.

The rules are those of llama.cpp's converter: ``SpecialVocab`` in gguf-py/gguf/vocab.py and ``get_vocab_base`` in
conversion/base.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gguflora.errors import AdapterError
from gguflora.files.small_files import read_small_text
from gguflora.files.strict_json import to_json

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Token types of GGUF."""

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
PIECE_FILES: Final = ("tokenizer.model", "spiece.model")
"""Names of SentencePiece models."""
TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER: Final = "additional_chat_templates"
_WAY_OUT: Final = "fetch the file again, or remove it to keep the base's tokenizer"
_SPECIAL_NAMES: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LOOK_SPECIAL: Final = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_SPECIAL_FRAMES: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside a model's own: its text, and whether it is special."""

    text: str
    special: bool = False

    def normalized(self) -> tuple[str, int]:
        """Return text and GGUF type as the converter writes them for most tokenizers."""
        looks_special = self.text in _LOOK_SPECIAL or any(
            self.text.startswith(start) and self.text.endswith(end) for start, end in _SPECIAL_FRAMES
        )
        if self.special or looks_special:
            return self.text, CONTROL
        return self.text.replace("\u2581", " "), USER_DEFINED


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """A tokenizer in the terms of GGUF.

    Attributes:
        has_tokens: whether the directory has a file with tokens.
        kind: GGUF's name of the kind of tokenizer in tokenizer.json: "gpt2" (BPE of bytes), "llama" (SentencePiece's
            BPE), "t5" (unigrams) or "bert" (WordPiece); empty without such a file.
        vocabulary: texts of the tokens by number, without added tokens; empty for other kinds.
        scores: scores of unigrams by number; empty for other kinds.
        piece_file: path of a SentencePiece model; None if the directory has none.
        listed: the tokens of added_tokens.json by number.
        decoder: the tokens of tokenizer_config.json by number.
        added: the added tokens of all files by number; tokenizer.json counts most, because it is complete.
        merges: merges of a BPE model, as GGUF writes them; empty for other models.
        special_texts: texts of the tokens that tokenizer_config.json names as special.
        special_ids: numbers of special tokens by name (``bos``, ``eos``, ``eot``, ...).
        named_texts: texts of the special tokens that tokenizer_config.json names, by name.
        adds: whether a special token is put before (``bos``), behind (``eos``) or between (``sep``) texts, where known.
        templates: chat templates by name; the name of the ordinary one is ``default``.
    """

    has_tokens: bool = False
    kind: str = ""
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    scores: Mapping[int, float] = field(default_factory=dict)
    piece_file: Path | None = None
    listed: Mapping[int, AddedToken] = field(default_factory=dict)
    decoder: Mapping[int, AddedToken] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    merges: Sequence[str] = ()
    special_texts: frozenset[str] = frozenset()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    named_texts: Mapping[str, str] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)


def read_tokenizer(folder: Path) -> AdapterTokenizer:
    """Read the tokenizer and the chat templates in an adapter's directory; empty if it has none.

    Raises:
        AdapterError: if a file cannot be read as part of a tokenizer.
    """
    main, config, added = (_read_json(folder / name) for name in TOKENIZER_FILES)
    try:
        listed = {_token_number(index): AddedToken(str(text)) for text, index in added.items()}
        decoder = {_token_number(index): _added(token) for index, token in _decoder_of(config).items()}
        tokens = {**listed, **decoder}
        tokens |= {_token_number(token["id"]): _added(token) for token in main.get("added_tokens") or ()}
        model = main.get("model") or {}
        kind, is_bpe = _kind_of(model), model.get("type") == "BPE"
        piece_file = next((folder / name for name in PIECE_FILES if (folder / name).is_file()), None)
        texts, scores = _texts_and_scores(model) if kind else ({}, {})
        return AdapterTokenizer(
            has_tokens=bool(main or tokens or piece_file),
            kind=kind,
            vocabulary=texts,
            scores=scores,
            piece_file=piece_file,
            listed=listed,
            decoder=decoder,
            added=tokens,
            merges=[_as_merge(merge) for merge in model.get("merges") or ()] if is_bpe else (),
            adds=_added_around(main, config),
            special_texts=frozenset(_special_texts(config)),
            named_texts=_named_texts(config),
            special_ids=_special_ids(main, config, {token.text: index for index, token in tokens.items()}),
            templates=dict(_templates(folder, config)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise AdapterError(f"{folder}: its tokenizer cannot be read: {error!r:.200}; {_WAY_OUT}") from error


def read_templates(folder: Path) -> dict[str, str]:
    """Read only the chat templates in an adapter's directory, by name; empty if it has none.

    Raises:
        AdapterError: if a file cannot be read.
    """
    try:
        return dict(_templates(folder, _read_json(folder / "tokenizer_config.json")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder}: its chat template cannot be read: {error!r:.200}; {_WAY_OUT}") from error


def _token_number(index: int | str) -> int:
    number = int(index)
    if number < 0:
        raise ValueError(f"a token has the number {number}")
    return number


def _kind_of(model: Mapping[str, Any]) -> str:
    """Return GGUF's name of the kind of a model of tokenizer.json that lists its tokens; empty for others."""
    if not isinstance(model.get("vocab"), dict | list):
        return ""
    if model.get("type") == "BPE":
        return "llama" if model.get("byte_fallback") else "gpt2"
    return {"Unigram": "t5", "WordPiece": "bert"}.get(str(model.get("type")), "")


def _texts_and_scores(model: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, float]]:
    if isinstance(model["vocab"], dict):
        return {_token_number(index): str(text) for text, index in model["vocab"].items()}, {}
    texts = {index: str(text) for index, (text, _) in enumerate(model["vocab"])}
    return texts, {index: float(score) for index, (_, score) in enumerate(model["vocab"])}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = read_small_text(path)
        content = json.loads(text)
        if "\\ud" in text.lower():  # an escaped surrogate without its partner is no text
            to_json(content, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as a tokenizer: {error!r:.200}; {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: cannot be read as a tokenizer: it is no JSON object; {_WAY_OUT}")
    return content


def _decoder_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("added_tokens_decoder") or {}


def _added(token: Mapping[str, Any]) -> AddedToken:
    return AddedToken(str(token["content"]), bool(token.get("special")))


def _as_merge(merge: str | Sequence[str]) -> str:
    """Return a merge as GGUF writes it: parts separated by a space, spaces in the parts shifted by 256."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge)


def _special_ids(main: Mapping[str, Any], config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, int]:
    """Return the numbers of the special tokens that tokenizer_config.json or the post-processor name."""
    if not main or not config:  # llama.cpp's converter then takes them from config.json, as the base did
        return {}
    texts = {name: _content(config.get(f"{name}_token")) for name in _SPECIAL_NAMES}
    texts["bos"], texts["eos"] = texts["bos"] or texts["cls"], texts["eos"] or texts["sep"]
    first, last = _frame(main.get("post_processor") or {})
    if first is not None and first not in {texts["bos"], texts["cls"]}:
        texts["bos"], texts["cls"] = texts["bos"] or first, texts["cls"] or first
    if last is not None and last != texts["eos"]:
        texts["eot"], texts["eos"] = texts["eos"], last
    return {name: numbers[text] for name, text in texts.items() if text is not None and text in numbers}


def _named_texts(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _content(config.get(f"{name}_token")) for name in _SPECIAL_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _special_texts(config: Mapping[str, Any]) -> Iterator[str]:
    lists = ("additional_special_tokens", "extra_special_tokens")
    more = (entry for name in lists if isinstance(config.get(name), list) for entry in config[name])
    for entry in (*(config.get(f"{name}_token") for name in _SPECIAL_NAMES), *more):
        text = _content(entry)
        if text is not None:
            yield text


def _content(entry: Any) -> str | None:  # noqa: ANN401  (any JSON value)
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _frame(processor: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the special tokens that a template of the post-processor puts before and after a text."""
    first = last = None
    for each in processor.get("processors", [processor]):
        single = each.get("single") or []
        if each.get("type") == "TemplateProcessing" and len(single) > 1:
            first = single[0].get("SpecialToken", {}).get("id") or first
            last = single[-1].get("SpecialToken", {}).get("id") or last
    return first, last


def _added_around(main: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether the tokenizer adds BOS and EOS; what the post-processor does counts before the configuration."""
    processor = main.get("post_processor") or {}
    adds: dict[str, bool] = {}
    kinds = {each.get("type") for each in processor.get("processors", [processor])}
    if "RobertaProcessing" in kinds:
        adds |= {"bos": True, "eos": True, "sep": True}
    first, last = _frame(processor)
    adds |= {"bos": True} if first is not None else {}
    adds |= {"eos": True} if last is not None else {}
    if "ByteLevel" in kinds:
        adds = {"bos": False, "eos": False} | adds
    for name in ("bos", "eos"):
        if isinstance(config.get(f"add_{name}_token"), bool):
            adds.setdefault(name, config[f"add_{name}_token"])
    return adds


def _templates(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and texts of the chat templates; those in tokenizer_config.json come first, as for the converter."""
    given = config.get("chat_template")
    jinja, as_json = (folder / name for name in TEMPLATE_FILES)
    if given is None and jinja.is_file():
        yield "default", _read_text(jinja)
        for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
            yield _plain(path.stem), _read_text(path)
        return
    if given is None:
        given = _read_json(as_json).get("chat_template")
    if isinstance(given, str):
        yield "default", given
    for choice in given if isinstance(given, list) else ():
        if choice.get("name") and isinstance(choice.get("template"), str):
            yield _plain(str(choice["name"])), choice["template"]


def _plain(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)


def _read_text(path: Path) -> str:
    try:
        return read_small_text(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read as a chat template: {error!r:.200}; {_WAY_OUT}") from error
