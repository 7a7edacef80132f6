"""Read a model's answer while it arrives: reasoning, text and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gguflora.server.tool_calls import ToolFormat
from gguflora.server.tool_reading import NoCallError, begins_call, read_call

_BETWEEN: Final = (",", ";", "[", "]")
"""What may stand between calls, beside white space."""


@dataclass(slots=True)
class Reply:
    """One answer of a chat.

    Attributes:
        thinking: the tags around reasoning; None if it is not split off.
        in_thought: whether the prompt has opened the first tag already.
        format: how the model writes tool calls; None if it has no tools.
        tools: schemas of the tools' arguments, by name.
        shows_reasoning: whether the client gets the reasoning.
        is_legacy: whether a call is OpenAI's older ``function_call``.
        content: the text so far.
        reasoning: the reasoning so far.
        calls: the tool calls so far.
    """

    thinking: tuple[str, str] | None = None
    in_thought: bool = False
    format: ToolFormat | None = None
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shows_reasoning: bool = True
    is_legacy: bool = False
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""
    _in_calls: bool = False
    _has_begun: bool = False
    """Whether any text has been read, so that neither reasoning nor a bare call can begin any more."""

    def push(self, text: str, *, last: bool = False) -> dict[str, Any]:
        """Read more text, or with ``last`` all that was held back; return OpenAI's ``delta`` for it."""
        self._held += text
        before = len(self.content), len(self.reasoning), len(self.calls)
        while self._held and self._step(last=last):
            pass
        delta: dict[str, Any] = {}
        if len(self.reasoning) > before[1] and self.shows_reasoning:
            delta["reasoning_content"] = self.reasoning[before[1] :]
        if len(self.content) > before[0]:
            delta["content"] = self.content[before[0] :]
        if len(self.calls) > before[2] and self.is_legacy:
            delta["function_call"] = self.calls[0]["function"]
        elif len(self.calls) > before[2]:
            new = enumerate(self.calls[before[2] :], before[2])
            delta["tool_calls"] = [{"index": index, **call} for index, call in new]
        return delta

    def message(self) -> dict[str, Any]:
        """Return OpenAI's ``message`` of the whole answer."""
        content = None if self.calls and not self.content else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning and self.shows_reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls and self.is_legacy:
            message["function_call"] = self.calls[0]["function"]
        elif self.calls:
            message["tool_calls"] = self.calls
        return message

    def _step(self, *, last: bool) -> bool:
        """Read some of the held text; return whether there may be more to read."""
        if self.in_thought and self.thinking:
            return self._think(self.thinking[1], last=last)
        if not self._has_begun and self.thinking:
            start, opening = self._held.lstrip(), self.thinking[0]
            if start.startswith(opening):
                self._held, self.in_thought = start[len(opening) :], True
                return True
            if opening.startswith(start) and not last:
                return False
        if self._in_calls and self.format:
            return self._call(self.format, last=last)
        return self._speak(last=last)

    def _think(self, closing: str, *, last: bool) -> bool:
        at = self._held.find(closing)
        if at < 0:
            keep = 0 if last else _overlap(self._held, closing)
            text, self._held = _split(self._held, len(self._held) - keep)
            self.reasoning += text if self.reasoning else text.lstrip()
            return False
        self.reasoning = (self.reasoning + self._held[:at]).rstrip() if last else self.reasoning + self._held[:at]
        self._held = self._held[at + len(closing) :].lstrip()
        self.in_thought, self.thinking = False, None
        return True

    def _speak(self, *, last: bool) -> bool:
        tag = self.format.tag if self.format else ""
        if self.reasoning and not self.content:
            self._held = self._held.lstrip()
        if self.format and not tag and not self._has_begun:  # the call may be the answer itself
            start = self._held.lstrip()
            if start.startswith("{"):
                self._in_calls = True
                return True
            if not start and not last:
                return False
        openings = self.format.openings if self.format else ()
        at = min((found for each in openings if (found := self._held.find(each)) >= 0), default=-1)
        if at >= 0:
            text, self._held = _split(self._held, at)
            self._in_calls = True
        else:
            keep = max((_overlap(self._held, each) for each in openings), default=0) if not last else 0
            text, self._held = _split(self._held, len(self._held) - keep)
        if self.calls and not text.strip():
            text = ""
        self.content += text
        self._has_begun = self._has_begun or bool(text.strip()) or self._in_calls
        return at >= 0

    def _call(self, format_: ToolFormat, *, last: bool) -> bool:
        self._has_begun = True
        rest = self._held.lstrip()
        marks = [mark for mark in (format_.end.strip(), format_.tag) if mark]
        found = next((mark for mark in marks if rest.startswith(mark)), "")
        if found:
            self._held = rest[len(found) :]
            return True
        if not last and any(mark.startswith(rest) for mark in marks):
            return False
        if rest and begins_call(rest, format_):
            return self._read_call(rest, format_, last=last)
        if rest.startswith(_BETWEEN):
            self._held = rest[1:]
            return True
        if rest:
            return self._give_up()
        self._held = ""
        return False

    def _read_call(self, text: str, format_: ToolFormat, *, last: bool) -> bool:
        """Read a call of a known tool; anything else is plain text."""
        try:
            call = read_call(text, format_, self.tools)
        except NoCallError:
            return self._give_up()
        if call is None:
            return self._give_up() if last else False
        function = {"name": call.name, "arguments": call.arguments}
        if not (self.is_legacy and self.calls):
            self.calls.append({"id": call.id or format_.new_id(), "type": "function", "function": function})
        self._held = text[call.length :]
        return True

    def _give_up(self) -> bool:
        """Take the held text for plain text: it is no call."""
        self._in_calls, self._held = False, self._held.lstrip()
        openings = self.format.openings if self.format else ()
        opening = next((each for each in openings if self._held.startswith(each)), "")
        self.content += opening
        self._held = self._held[len(opening) :]
        return True


def _split(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that ``mark`` begins with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
