"""What texts and chats are for a model in memory: tokens, and prompts by its chat template."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from gguflora.engine.model import Model
from gguflora.engine.requests import check_tokens
from gguflora.errors import EngineClosedError, PromptTooLongError

_LONG_TEXT: Final = 1 << 16
"""Characters of a text whose tokens are worth a guess before it is split."""


class ModelTexts:
    """The texts of a model in memory, which is not freed while a thread needs it. Thread-safe.

    Args:
        model: the model.
        n_ctx: size of the context in tokens.

    Attributes:
        n_vocab: number of tokens in the vocabulary.
        n_ctx: size of the context in tokens.
    """

    def __init__(self, model: Model, n_ctx: int) -> None:
        self._model = model
        self.n_vocab = model.n_vocab
        self.n_ctx = n_ctx
        self._lock = threading.Lock()
        self._unused = threading.Condition(self._lock)
        self._users = 0  # threads that are in `_open`
        self._closed = False

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = True, as_prompt: bool = False) -> list[int]:
        """Split text into tokens.

        Args:
            text: the text.
            add_bos: put the model's begin-of-text token in front, if the model uses one.
            special: read the spelling of a control token as that token.
            as_prompt: refuse a text that cannot fit into the context without splitting it, which is costly.

        Raises:
            PromptTooLongError: if ``as_prompt`` and the text has certainly too many tokens.
        """
        with self._open():
            if as_prompt:
                self._check_text(text)
            return self._model.tokenize(text, add_bos=add_bos, special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """Return the bytes of ``tokens``; control tokens have none, unless ``special`` asks for their spelling.

        Raises:
            RequestError: if the vocabulary has no such token.
        """
        check_tokens(tokens, self.n_vocab)
        with self._open():
            return self._model.detokenize(tokens, special=special)

    @property
    def chat_template(self) -> str:
        """The chat template, in Jinja."""
        with self._open():
            return self._model.template

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template; otherwise `chat_template` is one of plain text."""
        with self._open():
            return self._model.has_template

    @property
    def special_texts(self) -> dict[str, str]:
        """The texts of the tokens that begin and end a text: ``bos_token`` and ``eos_token``."""
        with self._open():
            return self._model.special_texts

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> str:  # noqa: ANN401
        """Return the text that the chat template, or another ``template``, makes of a chat.

        `render_chat` returns its tokens.

        Raises:
            RequestError: if the template refuses the messages.
        """
        with self._open():
            return self._model.chat_text(messages, **template_kwargs)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:  # noqa: ANN401
        """Turn a chat into tokens with the model's own template, up to where its answer begins.

        Args:
            messages: messages with a ``role`` and ``content``, as in OpenAI's API.
            **template_kwargs: further variables of the template; ``template`` is another template to use.

        Raises:
            RequestError: if the template refuses the messages.
        """
        with self._open():
            return self._model.render_chat(messages, check=self._check_text, **template_kwargs)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Keep the model from being freed while the block runs; several threads can be inside."""
        with self._lock:
            self._check_open()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._unused.notify_all()

    def _begin_closing(self) -> bool:
        """Refuse all calls from now on; return False if they are refused already."""
        with self._lock:
            was_open, self._closed = not self._closed, True
        return was_open

    def _wait_until_unused(self) -> None:
        """Wait for the calls that had begun before `_begin_closing`."""
        with self._lock:
            self._unused.wait_for(lambda: not self._users)

    def _check_text(self, text: str) -> None:
        if len(text) > _LONG_TEXT and (fewest := self._model.fewest_tokens(text)) >= self.n_ctx:
            raise PromptTooLongError(
                f"the prompt has at least {fewest} tokens, but this model's maximum context length is {self.n_ctx} "
                "tokens: the context holds the prompt and the answer"
            )


def check_length(n_prompt: int, n_ctx: int) -> None:
    """Check that a prompt leaves room for an answer.

    Raises:
        PromptTooLongError: if it does not.
    """
    if n_prompt >= n_ctx:
        raise PromptTooLongError(
            f"the prompt has {n_prompt} tokens, but this model's maximum context length is {n_ctx} tokens: "
            "the context holds the prompt and the answer"
        )
