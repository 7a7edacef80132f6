"""Choose a chat template: the base's, that of an adapter's directory, or a given one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gguflora.adapters.tokenizer import read_templates, read_tokenizer
from gguflora.errors import EngineError

_LOG: Final = logging.getLogger(__name__)
CHOICES: Final = ("adapter", "base")


@dataclass(frozen=True, slots=True)
class ChosenTemplate:
    """A template in place of the base's.

    Attributes:
        text: the template, in Jinja.
        end_token: number of the token that ends an answer for the adapter; None if its directory names none.
        special_texts: special tokens of the adapter's tokenizer by the names that templates have for them, such as
            ``eos_token``; they take the place of the base's.
    """

    text: str
    end_token: int | None = None
    special_texts: Mapping[str, str] = field(default_factory=dict)


def choose_template(
    choice: str | None, file: str | os.PathLike[str] | None, adapters: Sequence[Path], own: str
) -> ChosenTemplate | None:
    """Return the template in place of the base's, or None for the base's.

    Args:
        choice: ``adapter``, ``base``, or the text of a template. None takes the adapter's if there is one adapter and
            its template differs, and logs it.
        file: file with a template, in place of ``choice``.
        adapters: the adapters that are loaded at the start.
        own: the base's template.

    Raises:
        EngineError: if the file cannot be read, or ``adapter`` is asked for and there is no template or several.
        AdapterError: if an adapter's template cannot be read.
    """
    if file is not None:
        return _from_file(Path(file), choice)
    if choice == "base":
        return None
    if choice is not None and choice not in CHOICES:
        if "{%" not in choice and "{{" not in choice:
            raise EngineError(f"chat_template is {choice!r:.80}, expected adapter, base, or a template in Jinja")
        return ChosenTemplate(choice)
    found = {path: text for path in adapters if (text := _text_in(path)) is not None}
    if choice is None and (len(adapters) != 1 or not found or own in found.values()):
        return None
    if len(set(found.values())) != 1:
        names = ", ".join(path.name for path in found) or "no adapter's directory"
        raise EngineError(
            f"chat_template is 'adapter', and one template is needed; found templates in {names}; "
            "give the template with chat_template_file"
        )
    folder = next(iter(found))
    if choice is None:
        _LOG.warning("the chat template of %s is used, which differs from the base's", folder.name)
    return read_template(folder)


def read_template(adapter: Path) -> ChosenTemplate | None:
    """Return the chat template in an adapter's directory; None if there is none, or the adapter is a file.

    Raises:
        AdapterError: if it cannot be read.
    """
    text = _text_in(adapter)
    if text is None:
        return None
    tokenizer = read_tokenizer(adapter)
    texts = {f"{name}_token": each for name, each in tokenizer.named_texts.items()}
    return ChosenTemplate(text, tokenizer.special_ids.get("eos"), texts)


def _text_in(adapter: Path) -> str | None:
    return (read_templates(adapter).get("default") or None) if adapter.is_dir() else None


def _from_file(file: Path, choice: str | None) -> ChosenTemplate:
    if choice is not None:
        raise EngineError(f"chat_template_file and chat_template={choice!r:.80} are both given; give one of them")
    try:
        return ChosenTemplate(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{file}: cannot be read as a chat template: {error}") from error
