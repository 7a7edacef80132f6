"""What a model's chat template can show, found by trying it, and chats put into words that it understands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import jinja2
import jinja2.meta

from gguflora.engine import Engine
from gguflora.errors import RequestError
from gguflora.files.strict_json import to_json
from gguflora.runtime.chat_template import ChosenTemplate
from gguflora.runtime.template_process import environment
from gguflora.server.errors import Failure
from gguflora.server.schemas import Message
from gguflora.server.tool_calls import ToolFormat, format_of

_PROBE: Final = "probe5309"
_USER: Final[dict[str, Any]] = {"role": "user", "content": "x"}
_CALL_ID: Final = "probe5309"  # nine letters and digits, as Mistral's templates want them
_THOUGHTS: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What one template can show.

    Attributes:
        format: how the model writes tool calls.
        typed: whether content must be a list of parts.
        system: whether it shows system messages.
        tools: whether it shows the list of tools.
        calls: type of the arguments of tool calls that it shows, dict or str; None if it shows no calls.
        results: whether it shows messages of the role ``tool``.
        names: whether it shows the ``name`` of a message.
        reasoning: whether it shows ``reasoning_content``.
        thinking: the tags around reasoning; None if it has none.
        variables: the variables that it reads.
    """

    format: ToolFormat
    typed: bool
    system: bool
    tools: bool
    calls: type | None
    results: bool
    names: bool
    reasoning: bool
    thinking: tuple[str, str] | None
    variables: frozenset[str]


_KEPT: Final = 256
_TRAITS: Final[WeakKeyDictionary[Engine, dict[str, TemplateTraits]]] = WeakKeyDictionary()
"""What is known of each engine's templates, by their text."""
_KNOWING: Final = threading.Lock()


def traits_of(engine: Engine, chosen: ChosenTemplate | None = None) -> TemplateTraits:
    """Return what a template can show: the engine's, or one in its place."""
    text = engine.chat_template if chosen is None else chosen.text
    with _KNOWING:  # requests are read in several threads
        known = _TRAITS.setdefault(engine, {}).get(text)
    if known is None:
        known = _find_traits(text, chat_texts(engine, chosen))  # not under the lock: a bad template takes its time
        with _KNOWING:
            traits = _TRAITS.setdefault(engine, {})
            traits[text] = known
            while len(traits) > _KEPT:
                del traits[next(iter(traits))]
    return known


def chat_texts(engine: Engine, chosen: ChosenTemplate | None) -> Callable[..., str]:
    """Return the engine's ``chat_text`` with a template in place of its own."""
    return engine.chat_text if chosen is None else partial(engine.chat_text, template=chosen)


def _find_traits(template: str, chat_text: Callable[..., str]) -> TemplateTraits:
    def shows(*messages: Mapping[str, Any], to_answer: bool = True, **options: Any) -> bool:  # noqa: ANN401
        try:
            return _PROBE in chat_text(messages, to_answer=to_answer, **options)
        except RequestError:
            return False

    def part(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    typed = not shows({"role": "user", "content": _PROBE}) and shows({"role": "user", "content": part(_PROBE)})
    user = {"role": "user", "content": part("x") if typed else "x"}
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "y"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": _PROBE, "description": "z", "parameters": parameters}}

    def call(name: str, arguments: object) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": _CALL_ID, "type": "function", "function": function}],
        }

    result = {"role": "tool", "tool_call_id": _CALL_ID, "name": "f"}
    calls = next(
        (
            type(each)
            for each in ({"a": _PROBE}, to_json({"a": _PROBE}))
            if shows(user, call("f", each), {**result, "content": "r"})
        ),
        None,
    )
    answer = {"role": "assistant", "content": "y"}
    return TemplateTraits(
        format=format_of(template),
        typed=typed,
        system=shows({"role": "system", "content": part(_PROBE) if typed else _PROBE}, user),
        tools=shows(user, tools=[tool]),
        calls=calls,
        results=calls is not None
        and shows(user, call("f", calls() if calls is dict else "{}"), {**result, "content": _PROBE}),
        names=shows({**user, "name": _PROBE}),
        reasoning=shows(user, {**answer, "reasoning_content": _PROBE}, to_answer=False),
        thinking=next((tags for tags in _THOUGHTS if tags[0] in template or tags[1] in template), None),
        variables=_variables(template),
    )


@lru_cache(maxsize=4)
def _variables(template: str) -> frozenset[str]:
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment().parse(template)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()


def for_template(messages: Sequence[Message], traits: TemplateTraits) -> list[dict[str, Any]]:
    """Return messages as a template shows them: nothing of them is lost.

    Tool calls and their results become plain text for templates that know neither; system messages become part of the
    next message of a user.

    Raises:
        Failure: if the template has no place for the name or the reasoning of a message.
    """
    shown = []
    names: dict[str, str] = {}
    for number, message in enumerate(messages):
        names.update({call.id: call.function.name for call in message.tool_calls or () if call.id})
        fields = _plain_fields(message, traits, names)
        for name, has_place, value in (
            ("name", traits.names or message.role == "tool", message.name),
            ("reasoning_content", traits.reasoning, message.reasoning_content),
        ):
            if value and not has_place:
                where = f"messages.{number}.{name}"
                raise Failure(400, f"{where}: the model's chat template has no place for it", "not_in_template", where)
            if value:
                fields[name] = value
        if traits.typed and isinstance(fields["content"], str):
            fields["content"] = [{"type": "text", "text": fields["content"]}]
        shown.append(fields)
    return shown if traits.system else _folded(shown, traits)


def _folded(messages: Sequence[dict[str, Any]], traits: TemplateTraits) -> list[dict[str, Any]]:
    """Return messages for a template that shows no system messages: each stands before the next one of a user."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for message in messages:
        if message["role"] == "system":
            texts.append(flat(message["content"]))
            continue
        takes = texts and message["role"] == "user"
        found += add_to_system([message], "\n\n".join(texts), traits) if takes else [message]
        texts = [] if takes else texts
    rest = "\n\n".join(texts)
    if texts:
        found.append({"role": "user", "content": [{"type": "text", "text": rest}] if traits.typed else rest})
    return found


def flat(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _plain_fields(message: Message, traits: TemplateTraits, names: Mapping[str, str]) -> dict[str, Any]:
    role, text = ("system" if message.role == "developer" else message.role), message.text()
    calls = [{"name": call.function.name, "arguments": call.function.parsed()} for call in message.tool_calls or ()]
    if calls and traits.calls is None:
        return {"role": role, "content": "\n".join(filter(None, [text, traits.format.text(calls)]))}
    fields: dict[str, Any] = {"role": role, "content": text}
    if calls:
        for call in calls if traits.calls is str else ():
            call["arguments"] = to_json(call["arguments"], ensure_ascii=False)
        ids = [call.id or f"call{number:05}" for number, call in enumerate(message.tool_calls or ())]
        fields["tool_calls"] = [
            {"id": id_, "type": "function", "function": call} for id_, call in zip(ids, calls, strict=True)
        ]
    if role == "tool":
        name = message.name or names.get(message.tool_call_id or "", "")
        if not traits.results:
            return {"role": "user", "content": f"Result of {name or 'the function'}: {text}"}
        fields |= {"tool_call_id": message.tool_call_id, "name": name}
    return fields


def add_to_system(messages: list[dict[str, Any]], text: str, traits: TemplateTraits) -> list[dict[str, Any]]:
    """Return messages with a text before the first system message, or before the first message of a user."""
    role = "system" if traits.system else "user"
    for number, message in enumerate(messages):
        if message["role"] == role:
            content = message["content"]
            joined = [{"type": "text", "text": text + "\n\n"}, *content] if traits.typed else f"{text}\n\n{content}"
            return [*messages[:number], {**message, "content": joined}, *messages[number + 1 :]]
        if role == "system":
            break
    first = {"role": role, "content": [{"type": "text", "text": text}] if traits.typed else text}
    return [first, *messages]
