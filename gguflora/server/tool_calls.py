"""Tool calls as models write them: which format a chat template stands for, its grammar, and its text.

The formats are those that llama.cpp and vLLM read: Hermes and Qwen, Llama 3, Mistral, Gemma 3's JSON, and plain JSON
for templates that know no tools.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguflora.engine import Grammar
from gguflora.files.strict_json import to_json
from gguflora.server.schemas import Tool
from gguflora.server.structured import WHITESPACE, closed_schema

_MAX_CALLS: Final = 16
_SPACE: Final = rf"({WHITESPACE})"
_ALPHANUMERIC: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        name: name of the format.
        begin: text before a call, or before the list of calls; empty if a call is the answer itself.
        end: text after a call.
        key: field of the call that has the arguments.
        is_list: whether calls are items of one JSON list.
        n_id: number of letters and digits of a call's id; 0 for OpenAI's ids.
    """

    name: str
    begin: str = ""
    end: str = ""
    key: str = "arguments"
    is_list: bool = False
    n_id: int = 0

    @property
    def tag(self) -> str:
        """The text that a call begins with, without white space."""
        return self.begin.strip()

    def new_id(self) -> str:
        """Return an id for a call."""
        if self.n_id:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self.n_id))
        return f"call_{secrets.token_hex(12)}"

    def text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return calls as the model would have written them."""
        written = [to_json({"name": each["name"], self.key: each["arguments"]}, ensure_ascii=False) for each in calls]
        if self.is_list:
            return f"{self.begin}[{', '.join(written)}]"
        return "\n".join(f"{self.begin}{each}{self.end}" for each in written)


HERMES: Final = ToolFormat("Hermes", "<tool_call>\n", "\n</tool_call>")
LLAMA3: Final = ToolFormat("Llama 3", key="parameters")
MISTRAL: Final = ToolFormat("Mistral", "[TOOL_CALLS]", is_list=True, n_id=9)
GEMMA: Final = ToolFormat("Gemma", key="parameters")
PLAIN: Final = ToolFormat("JSON")

_MARKS: Final = (
    ("<tool_call>", HERMES),
    ("[TOOL_CALLS]", MISTRAL),
    ("<|python_tag|>", LLAMA3),
    ("Environment: ipython", LLAMA3),
    ('"parameters"', LLAMA3),
    ("<start_of_turn>", GEMMA),
)
"""Texts in templates, and the format that they stand for; the first that is found decides."""


def format_of(template: str) -> ToolFormat:
    """Return the format of a chat template."""
    return next((found for mark, found in _MARKS if mark in template), PLAIN)


def instructions(tools: Sequence[Tool], format_: ToolFormat) -> str:
    """Return what a model is told whose template has no place for tools."""
    listed = "\n".join(to_json(tool.function.for_template(), ensure_ascii=False) for tool in tools)
    return (
        "You have access to functions. To call a function, answer only with a JSON object "
        f'{{"name": function name, "{format_.key}": object of argument names and their values}}; '
        "to call several, write one such object on each line. "
        f"The functions are:\n{listed}"
    )


def call_grammar(
    format_: ToolFormat,
    tools: Sequence[Tool],
    *,
    several: bool,
    forced: bool,
    literal: Callable[[str], str],
) -> Grammar:
    """Return the grammar of one or several calls.

    Args:
        format_: how the model writes calls.
        tools: the tools that may be called.
        several: whether more than one call is allowed.
        forced: whether the answer must be a call: then ``begin`` stands before the answer already. Otherwise the
            grammar holds from where the model itself begins a call.
        literal: returns a text as Lark writes it, or the token that it is.
    """
    calls = [_call_rules(number, tool, format_.key) for number, tool in enumerate(tools)]
    rules = [rule for each in calls for rule in each]
    end = literal(format_.end.strip()) if format_.end else ""
    gap = r" /[ \n]{0,2}/ " if end else ""
    rules.append(f"call: one{gap}{end}")
    rules.append("one: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    limit = f"{{0,{_MAX_CALLS - 1}}}"
    if format_.is_list:
        more = f"(/ ?, ?/ call){limit}" if several else ""
        start = rf"/[ \n]{{0,2}}\[ ?/ call {more} /[ \n]{{0,2}}\]/"
    else:
        tag = literal(format_.tag) if format_.tag else ""
        start = "call " + (rf"(/\n{{1,2}}/ {tag} call){limit}" if several else "")
    triggers = () if forced else _triggers(format_)
    return Grammar("\n".join([f"start: {start}", *rules]), triggers, "llguidance")


def _call_rules(number: int, tool: Tool, key: str) -> list[str]:
    """Return the rules of one tool's call; its schema is a root of its own, so that references in it work."""
    name = re.escape(tool.function.name).replace("/", r"\/")
    head = rf'[ \n]{{0,2}}\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{name}"{_SPACE},{_SPACE}"{key}"{_SPACE}:{_SPACE}'
    schema = tool.function.parameters or {"type": "object", "properties": {}}
    closed = closed_schema(schema)
    options = {"whitespace_pattern": WHITESPACE, "lenient": not tool.function.strict}
    return [
        f"call_{number}: head_{number} args_{number} /{_SPACE}\\}}/",
        f"head_{number}: /{head}/",
        f"args_{number}: %json {to_json({**closed, 'x-guidance': options})}",
    ]


def _triggers(format_: ToolFormat) -> tuple[str, ...]:
    if format_.tag:
        return (re.escape(format_.tag) + "()",)
    return (r'^\s*(\{\s*"name"\s*:\s*")',)
