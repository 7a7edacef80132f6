"""The grammar of tool calls in each format, alone or beside a form of the answer that is no call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from gguflora.engine import Grammar
from gguflora.files.strict_json import to_json
from gguflora.server.schemas import Tool
from gguflora.server.structured import WHITESPACE, closed_schema
from gguflora.server.tool_calls import FUNCTION, ToolFormat
from gguflora.server.tool_schemas import is_text, properties_of, texts_of

_MAX_CALLS: Final = 16
_SPACE: Final = rf"({WHITESPACE})"
_GAP: Final = r"/[ \n]{0,2}/"


def call_grammar(
    format_: ToolFormat,
    tools: Sequence[Tool],
    *,
    several: bool,
    literal: Callable[[str], str],
    forced: bool = False,
    tagged: bool = False,
    answer: Grammar | None = None,
) -> Grammar:
    """Return the grammar of one or several calls.

    Args:
        format_: how the model writes calls.
        tools: the tools that may be called.
        several: whether more than one call is allowed.
        literal: returns a text as Lark writes it, or the token that it is.
        forced: whether the answer must be a call: then ``begin`` stands before the answer already. Otherwise the
            grammar holds from where the model itself begins a call.
        tagged: whether the model itself has to write ``begin`` of a forced call.
        answer: what an answer must look like that is no call, by llguidance; then the grammar holds from the start.
    """
    calls = [_call_rules(number, tool, format_, literal) for number, tool in enumerate(tools)]
    rules = [rule for each in calls for rule in each]
    end = literal(format_.end.strip()) if format_.end else ""
    gap = f" {_GAP} " if end else ""
    rules.append(f"call: one{gap}{end}")
    rules.append("one: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    tag = literal(format_.tag) if format_.tag else ""
    limit = f"{{0,{_MAX_CALLS - 1}}}"
    if format_.is_list:
        more = f"(/ ?, ?/ call){limit}" if several else ""
        rules.append(rf"calls: /[ \n]{{0,2}}\[ ?/ call {more} /[ \n]{{0,2}}\]/")
    else:
        between = "" if format_.syntax == "args" else r"/\n{1,2}/ "
        rules.append("calls: call " + (f"({between}{tag} call){limit}" if several else ""))
    if answer is not None:
        return _beside(answer, "\n".join([f"start: {tag} calls | @answer", *rules]))
    start = f"{_GAP} {tag} calls" if tagged else "calls"
    triggers = () if forced else _triggers(format_)
    return Grammar("\n".join([f"start: {start}", *rules]), triggers, "llguidance")


def _beside(answer: Grammar, calls: str) -> Grammar:
    """Return the grammar of what one of two grammars takes; ``calls`` refers to the other one as ``@answer``."""
    if answer.text.lstrip().startswith("{"):
        (grammar,) = json.loads(answer.text)["grammars"]
    else:
        grammar = {"lark_grammar": answer.text}
    grammars = [{"name": "start", "lark_grammar": calls}, {**grammar, "name": "answer"}]
    return Grammar(to_json({"grammars": grammars}), kind="llguidance")


def _call_rules(number: int, tool: Tool, format_: ToolFormat, literal: Callable[[str], str]) -> list[str]:
    """Return the rules of one tool's call; its schema is a root of its own, so that references in it work."""
    schema = tool.function.parameters or {"type": "object", "properties": {}}
    lenient = not tool.function.strict
    if format_.syntax == "xml":
        return list(_element_rules(number, tool.function.name, schema, lenient=lenient))
    arguments = f"args_{number}: %json {_json_rule(schema, lenient=lenient)}"
    name = re.escape(tool.function.name).replace("/", r"\/")
    if format_.syntax == "args":
        call = f"call_{number}: head_{number} {literal('[ARGS]')} args_{number}"
        return [call, rf"head_{number}: /[ \n]{{0,2}}{name}/", arguments]
    key = format_.key
    head = rf'[ \n]{{0,2}}\{{{_SPACE}"name"{_SPACE}:{_SPACE}"{name}"{_SPACE},{_SPACE}"{key}"{_SPACE}:{_SPACE}'
    return [
        f"call_{number}: head_{number} args_{number} /{_SPACE}\\}}/",
        f"head_{number}: /{head}/",
        arguments,
    ]


def _json_rule(schema: Any, *, lenient: bool) -> str:  # noqa: ANN401  (any JSON schema)
    closed = closed_schema(schema)
    closed = closed if isinstance(closed, dict) else {"anyOf": [closed]}
    return to_json({**closed, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient}})


def _element_rules(number: int, name: str, schema: Mapping[str, Any], *, lenient: bool) -> Iterator[str]:
    """Yield the rules of a call in Qwen3-Coder's form: its arguments in the order of the schema."""
    properties = properties_of(schema)
    required = schema.get("required") or []
    parts = [f"argument_{number}_{index}" + ("" if each in required else "?") for index, each in enumerate(properties)]
    yield f"call_{number}: head_{number} {' '.join(parts)} {_text('</function>')}"
    yield f"head_{number}: {_GAP} {_text(f'{FUNCTION}{name}>' + chr(10))}"
    end = "\n</parameter>\n"
    for index, (each, inner) in enumerate(properties.items()):
        place = f"{number}_{index}"
        head = _text(f"<parameter={each}>\n")
        choices = texts_of(inner)
        if choices:
            listed = " | ".join(map(_text, choices))
            yield f"argument_{place}: {head} ({listed}) {_text(end)}"
            continue
        yield f"argument_{place}: {head} value_{place}" + ("" if is_text(inner) else f" {_text(end)}")
        if is_text(inner):
            low, high = inner.get("minLength") or 0, inner.get("maxLength", "")
            yield f"value_{place}[suffix={_text(end)}]: /(?s:.{{{low},{high}}})/"
        else:
            yield f"value_{place}: %json {_json_rule(inner, lenient=lenient)}"


def _text(text: str) -> str:
    return to_json(text, ensure_ascii=False)


def _triggers(format_: ToolFormat) -> tuple[str, ...]:
    if format_.syntax == "xml":
        return (re.escape(format_.tag) + "()", f"(){re.escape(FUNCTION)}")
    if format_.tag:
        return (re.escape(format_.tag) + "()",)
    return (r'^\s*(\{\s*"name"\s*:\s*")',)
