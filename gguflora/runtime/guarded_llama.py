"""Guard a ``llama_cpp.Llama`` so that it reuses only tokens computed under the adapters that are applied now.

llama-cpp-python reuses tokens in four ways: the KV cache of its context, the prefix match of ``generate``, the caches
of ``set_cache``, and saved states. None of them considers adapters. `guard` changes the class of one Llama to one that
does. The class also puts a soft prompt in front of the first token and starts activated LoRAs at their invocation
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import LlamaTokenizer

from gguflora.errors import HotSwapError
from gguflora.placement.prefix import Prefix
from gguflora.runtime.adapter_set import BASE, AttachedSet, Untyped, describe
from gguflora.runtime.alora import n_in_common, segments, starts_of
from gguflora.runtime.bindings import begins_with, clear_memory, is_stateful, put_prefix
from gguflora.runtime.llama_internals import (
    Guarded,
    LlamaContext,
    call_on_close,
    fit_inputs,
    reset_asked,
    rewind,
    wrappers_of,
)
from gguflora.runtime.tokenizing import pre_tokenizer, tokenize

_ATTRIBUTE: Final = "_gguflora"
_TAG: Final = "adapter_set"
_STARTS: Final = "adapter_starts"
_TOKEN_BITS: Final = 32


class CachePartition:
    """A view of a llama-cpp-python cache that shows only the entries of one adapter set.

    Tokens are shifted into a number range that belongs to the set, so that keys of two sets never share a prefix, in
    memory or on disk. The set that was applied when gguflora was attached uses the plain tokens, so that entries cached
    before remain usable.
    """

    def __init__(self, cache: Untyped, identity: str, origin: str) -> None:
        self.cache = cache
        self._offset = 0 if identity == origin else _namespace(identity) << _TOKEN_BITS

    def __getitem__(self, tokens: Sequence[int]) -> Untyped:
        return self.cache[self._key(tokens)]

    def __setitem__(self, tokens: Sequence[int], state: object) -> None:
        self.cache[self._key(tokens)] = state

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return self._key(tokens) in self.cache

    def __getattr__(self, name: str) -> Untyped:
        if name == "cache":  # not set yet while the object is unpickled
            raise AttributeError(name)
        return getattr(self.cache, name)

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._offset + int(token) for token in tokens)


def _namespace(identity: str) -> int:
    return int(hashlib.sha256(f"gguflora {identity}".encode()).hexdigest()[:32], 16) | 1


class GuardedLlama(Guarded, llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp has no types
    """A Llama that reuses nothing across adapter sets. `guard` turns an existing Llama into one."""

    n_tokens: int

    @property
    def cache(self) -> CachePartition | None:
        """The part of the cache that belongs to the applied adapter set."""
        cache, adapters = self.__dict__.get("cache"), _set_of(self)
        return None if cache is None else CachePartition(cache, adapters.identity, adapters.origin)

    @cache.setter
    def cache(self, cache: Untyped) -> None:
        self.__dict__["cache"] = cache.cache if isinstance(cache, CachePartition) else cache

    def save_state(self) -> Untyped:
        """Save a state as `llama_cpp.Llama.save_state` does, with the identity of the adapter set."""
        adapters = _set_of(self)
        with adapters.lock:
            state = super().save_state()
            setattr(state, _TAG, adapters.identity)
            setattr(state, _STARTS, dict(adapters.starts))
        return state

    def load_state(self, state: Untyped) -> None:
        """Load a state as `llama_cpp.Llama.load_state` does.

        Raises:
            HotSwapError: if the state was saved under another adapter set.
        """
        adapters = _set_of(self)
        with adapters.llama_lock.call():
            if getattr(state, _TAG, adapters.origin) != adapters.identity:
                raise HotSwapError(
                    "this state was saved under an adapter set other than the one applied now "
                    f"({describe(adapters.active)}); apply that set first, or evaluate the prompt again"
                )
            super().load_state(state)
            adapters.starts = getattr(state, _STARTS, {})

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Split a text into tokens as `llama_cpp.Llama.tokenize` does, on a stack that holds llama.cpp's recursion.

        Raises:
            RequestError: if llama.cpp cannot split the text, see `gguflora.runtime.tokenizing`.
        """
        if type(self.tokenizer_) is not LlamaTokenizer:  # one of Hugging Face's
            return list(super().tokenize(text, add_bos, special))
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        return tokenize(vocabulary, text, add_bos=add_bos, special=special, pre=pre_tokenizer(self.model))

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens as `llama_cpp.Llama.eval` does.

        Raises:
            HotSwapError: if the tokens do not fit into the context.
        """
        adapters = _set_of(self)
        with adapters.llama_lock.call():
            tokens = list(tokens)
            if adapters.invocations and not adapters.planned:
                tokens = self._plan([*self.input_ids[: self.n_tokens].tolist(), *tokens])
            self._check_room(len(tokens))
            if not self.n_tokens and adapters.prefix:
                adapters.set_started(frozenset())
                _ensure_prefix(self, adapters.prefix)
            if not adapters.invocations:
                super().eval(tokens)
                return
            offset = self.n_tokens
            for start, stop, started in segments(offset, offset + len(tokens), adapters.starts):
                adapters.set_started(started)
                super().eval(tokens[start - offset : stop - offset])

    def _plan(self, tokens: list[int]) -> list[int]:
        """Decide where activated LoRAs begin in ``tokens``, the whole sequence so far.

        Tokens evaluated with other adapters than the plan asks for are discarded.

        Returns:
            The tokens that must be evaluated, at the end of the sequence.
        """
        adapters = _set_of(self)
        starts = starts_of(tokens, adapters.invocations)
        kept = n_in_common(adapters.starts, starts, self.n_tokens)
        adapters.starts = starts
        if kept < self.n_tokens:
            if is_stateful(self.model):  # a recurrent state cannot be rewound by a few tokens
                self.reset()
                kept = 0
            rewind(self, kept)
        return tokens[kept:]

    def _check_room(self, n_tokens: int) -> None:
        n_virtual, room = self._room()
        needed = n_virtual + self.n_tokens + n_tokens
        if needed > room:
            raise HotSwapError(
                f"{needed} tokens ({n_virtual} of them virtual) do not fit into the context of {room}; "
                "shorten the prompt, or open the model with a larger n_ctx"
            )

    def _room(self) -> tuple[int, int]:
        """Return the number of virtual tokens, and of all tokens that the context holds."""
        prefix = _set_of(self).prefix
        n_virtual = prefix.n_tokens if prefix else 0
        return n_virtual, min(self.n_ctx(), n_virtual + len(self.input_ids))

    def _is_full(self) -> bool:
        n_virtual, room = self._room()
        return n_virtual + self.n_tokens >= room

    def embed(self, *args: Untyped, **kwargs: Untyped) -> Untyped:
        """Embed texts as `llama_cpp.Llama.embed` does.

        Raises:
            HotSwapError: if a soft prompt or an activated LoRA is applied.
        """
        adapters = _set_of(self)
        with adapters.llama_lock.call():
            if adapters.prefix or adapters.invocations:
                raise HotSwapError(
                    "cannot embed texts while a soft prompt or an activated LoRA is applied; remove it first"
                )
            return super().embed(*args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Untyped, **kwargs: Untyped) -> Iterator[int]:
        """Generate tokens as `llama_cpp.Llama.generate` does.

        Raises:
            HotSwapError: if the adapter set changes before the last token.
        """
        return _set_of(self).llama_lock.generate(self._tokens(list(tokens), *args, **kwargs))

    def _tokens(self, tokens: list[int], *args: Untyped, **kwargs: Untyped) -> Generator[int, Any, None]:
        adapters = _set_of(self)
        changes, sent = adapters.changes, None
        resets = reset_asked(llama_cpp.Llama, args, kwargs)
        if adapters.invocations:
            whole = tokens if resets else [*self.input_ids[: self.n_tokens].tolist(), *tokens]
            rest = self._plan(whole)
            tokens = whole if resets else rest
        steps = super().generate(tokens, *args, **kwargs)
        while True:
            if adapters.changes != changes:
                raise HotSwapError(
                    "the adapter set was changed while tokens were being generated; "
                    "finish the generation first, or start again under the new set"
                )
            adapters.planned = True
            try:
                token = steps.send(sent)
            except StopIteration:
                return
            finally:
                adapters.planned = False
            sent = yield token
            if self._is_full():  # llama-cpp-python asks for more while a character is unfinished
                return

    def _create_completion(self, *args: Untyped, **kwargs: Untyped) -> Iterator[Untyped]:
        return _set_of(self).llama_lock.generate(super()._create_completion(*args, **kwargs))

    def create_chat_completion(self, *args: Untyped, **kwargs: Untyped) -> Untyped:
        """Answer a chat, in the template of the applied adapter if it has one of its own."""
        adapters = _set_of(self)
        own: Untyped = vars(self)["chat_handler"]
        if adapters.chat_handler is None or (own is not None and adapters.template is None):
            return super().create_chat_completion(*args, **kwargs)
        self.chat_handler = adapters.chat_handler
        try:  # the prompt is made before this returns, also of a stream
            return super().create_chat_completion(*args, **kwargs)
        finally:
            self.chat_handler = own

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Any], tuple[type], Any]:
        # Llama pickles the arguments of its constructor, so the copy has no adapters: make it a plain Llama
        return _new, (_class_before(self),), self.__getstate__()


def _new(kind: Untyped) -> Untyped:
    """Return an object of a class before its state is set; pickle refuses ``copyreg.__newobj__`` of a base class."""
    return kind.__new__(kind)


class _ShiftedContext(LlamaContext):  # type: ignore[misc]  # llama_cpp has no types
    """A context that shifts all tokens by ``shift`` positions, to make room for a soft prompt in front."""

    shift = 0

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        start, stop = (position if position < 0 else position + self.shift for position in (p0, p1))
        removed: bool = super().kv_cache_seq_rm(seq_id, start, stop)
        return removed

    def decode(self, batch: Untyped) -> None:
        if self.shift:
            positions = np.ctypeslib.as_array(batch.batch.pos, (batch.n_tokens(),))
            positions += self.shift
        super().decode(batch)


def _ensure_prefix(llm: Untyped, prefix: Prefix) -> None:
    """Put a soft prompt at the beginning of the context, which holds no valid tokens, unless it is there already."""
    if not begins_with(llm.ctx, prefix):
        clear_memory(llm.ctx, llm.n_vocab())
        put_prefix(llm.ctx, prefix)


def _set_of(llm: Untyped) -> AttachedSet:
    adapters: AttachedSet = llm.__dict__[_ATTRIBUTE]
    return adapters


def _class_before(llm: Untyped) -> type:
    before: type = type(llm).__bases__[1]
    return before


_CLASSES: Final[dict[type, type]] = {}


def _guarded(kind: type) -> type:
    """Return a subclass of `GuardedLlama` and ``kind`` (Llama or a subclass), the same for each call."""
    if kind not in _CLASSES:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(kind.__name__, (GuardedLlama, kind), names)
    return _CLASSES[kind]


def attached_set(llm: Untyped) -> AttachedSet | None:
    """Return the adapter set that was last attached to ``llm``; None if there never was one."""
    adapters: AttachedSet | None = llm.__dict__.get(_ATTRIBUTE)
    return adapters


def guard(llm: Untyped, adapters: AttachedSet) -> None:
    """Make ``llm`` reuse only tokens computed under ``adapters``, and free them before its model when it is closed.

    The class of this one Llama becomes a subclass of it. Unlike wrapped methods this also catches ``llm.cache = ...``
    and makes no reference cycle, so that dropping the Llama frees its model at once.
    """
    llm.__dict__[_ATTRIBUTE] = adapters
    llm.__class__ = _guarded(type(llm))
    fit_inputs(llm)
    context, _ = wrappers_of(llm)
    if type(context) is LlamaContext:
        context.__class__ = _ShiftedContext
    call_on_close(llm, adapters.release)


def unguard(llm: Untyped) -> None:
    """Undo `guard` once the adapter set is released. Idempotent."""
    if not isinstance(llm, GuardedLlama):
        return
    adapters, cache = _set_of(llm), llm.__dict__.get("cache")
    llm.__class__ = _class_before(llm)
    if cache is not None and adapters.origin != BASE:  # plain keys belong to the adapter of Llama(lora_path=...)
        llm.cache = CachePartition(cache, BASE, adapters.origin)
