"""The prompt of a chat: messages and tools in the model's template, and how its answer is to be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguflora.engine import Engine, Grammar
from gguflora.engine.thoughts import ThoughtLimit
from gguflora.runtime.chat_template import ChosenTemplate
from gguflora.server.chat_template import TemplateTraits, add_to_system, chat_texts, flat, for_template, traits_of
from gguflora.server.errors import Failure
from gguflora.server.replies import Reply
from gguflora.server.schemas import ChatBody, NamedTool, Tool
from gguflora.server.structured import checked
from gguflora.server.tool_calls import ToolFormat, instructions
from gguflora.server.tool_grammar import call_grammar

_RESERVED: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "messages", "template", "to_answer", "tokenize", "tools"}
)
_MARK: Final = "[[continued here 5309]]"
"""Shows where the last message ends in the template's text."""
_OFF: Final = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
"""Variables that ask for nothing, if they are off and the template does not read them."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat that is ready to be answered.

    Attributes:
        text: the prompt.
        tokens: its tokens.
        grammar: what the answer must look like.
        spelled: control tokens that are part of the answer's text.
        format: how the model writes tool calls; None if it has no tools.
        tools: schemas of the tools' arguments, by name.
        is_legacy: whether a call is OpenAI's older ``function_call``.
        thinking: the tags around reasoning; None if it is not split off.
        in_thought: whether the prompt has opened the first tag already.
        begun: what of the answer stands in the prompt.
        shows_reasoning: whether the client gets the reasoning.
        thoughts: how long the reasoning may be; None sets no limit.
    """

    text: str
    tokens: list[int]
    grammar: Grammar | None
    spelled: frozenset[int]
    format: ToolFormat | None
    tools: Mapping[str, Mapping[str, Any]]
    is_legacy: bool
    thinking: tuple[str, str] | None
    in_thought: bool
    begun: str
    shows_reasoning: bool
    thoughts: ThoughtLimit | None

    def reply(self) -> Reply:
        """Return a new reader of one answer."""
        reply = Reply(self.thinking, self.in_thought, self.format, self.tools, self.shows_reasoning, self.is_legacy)
        reply.push(self.begun)
        return reply


def chat_prompt(engine: Engine, body: ChatBody, template: ChosenTemplate | None = None) -> ChatPrompt:
    """Put a chat into the engine's template, or into one in its place, such as that of an adapter.

    Raises:
        Failure: if the template cannot show a field, or fields contradict each other.
        RequestError: if the template refuses the messages.
    """
    traits = traits_of(engine, template)
    tools, forced = _chosen_tools(body)
    messages = for_template(body.messages, traits)
    variables = _variables(body, traits)
    format_ = traits.format if tools else None
    if tools and traits.tools:
        variables["tools"] = [{"type": "function", "function": tool.function.for_template()} for tool in tools]
    elif format_:
        messages = add_to_system(messages, instructions(tools, format_), traits)
    chat_text = chat_texts(engine, template)
    text = _text(chat_text, body, messages, variables)
    _check_shown(chat_text, messages, variables, text)
    splits = body.reasoning_format != "none"
    is_open = traits.thinking is not None and text.rstrip().endswith(traits.thinking[0])
    in_thought = splits and is_open
    begun = format_.begin if format_ and forced and not in_thought else ""
    grammar = body.structure()
    if format_:
        grammar = _tool_grammar(engine, body, tools, format_, grammar, forced=forced, tagged=in_thought)
    if grammar is not None and in_thought and traits.thinking:
        grammar = _after_thoughts(grammar, traits.thinking[1])
    add_bos = template is None and not engine.has_chat_template
    return ChatPrompt(
        text=text + begun,
        tokens=engine.tokenize(text + begun, add_bos=add_bos, special=True, as_prompt=True),
        grammar=grammar,
        spelled=_spelled(engine, (*(format_.marks if format_ else ()), *(traits.thinking or ()))),
        format=format_,
        tools={tool.function.name: tool.function.parameters or {} for tool in tools},
        is_legacy=body.is_legacy,
        thinking=traits.thinking if splits and not begun else None,
        in_thought=in_thought,
        begun=begun,
        shows_reasoning=body.include_reasoning is not False,
        thoughts=None if begun else _thought_limit(engine, body, traits, is_open=is_open),
    )


def _chosen_tools(body: ChatBody) -> tuple[Sequence[Tool], bool]:
    """Return the tools that the model may call, and whether it must call one."""
    tools, choice = body.offered_tools(), body.chosen_tool()
    field = "function_call" if body.is_legacy else "tool_choice"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise Failure(400, "two tools have the same name", param="functions" if body.is_legacy else "tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            message = f"{field!r} names {choice.function.name!r:.80}, which is not among the tools"
            raise Failure(400, message, param=field)
        return [tool for tool in tools if tool.function.name == choice.function.name], True
    if choice == "required" and not tools:
        raise Failure(400, "'tool_choice' is 'required', but there are no tools", param="tool_choice")
    return ([] if choice == "none" else tools), choice == "required"


def _variables(body: ChatBody, traits: TemplateTraits) -> dict[str, Any]:
    """Return the variables that a request gives the template, if the template reads them."""
    given = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            given[name] = value
    for name, value in given.items():
        if name in _RESERVED:
            raise Failure(400, f"chat_template_kwargs: {name!r} has a field of its own", param="chat_template_kwargs")
        if name not in traits.variables and not (name in _OFF and value in (False, "none", "minimal")):
            raise Failure(400, f"the model's chat template does not read {name!r:.80}", "not_in_template", name[:80])
    return given


def _text(
    chat_text: Callable[..., str],
    body: ChatBody,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> str:
    """Return the prompt; a last message of the assistant is continued unless fields say otherwise."""
    last = body.messages[-1]
    continues = body.continue_final_message
    if continues is None:
        continues = last.role == "assistant" and not last.tool_calls and body.add_generation_prompt is None
    elif continues and body.add_generation_prompt:
        raise Failure(
            400,
            "'continue_final_message' and 'add_generation_prompt' exclude each other",
            param="continue_final_message",
        )
    if not continues:
        return chat_text(messages, to_answer=body.add_generation_prompt is not False, **variables)
    content = last.text()
    text = chat_text(messages, to_answer=False, **variables)
    marked = chat_text([*messages[:-1], _marked(messages[-1])], to_answer=False, **variables)
    if content.strip() and _MARK in marked:
        begun = marked[: marked.rindex(_MARK)]
        # a template that trims a message keeps the space before the mark
        return begun if text.startswith(begun) else begun.removesuffix(content[len(content.rstrip()) :])
    return (chat_text(messages[:-1], **variables) if len(messages) > 1 else "") + content


def _check_shown(
    chat_text: Callable[..., str], messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], text: str
) -> None:
    """Check that the template has shown every message but those of the assistant and of tools.

    Templates leave out what those thought, or said beside a call.

    Raises:
        Failure: if it drops one, such as one of a role that it does not know.
    """
    for number, message in enumerate(messages):
        content, role = flat(message["content"]).strip(), message["role"]
        if not content or content in text or role in {"assistant", "tool"}:
            continue
        marked = [*messages[:number], _marked(message), *messages[number + 1 :]]
        if _MARK not in chat_text(marked, **variables):  # not only written in another way
            message_ = f"messages: the model's chat template does not show this message of the role {role!r:.40}"
            raise Failure(400, message_, "not_in_template", "messages")


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with a mark at the end of its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    *parts, end = content or [{"type": "text", "text": ""}]
    return {**message, "content": [*parts, {**end, "text": end["text"] + _MARK}]}


def _after_thoughts(grammar: Grammar, closing: str) -> Grammar:
    """Return a grammar that holds behind the model's thoughts, which are free."""
    end = re.escape(closing)
    anywhere = r"[\s\S]*?"
    behind = [end + (each.removeprefix("^") if each.startswith("^") else anywhere + each) for each in grammar.triggers]
    return Grammar(grammar.text, tuple(behind) or (end + "()",), grammar.kind)


def _tool_grammar(
    engine: Engine,
    body: ChatBody,
    tools: Sequence[Tool],
    format_: ToolFormat,
    answer: Grammar | None,
    *,
    forced: bool,
    tagged: bool,
) -> Grammar:
    """Return the grammar of calls; or, where the model may also answer, of calls and of the form of that answer.

    Raises:
        Failure: if a schema cannot be enforced.
    """

    def literal(text: str) -> str:
        tokens = engine.tokenize(text, add_bos=False, special=True)
        quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return f"<[{tokens[0]}]>" if len(tokens) == 1 else quoted

    is_named = isinstance(body.chosen_tool(), NamedTool)
    several = body.parallel_tool_calls is not False and not is_named and not body.is_legacy
    grammar = call_grammar(
        format_,
        tools,
        several=several,
        literal=literal,
        forced=forced,
        tagged=forced and tagged,
        answer=None if forced else answer,
    )
    return checked("functions" if body.is_legacy else "tools", grammar)


def _thought_limit(engine: Engine, body: ChatBody, traits: TemplateTraits, *, is_open: bool) -> ThoughtLimit | None:
    """Return the limit of the model's thoughts; -1 asks for none, as in llama-server."""
    budget = body.thinking_token_budget
    if budget is None or budget < 0 or (budget == 0 and traits.thinking is None):
        return None
    if traits.thinking is None:
        name = "thinking_token_budget"
        raise Failure(400, f"{name}: the model's chat template has no tags around thoughts", "not_in_template", name)
    opening, closing = traits.thinking
    return ThoughtLimit(budget, opening, closing, tuple(engine.tokenize(closing, add_bos=False, special=True)), is_open)


def _spelled(engine: Engine, marks: Sequence[str]) -> frozenset[int]:
    """Return the tokens of tags around calls and thoughts; they may be control tokens, which have no text otherwise."""
    tokens = [engine.tokenize(mark, add_bos=False, special=True) for mark in marks]
    return frozenset(each[0] for each in tokens if len(each) == 1)
