"""Tool calls as models write them: which format a chat template stands for, and the text of calls.

The formats are those that llama.cpp and vLLM read: Hermes and Qwen, Qwen3-Coder's XML, Llama 3, Mistral's two, Gemma
3's JSON, and plain JSON for templates that know no tools.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from gguflora.files.strict_json import to_json
from gguflora.server.schemas import Tool

_ALPHANUMERIC: Final = string.ascii_letters + string.digits
FUNCTION: Final = "<function="
"""What a call of Qwen3-Coder begins with; the model sometimes leaves the tag before it out."""


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
        syntax: ``json``, an object with the name and the arguments; ``args``, the name, ``[ARGS]`` and the arguments in
            JSON; ``xml``, an element for the function and one for each argument, whose texts stand as they are.
    """

    name: str
    begin: str = ""
    end: str = ""
    key: str = "arguments"
    is_list: bool = False
    n_id: int = 0
    syntax: Literal["json", "args", "xml"] = "json"

    @property
    def tag(self) -> str:
        """The text that a call begins with, without white space."""
        return self.begin.strip()

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that can be tokens of their own."""
        inner = ("[ARGS]", "[CALL_ID]") if self.syntax == "args" else ()
        return tuple(mark for mark in (self.tag, self.end.strip(), *inner) if mark)

    @property
    def openings(self) -> tuple[str, ...]:
        """The texts that show that a call begins; none if a call can only be the whole answer."""
        if not self.tag:
            return ()
        return (self.tag, FUNCTION) if self.syntax == "xml" else (self.tag,)

    def new_id(self) -> str:
        """Return an id for a call."""
        if self.n_id:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self.n_id))
        return f"call_{secrets.token_hex(12)}"

    def text(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return calls as the model would have written them."""
        if self.syntax == "args":
            return "".join(f"{self.begin}{each['name']}[ARGS]{_json(each['arguments'])}" for each in calls)
        if self.syntax == "xml":
            return "\n".join(f"{self.begin}{_element(each)}{self.end}" for each in calls)
        written = [_json({"name": each["name"], self.key: each["arguments"]}) for each in calls]
        if self.is_list:
            return f"{self.begin}[{', '.join(written)}]"
        return "\n".join(f"{self.begin}{each}{self.end}" for each in written)


def _json(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    return to_json(value, ensure_ascii=False)


def _element(call: Mapping[str, Any]) -> str:
    """Return a call in Qwen3-Coder's form; arguments that are no object are its text."""
    arguments = call["arguments"]
    if isinstance(arguments, dict):
        texts = {name: value if isinstance(value, str) else _json(value) for name, value in arguments.items()}
        inside = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in texts.items())
    else:
        inside = f"{arguments}\n"
    return f"{FUNCTION}{call['name']}>\n{inside}</function>"


HERMES: Final = ToolFormat("Hermes", "<tool_call>\n", "\n</tool_call>")
QWEN_CODER: Final = ToolFormat("Qwen3-Coder", "<tool_call>\n", "\n</tool_call>", syntax="xml")
LLAMA3: Final = ToolFormat("Llama 3", key="parameters")
MISTRAL: Final = ToolFormat("Mistral", "[TOOL_CALLS]", is_list=True, n_id=9)
MISTRAL_ARGS: Final = ToolFormat("Mistral with [ARGS]", "[TOOL_CALLS]", n_id=9, syntax="args")
GEMMA: Final = ToolFormat("Gemma", key="parameters")
PLAIN: Final = ToolFormat("JSON")

_MARKS: Final = (
    ("<parameter=", QWEN_CODER),
    ("<tool_call>", HERMES),
    ("[ARGS]", MISTRAL_ARGS),
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
