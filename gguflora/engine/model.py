"""A model loaded by llama.cpp: its weights, vocabulary and chat template."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import llama_cpp

from gguflora.errors import EngineError, MissingExtraError, RequestError
from gguflora.runtime.bindings import captured_log, is_stateful, reason_of
from gguflora.runtime.chat_template import ChosenTemplate
from gguflora.runtime.llama_internals import silence
from gguflora.runtime.templates import RENDERER
from gguflora.runtime.tokenizing import metadata_of, pre_tokenizer, tokenize

_PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template for models that have none, which were trained on plain text."""

_PIECE_BYTES: Final = 128
_EXACT_VOCABULARIES: Final = (llama_cpp.LLAMA_VOCAB_TYPE_SPM, llama_cpp.LLAMA_VOCAB_TYPE_BPE)
"""Vocabularies whose tokens spell the text; others normalize it first."""


class Model:
    """A ``llama_model``. Methods that only use the vocabulary are thread-safe.

    Args:
        path: the GGUF file.
        verbose: whether llama.cpp prints its log.
        gpu_layers: number of layers on a GPU, -1 for all; None for llama.cpp's default.
        repack: whether llama.cpp keeps a second copy of the weights in an order that is quicker to multiply with.

    Attributes:
        pointer: the ``llama_model *``; None once freed.
        n_vocab: number of tokens in the vocabulary.
        n_embd: number of values of an embedding.
        n_ctx_train: number of tokens that the model was trained for.
        rewinds: whether its state can be rewound by a few tokens; false for recurrent and hybrid models.

    Raises:
        EngineError: if llama.cpp cannot load the file, with llama.cpp's log text.
    """

    def __init__(self, path: Path, *, verbose: bool, gpu_layers: int | None = None, repack: bool = True) -> None:
        silence(verbose=verbose)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = repack
        if gpu_layers is not None:
            parameters.n_gpu_layers = gpu_layers
        with captured_log() as log:
            pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not pointer:
            raise EngineError(f"{path}: llama.cpp could not load this model: {reason_of(log)}")
        self.pointer: Any = pointer
        self._vocab = llama_cpp.llama_model_get_vocab(pointer)
        self._pre = pre_tokenizer(pointer)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(llama_cpp.llama_model_n_embd(pointer))
        self.n_ctx_train = int(llama_cpp.llama_model_n_ctx_train(pointer))
        self.rewinds = not is_stateful(pointer)
        if llama_cpp.llama_model_has_encoder(pointer) or not llama_cpp.llama_model_has_decoder(pointer):
            self.free()
            raise EngineError(f"{path}: the model has an encoder; the engine serves decoder-only models")
        self._chosen: ChosenTemplate | None = None
        self.piece = lru_cache(maxsize=1 << 16)(self._piece)

    def free(self) -> None:
        """Free the weights; all contexts and adapters must be freed before. Idempotent."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            llama_cpp.llama_model_free(pointer)

    def metadata(self, key: str) -> str | None:
        """Return a short value of the file's metadata as text; None if there is none."""
        return metadata_of(self.pointer, key)

    @property
    def vocabulary(self) -> Any:  # noqa: ANN401  (llama_cpp has no types)
        """The ``llama_vocab *``."""
        return self._vocab

    @cached_property
    def guidance(self) -> Any:  # noqa: ANN401  (an optional package)
        """The vocabulary as llguidance wants it, which takes a second or two to make.

        Raises:
            MissingExtraError: if llguidance is not installed.
        """
        try:
            from llguidance.llamacpp import lltokenizer_from_vocab  # noqa: PLC0415  (in the extra ``server``)
        except ImportError:
            raise MissingExtraError("a grammar of this kind", "llguidance", "server") from None
        return lltokenizer_from_vocab(self._vocab, eos_token=list(self.end_tokens))

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return tuple(token for token in range(self.n_vocab) if self.is_end(token))

    def is_end(self, token: int) -> bool:
        """Return whether ``token`` ends an answer."""
        is_chosen = self._chosen is not None and token == self._chosen.end_token
        return is_chosen or bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def longest_piece(self) -> int:
        """Largest number of bytes that one token of a text stands for."""
        return max(4, *(len(self._piece(token, True)) for token in range(self.n_vocab)))  # an unknown character has 4

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that ``text`` has at least, without splitting it; spaces may have no token."""
        if llama_cpp.llama_vocab_type(self._vocab) not in _EXACT_VOCABULARIES:
            return 0
        return -(-len(text.encode("utf-8", errors="replace").translate(None, b" \t\n\v\f\r")) // self.longest_piece)

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> list[int]:
        """Split ``text`` into tokens; ``special`` reads the spelling of a control token as that token.

        Raises:
            RequestError: if llama.cpp cannot split the text, see `gguflora.runtime.tokenizing`.
        """
        return tokenize(self._vocab, text, add_bos=add_bos, special=special, pre=self._pre)

    def _piece(self, token: int, special: bool = False) -> bytes:
        """Return the bytes of one token; a control token has none unless ``special``."""
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """Return the bytes of ``tokens``, without control tokens unless ``special``."""
        return b"".join(self.piece(int(token), special) if special else self.piece(int(token)) for token in tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        check: Callable[[str], None] = lambda _: None,
        template: ChosenTemplate | None = None,
        **template_kwargs: Any,  # noqa: ANN401
    ) -> list[int]:
        """Turn a chat into tokens with the model's own template, or another, up to where its answer begins.

        ``check`` may refuse the text before it is split.

        Raises:
            RequestError: if the template refuses the messages.
        """
        text = self.chat_text(messages, template=template, **template_kwargs)
        check(text)
        return self.tokenize(text, add_bos=template is None and not self.has_template, special=True)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: ChosenTemplate | str | None = None,
        to_answer: bool = True,
        **template_kwargs: Any,  # noqa: ANN401
    ) -> str:
        """The text of a chat by the model's own template, or by another.

        Args:
            messages: one or more, each with a role and content.
            template: in Jinja, in place of the model's.
            to_answer: whether the text goes on to where the model's answer begins.
            template_kwargs: what else the template is given.

        Raises:
            RequestError: if the template refuses the messages, or takes too much time or memory or makes too long a
                text; see `gguflora.runtime.templates`.
        """
        if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
            raise RequestError("a chat needs at least one message, and each message needs a role and content")
        chosen = ChosenTemplate(template) if isinstance(template, str) else template or self._chosen
        special = {**self.special_texts, **(chosen.special_texts if chosen else {})}
        variables = {"add_generation_prompt": to_answer, **template_kwargs, "messages": messages, **special}
        return RENDERER.render(self.template if chosen is None else chosen.text, variables)

    def pair(self, query: str, document: str) -> list[int]:
        """Return the tokens of a query and a document for a model that ranks.

        The template named ``rerank`` writes them, or else the vocabulary's own special tokens stand between them, as in
        ``format_prompt_rerank`` of llama-server.
        """
        own = llama_cpp.llama_model_chat_template(self.pointer, b"rerank")
        if own:
            parts = {"{query}": query, "{document}": document}
            text = re.sub(
                r"\{query\}|\{document\}", lambda found: parts[found[0]], own.decode("utf-8", errors="replace")
            )
            return self.tokenize(text, add_bos=False, special=True)
        vocab = self._vocab
        eos = llama_cpp.llama_vocab_eos(vocab)
        end = (
            [eos if eos >= 0 else llama_cpp.llama_vocab_sep(vocab)] if llama_cpp.llama_vocab_get_add_eos(vocab) else []
        )
        start = [llama_cpp.llama_vocab_bos(vocab)] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
        between = [llama_cpp.llama_vocab_sep(vocab)] if llama_cpp.llama_vocab_get_add_sep(vocab) else []
        first, second = (self.tokenize(text, add_bos=False, special=False) for text in (query, document))
        return [int(token) for token in (*start, *first, *end, *between, *second, *end)]

    @cached_property
    def special_texts(self) -> dict[str, str]:
        """The texts of the tokens that begin and end a text, as chat templates name them."""
        bos, eos = llama_cpp.llama_vocab_bos(self._vocab), llama_cpp.llama_vocab_eos(self._vocab)
        return {"bos_token": self._special_text(bos), "eos_token": self._special_text(eos)}

    def use_template(self, chosen: ChosenTemplate) -> None:
        """Use a chat template in place of the model's, with its own token that ends an answer."""
        self._chosen = chosen

    @property
    def template(self) -> str:
        """The chat template: the chosen one, or the model's; one of plain text if there is none."""
        if self._chosen is not None:
            return self._chosen.text
        own = llama_cpp.llama_model_chat_template(self.pointer, None)
        return own.decode("utf-8", errors="replace") if own else _PLAIN_TEMPLATE

    @property
    def has_template(self) -> bool:
        """Whether the model brings a chat template."""
        return self._chosen is not None or llama_cpp.llama_model_chat_template(self.pointer, None) is not None

    @property
    def end_of_text(self) -> int:
        """The token that ends a text; -1 if there is none."""
        return int(llama_cpp.llama_vocab_eos(self._vocab))

    def _special_text(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, True).decode("utf-8", errors="replace")
