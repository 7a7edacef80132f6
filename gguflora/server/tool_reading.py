"""Read one tool call from the text of an answer, in each of the formats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gguflora.files.strict_json import to_json
from gguflora.server.tool_calls import FUNCTION, ToolFormat
from gguflora.server.tool_schemas import properties_of, value_of

_NAMED: Final = re.compile(r"([A-Za-z0-9_.:/-]{1,128})(?:\[CALL_ID\]([A-Za-z0-9_-]{1,64}))?\[ARGS\]\s*")
_MAX_HEAD: Final = 256
"""Characters in which a name and ``[ARGS]`` must have come."""

_HEAD: Final = re.compile(r"<function=([^>\n]{1,128})>\s*")
_ARGUMENT: Final = re.compile(r"<parameter=([^>\n]{1,256})>\n?")
_END_ARGUMENT: Final = "</parameter>"
_END: Final = "</function>"


class NoCallError(Exception):
    """The text is no call of a known tool."""


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A call that was read.

    Attributes:
        name: name of the tool.
        arguments: its arguments in JSON.
        length: number of characters of the text that it took.
        id: the id that the model gave it.
    """

    name: str
    arguments: str
    length: int
    id: str | None = None


def begins_call(text: str, format_: ToolFormat) -> bool:
    """Return whether a text, which follows the tag, may begin a call."""
    if text.startswith("{"):
        return True
    if format_.syntax == "xml":
        return FUNCTION.startswith(text[: len(FUNCTION)])
    return format_.tag == "[TOOL_CALLS]" and bool(re.match(r"[A-Za-z0-9_]", text))


def read_call(text: str, format_: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> ReadCall | None:
    """Read the call that a text begins with.

    Args:
        text: the text, from the call on.
        format_: how the model writes calls.
        tools: schemas of the tools' arguments, by name.

    Returns:
        The call; None if the text ends within it.

    Raises:
        NoCallError: if it is none, or calls an unknown tool.
    """
    if text.startswith("{"):
        return _read_object(text, format_, tools)
    if format_.syntax == "xml":
        return _read_element(text, tools)
    return _read_named(text, tools)


def _read_object(text: str, format_: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> ReadCall | None:
    try:
        value, length = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    arguments = value.get(format_.key, value.get("arguments", value.get("parameters")))
    return ReadCall(*_checked(value.get("name"), arguments, tools), length)


def _read_named(text: str, tools: Mapping[str, Mapping[str, Any]]) -> ReadCall | None:
    head = _NAMED.match(text)
    if head is None:
        if len(text) > _MAX_HEAD:
            raise NoCallError
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text, head.end())
    except ValueError:
        return None
    return ReadCall(*_checked(head[1], value, tools), end, head[2])


def _read_element(text: str, tools: Mapping[str, Mapping[str, Any]]) -> ReadCall | None:
    head = _HEAD.match(text)
    if head is None:
        if len(text) > _MAX_HEAD:
            raise NoCallError
        return None
    if head[1] not in tools:
        raise NoCallError
    properties = properties_of(tools[head[1]])
    arguments: dict[str, Any] = {}
    at = head.end()
    while argument := _ARGUMENT.match(text, at):
        end = text.find(_END_ARGUMENT, argument.end())
        if end < 0:
            return None
        arguments[argument[1]] = value_of(
            text[argument.end() : end].removesuffix("\n"), properties.get(argument[1], {})
        )
        at = end + len(_END_ARGUMENT)
        at += len(text[at:]) - len(text[at:].lstrip())
    if text.startswith(_END, at):
        return ReadCall(*_checked(head[1], arguments, tools), at + len(_END))
    rest = text[at:]
    if any(mark.startswith(rest[: len(mark)]) for mark in (_END, "<parameter=")):
        return None
    raise NoCallError


def _checked(name: Any, arguments: Any, tools: Mapping[str, Any]) -> tuple[str, str]:  # noqa: ANN401
    """Return the name of a known tool and its arguments as text."""
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict | str):
        raise NoCallError
    return name, arguments if isinstance(arguments, str) else to_json(arguments, ensure_ascii=False)
