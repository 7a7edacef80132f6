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
from gguflora.files.strict_json import to_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of GGUF."""

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
TEMPLATE_FILES: Final = ("chat_template.jinja", "chat_template.json")
TEMPLATE_FOLDER: Final = "additional_chat_templates"
_WAY_OUT: Final = "fetch the file again, or remove it to keep the base's tokenizer"
_SPECIAL_NAMES: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LOOK_SPECIAL: Final = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_SPECIAL_FRAMES: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True, slots=True)
class AdapterTokenizer:
    """A tokenizer in the terms of GGUF.

    Attributes:
        has_tokens: whether the directory has a file with tokens.
        vocabulary: texts of the tokens of a BPE model by number, without added tokens; empty for other models.
        added: text and GGUF type of the added tokens by number.
        merges: merges of a BPE model, as GGUF writes them; empty for other models.
        special_ids: numbers of special tokens by name (``bos``, ``eos``, ``eot``, ...).
        templates: chat templates by name; the name of the ordinary one is ``default``.
    """

    has_tokens: bool = False
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    added: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    merges: Sequence[str] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)


def read_tokenizer(folder: Path) -> AdapterTokenizer:
    """Read the tokenizer and the chat templates in an adapter's directory; empty if it has none.

    Raises:
        AdapterError: if a file cannot be read as part of a tokenizer.
    """
    main, config, added = (_read_json(folder / name) for name in TOKENIZER_FILES)
    try:
        tokens = {_token_number(index): token for index, token in _added_tokens(main, config, added)}
        model = main.get("model") or {}
        is_bpe = model.get("type") == "BPE" and isinstance(model.get("vocab"), dict)
        return AdapterTokenizer(
            has_tokens=bool(main or added or config.get("added_tokens_decoder")),
            vocabulary={int(index): str(text) for text, index in model["vocab"].items()} if is_bpe else {},
            added=tokens,
            merges=[_as_merge(merge) for merge in model.get("merges") or ()] if is_bpe else (),
            special_ids=_special_ids(main, config, {text: index for index, (text, _) in tokens.items()}),
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


def _token_number(index: int) -> int:
    if index < 0:
        raise ValueError(f"a token has the number {index}")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # an escaped surrogate without its partner is no text
            to_json(content, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as a tokenizer: {error!r:.200}; {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: cannot be read as a tokenizer: it is no JSON object; {_WAY_OUT}")
    return content


def _added_tokens(
    main: Mapping[str, Any], config: Mapping[str, Any], added: Mapping[str, Any]
) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield number, text and type of added tokens; tokenizer.json comes last, because it is complete."""
    for text, index in added.items():
        yield int(index), _with_type(str(text), special=False)
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        yield int(index), _with_type(str(token["content"]), special=bool(token.get("special")))
    for token in main.get("added_tokens") or ():
        yield int(token["id"]), _with_type(str(token["content"]), special=bool(token.get("special")))


def _with_type(text: str, *, special: bool) -> tuple[str, int]:
    looks_special = text in _LOOK_SPECIAL or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_FRAMES)
    return (text, CONTROL) if special or looks_special else (text.replace("\u2581", " "), USER_DEFINED)


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
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read as a chat template: {error!r:.200}; {_WAY_OUT}") from error
