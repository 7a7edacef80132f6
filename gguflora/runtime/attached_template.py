"""The chat template of a ``llama_cpp.Llama`` while adapters are applied that bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_chat_format

from gguflora.errors import EngineError, HotSwapError
from gguflora.runtime.adapter_set import Untyped
from gguflora.runtime.chat_template import ChosenTemplate, choose_template
from gguflora.runtime.templates import RENDERER

_TEMPLATE = "tokenizer.chat_template"


def handler_of(llm: Untyped, choice: str | None, adapters: Sequence[Path]) -> Untyped:
    """Return what answers chats under these adapters; None if the Llama itself does.

    Args:
        llm: the Llama.
        choice: ``adapter``, ``base`` or a template in Jinja. None takes the template of a directory if it is the only
            applied adapter and its template differs from the base's, and logs it.
        adapters: paths of the applied adapters.

    Raises:
        HotSwapError: if ``adapter`` is asked for and there is no template, or several.
        AdapterError: if a template cannot be read.
    """
    if choice == "adapter" and not adapters:
        return None
    try:
        chosen = choose_template(choice, None, adapters, llm.metadata.get(_TEMPLATE, ""))
    except EngineError as error:
        raise HotSwapError(str(error).replace("chat_template_file", "chat_template")) from error
    return None if chosen is None else _handler(llm, chosen)


def _handler(llm: Untyped, chosen: ChosenTemplate) -> Untyped:
    """Return a chat handler of llama-cpp-python that renders the template as `gguflora.engine` does."""
    begin, end = (_text(llm, token) for token in (llm.token_bos(), llm.token_eos()))
    last = llm.token_eos() if chosen.end_token is None else chosen.end_token
    closing = _text(llm, last)

    def ends(tokens: Untyped, _: Untyped) -> bool:
        return int(tokens[-1]) == last

    def render(*, messages: Untyped, tools: Untyped = None, **_: Any) -> llama_chat_format.ChatFormatterResponse:  # noqa: ANN401
        special = {"bos_token": begin, "eos_token": end, **chosen.special_texts}
        variables = {**special, "messages": messages, "add_generation_prompt": True}
        given = {"tools": tools} if tools else {}
        return llama_chat_format.ChatFormatterResponse(
            prompt=RENDERER.render(chosen.text, {**variables, **given}),
            stop=[closing] if closing else [],
            stopping_criteria=llama_cpp.StoppingCriteriaList([ends]),
            added_special=True,
        )

    return llama_chat_format.chat_formatter_to_chat_completion_handler(render)


def _text(llm: Untyped, token: int) -> str:
    return "" if token < 0 else str(llm.detokenize([token], special=True).decode("utf-8", errors="replace"))
