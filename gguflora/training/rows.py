"""Training data as people have it: JSONL of chats, prompts, texts or Alpaca rows, and folders of text files.

Every row of every file is looked at before anything starts, and all that are wrong are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gguflora.errors import TrainingDataError
from gguflora.files.visible import visible_files

TEXTS: Final = (".txt", ".md")
_JSON: Final = (".jsonl", ".ndjson", ".json")
_SHOWN: Final = 20
"""Wrong rows that a message names; the error carries all."""

_ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Of ``conversations`` in ShareGPT's form."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a chat, a prompt with its completion, or a text.

    Attributes:
        source: file and line.
        messages: the messages of a chat.
        first: messages before this one are no answers to learn.
        tools: that the chat's template is told of.
        prompt: the prompt of a completion.
        text: the completion, or the whole text.
    """

    source: str
    messages: tuple[Mapping[str, Any], ...] = ()
    first: int = 0
    tools: tuple[Any, ...] = ()
    prompt: str | None = None
    text: str = ""


class _WrongRowError(Exception):
    """What is wrong with a row."""


@dataclass(slots=True)
class _Found:
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of files and folders, in order.

    Raises:
        TrainingDataError: with file, line and reason of each row that cannot be used; or if there are none.
    """
    found = _Found()
    for path in paths:
        for file in _files(path):
            _read(file, found)
    if found.problems:
        raise TrainingDataError(said(found.problems, "cannot be used"), found.problems)
    if not found.rows:
        raise TrainingDataError(f"{', '.join(map(str, paths))}: no training data; expected JSONL rows or text files")
    return found.rows


def said(problems: Sequence[str], what: str) -> str:
    """A message that names wrong rows."""
    more = len(problems) - _SHOWN
    shown = "\n  ".join(problems[:_SHOWN])
    rest = f"\n  and {more} more" if more > 0 else ""
    return f"{len(problems)} row{'s' * (len(problems) != 1)} {what}:\n  {shown}{rest}"


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise TrainingDataError(f"{path}: no such file or folder")
    if path.is_dir():
        found = [each for each in visible_files(path) if each.suffix.lower() in (*TEXTS, *_JSON)]
        if not found:
            raise TrainingDataError(f"{path}: holds no {', '.join((*TEXTS, *_JSON))} file")
        yield from found
    else:
        yield path


def _read(path: Path, found: _Found) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        found.problems.append(f"{path}: cannot be read as UTF-8 text: {error}")
        return
    if path.suffix.lower() in TEXTS:
        if text.strip():
            found.rows.append(Row(str(path), text=text))
        return
    for source, line in _lines(path, text):
        try:
            found.rows.append(_row(source, json.loads(line) if isinstance(line, str) else line))
        except (_WrongRowError, ValueError, RecursionError) as error:
            reason = f"is no JSON: {error}" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
            found.problems.append(f"{source}: {reason}")


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Lines with JSON; of a file that is one list, its items."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            items = None
        if isinstance(items, list):
            yield from ((f"{path}: item {number}", item) for number, item in enumerate(items, 1))
            return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028, which JSON may hold
        if line.strip():
            yield f"{path}:{number}", line


def _row(source: str, fields: Any) -> Row:  # noqa: ANN401  (JSON)
    """A row from its fields.

    Raises:
        _WrongRowError: saying what is wrong with it.
    """
    if not isinstance(fields, dict):
        raise _WrongRowError(f"is a {type(fields).__name__}, expected an object")
    tools = fields.get("tools") or ()
    if not isinstance(tools, list | tuple):
        raise _WrongRowError("'tools' is no list")
    if "messages" in fields:
        return _chat(source, fields["messages"], tools)
    if "conversations" in fields:
        return _chat(source, _from_sharegpt(fields["conversations"]), tools)
    if "prompt" in fields and "completion" in fields:
        return _completion(source, fields["prompt"], fields["completion"], tools)
    if "instruction" in fields and "output" in fields:
        return _alpaca(source, fields)
    if "text" in fields:
        return Row(source, text=_text(fields, "text"))
    keys = ", ".join(map(repr, list(fields)[:6])) or "nothing"
    raise _WrongRowError(
        f"has {keys}, expected 'messages', 'prompt' and 'completion', 'text', or 'instruction' and 'output'"
    )


def _chat(source: str, messages: Any, tools: Sequence[Any], first: int = 0) -> Row:  # noqa: ANN401
    if not isinstance(messages, list) or not messages:
        raise _WrongRowError("'messages' is no list of messages")
    checked = tuple(_message(number, message) for number, message in enumerate(messages, 1))
    answers = [number for number, message in enumerate(checked) if message["role"] == "assistant"]
    if not [number for number in answers if number >= first]:
        raise _WrongRowError("has no message of the role 'assistant' to learn")
    if answers[0] == 0:
        raise _WrongRowError("begins with a message of the assistant; there is nothing that it answers")
    return Row(source, messages=checked, first=first, tools=tuple(tools))


def _message(number: int, message: Any) -> Mapping[str, Any]:  # noqa: ANN401
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _WrongRowError(f"message {number} has no 'role'")
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise _WrongRowError(f"message {number} has content that is no text")
        content = "".join(map(str, texts))
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise _WrongRowError(f"message {number} has no 'content' that is a text")
    return {**message, "content": content}


def _from_sharegpt(messages: Any) -> Any:  # noqa: ANN401
    if not isinstance(messages, list):
        raise _WrongRowError("'conversations' is no list")
    if all(isinstance(message, dict) and "role" in message for message in messages):
        return messages
    found = []
    for number, message in enumerate(messages, 1):
        role = _ROLES.get(message.get("from", "")) if isinstance(message, dict) else None
        if role is None:
            raise _WrongRowError(f"message {number} is not from 'human', 'gpt' or 'system'")
        found.append({"role": role, "content": message.get("value")})
    return found


def _completion(source: str, prompt: Any, completion: Any, tools: Sequence[Any]) -> Row:  # noqa: ANN401
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(source, [*prompt, *completion], tools, len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise _WrongRowError("'prompt' and 'completion' must be two texts, or two lists of messages")
    if not completion:
        raise _WrongRowError("'completion' is empty")
    return Row(source, prompt=prompt, text=completion)


def _alpaca(source: str, fields: Mapping[str, Any]) -> Row:
    question, given = _text(fields, "instruction"), fields.get("input") or ""
    if not isinstance(given, str):
        raise _WrongRowError("'input' is no text")
    asked = f"{question}\n\n{given}" if given else question
    answer = {"role": "assistant", "content": _text(fields, "output")}
    return _chat(source, [{"role": "user", "content": asked}, answer], ())


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise _WrongRowError(f"{key!r} is no text, or empty")
    return value
