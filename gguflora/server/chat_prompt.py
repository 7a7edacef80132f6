"""The prompt of a chat: messages and tools in the model's template, and how its answer is to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gguflora.engine import Engine, Grammar
from gguflora.server.chat_template import TemplateTraits, add_to_system, for_template, traits_of
from gguflora.server.errors import Failure
from gguflora.server.replies import Reply
from gguflora.server.schemas import ChatBody, NamedTool, Tool
from gguflora.server.structured import checked
from gguflora.server.tool_calls import ToolFormat, call_grammar, instructions

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
        tools: names of the tools.
        thinking: the tags around reasoning; None if it is not split off.
        in_thought: whether the prompt has opened the first tag already.
        begun: what of the answer stands in the prompt.
        shows_reasoning: whether the client gets the reasoning.
    """

    text: str
    tokens: list[int]
    grammar: Grammar | None
    spelled: frozenset[int]
    format: ToolFormat | None
    tools: frozenset[str]
    thinking: tuple[str, str] | None
    in_thought: bool
    begun: str
    shows_reasoning: bool

    def reply(self) -> Reply:
        """Return a new reader of one answer."""
        reply = Reply(self.thinking, self.in_thought, self.format, self.tools, self.shows_reasoning)
        reply.push(self.begun)
        return reply


def chat_prompt(engine: Engine, body: ChatBody) -> ChatPrompt:
    """Put a chat into the model's template.

    Raises:
        Failure: if the template cannot show a field, or fields contradict each other.
        RequestError: if the template refuses the messages.
    """
    traits = traits_of(engine)
    tools, forced = _chosen_tools(body)
    messages = for_template(body.messages, traits)
    variables = _variables(body, traits)
    format_ = traits.format if tools else None
    if tools and traits.tools:
        variables["tools"] = [{"type": "function", "function": tool.function.for_template()} for tool in tools]
    elif format_:
        messages = add_to_system(messages, instructions(tools, format_), traits)
    text = _text(engine, body, messages, variables)
    splits = body.reasoning_format != "none"
    in_thought = splits and traits.thinking is not None and text.rstrip().endswith(traits.thinking[0])
    begun = format_.begin if format_ and forced else ""
    structure = body.structure()
    if format_ and structure is not None:
        raise Failure(400, "'tools' and a form of the answer cannot be asked for together; set 'tool_choice' to 'none'")
    grammar = _tool_grammar(engine, body, tools, format_, forced=forced) if format_ else structure
    if grammar is not None and in_thought and not begun and traits.thinking:
        grammar = Grammar(grammar.text, (traits.thinking[1] + "()",), grammar.kind)  # thoughts are free
    return ChatPrompt(
        text=text + begun,
        tokens=engine.tokenize(text + begun, add_bos=not engine.has_chat_template, special=True, as_prompt=True),
        grammar=grammar,
        spelled=_spelled(engine, format_),
        format=format_,
        tools=frozenset(tool.function.name for tool in tools),
        thinking=traits.thinking if splits and not begun else None,
        in_thought=in_thought and not begun,
        begun=begun,
        shows_reasoning=body.include_reasoning is not False,
    )


def _chosen_tools(body: ChatBody) -> tuple[Sequence[Tool], bool]:
    """Return the tools that the model may call, and whether it must call one."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise Failure(400, "two tools have the same name", param="tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            message = f"'tool_choice' names {choice.function.name!r:.80}, which is not among the tools"
            raise Failure(400, message, param="tool_choice")
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


def _text(engine: Engine, body: ChatBody, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
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
        return engine.chat_text(messages, to_answer=body.add_generation_prompt is not False, **variables)
    content = last.text()
    text = engine.chat_text(messages, to_answer=False, **variables)
    marked = engine.chat_text([*messages[:-1], _marked(messages[-1])], to_answer=False, **variables)
    if content.strip() and _MARK in marked:
        begun = marked[: marked.rindex(_MARK)]
        # a template that trims a message keeps the space before the mark
        return begun if text.startswith(begun) else begun.removesuffix(content[len(content.rstrip()) :])
    return (engine.chat_text(messages[:-1], **variables) if len(messages) > 1 else "") + content


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with a mark at the end of its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    *parts, end = content or [{"type": "text", "text": ""}]
    return {**message, "content": [*parts, {**end, "text": end["text"] + _MARK}]}


def _tool_grammar(
    engine: Engine, body: ChatBody, tools: Sequence[Tool], format_: ToolFormat, *, forced: bool
) -> Grammar:
    def literal(text: str) -> str:
        tokens = engine.tokenize(text, add_bos=False, special=True)
        quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return f"<[{tokens[0]}]>" if len(tokens) == 1 else quoted

    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    grammar = call_grammar(format_, tools, several=several, forced=forced, literal=literal)
    return checked("tools", grammar)


def _spelled(engine: Engine, format_: ToolFormat | None) -> frozenset[int]:
    """Return the tokens that calls begin and end with; they may be control tokens, which have no text otherwise."""
    marks = [format_.tag, format_.end.strip()] if format_ else []
    tokens = [engine.tokenize(mark, add_bos=False, special=True) for mark in marks if mark]
    return frozenset(each[0] for each in tokens if len(each) == 1)
