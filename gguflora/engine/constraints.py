"""What the next token may be, by a grammar: llama.cpp's GBNF, or Lark and JSON schemas by llguidance."""

from __future__ import annotations

import ctypes
import re
from typing import TYPE_CHECKING, Any, Final, Protocol

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gguflora.engine.requests import Grammar
from gguflora.errors import RequestError

if TYPE_CHECKING:
    from gguflora.engine.model import Model

CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""``llama_token_data``."""


_MAX_DEPTH: Final = 200
_QUOTED: Final = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
"""Texts, classes and comments of GBNF."""


class Constraint(Protocol):
    """The state of one answer in its grammar."""

    def apply(self, array: Any, candidates: NDArray[Any]) -> None:  # noqa: ANN401  (llama_cpp has no types)
        """Set the logits of tokens that are not allowed now to minus infinity.

        Args:
            array: the ``llama_token_data_array``.
            candidates: its data (n_vocab,) of `CANDIDATE`, by token.
        """

    def accept(self, token: int) -> None:
        """Go on by a token, which `apply` has allowed."""

    def close(self) -> None:
        """Free it. Idempotent."""


def constraint(grammar: Grammar, model: Model) -> Constraint:
    """Make the constraint of one answer.

    Raises:
        RequestError: if the grammar cannot be read.
        MissingExtraError: if llguidance is needed and not installed.
    """
    return GbnfConstraint(grammar, model) if grammar.kind == "gbnf" else GuidanceConstraint(grammar, model)


class GbnfConstraint:
    """llama.cpp's grammar sampler. It has no bound on its time: grammars of strangers are for llguidance."""

    def __init__(self, grammar: Grammar, model: Model) -> None:
        self._sampler: Any = None
        if _depth(grammar.text) > _MAX_DEPTH:
            raise RequestError(f"grammar: its parentheses are nested more than {_MAX_DEPTH} deep")
        text, root = grammar.text.encode(), b"root"
        if grammar.triggers:
            patterns = (ctypes.c_char_p * len(grammar.triggers))(*(pattern.encode() for pattern in grammar.triggers))
            self._sampler = llama_cpp.llama_sampler_init_grammar_lazy_patterns(
                model.vocabulary, text, root, patterns, len(patterns), None, 0
            )
        else:
            self._sampler = llama_cpp.llama_sampler_init_grammar(model.vocabulary, text, root)
        if not self._sampler:
            raise RequestError(f"grammar: llama.cpp cannot read this grammar: {grammar.text[:80]!r}")

    def apply(self, array: Any, candidates: NDArray[Any]) -> None:  # noqa: ANN401
        """Let llama.cpp set the logits."""
        del candidates
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Tell llama.cpp the token."""
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the sampler."""
        sampler, self._sampler = self._sampler, None
        if sampler:
            llama_cpp.llama_sampler_free(sampler)

    def __del__(self) -> None:
        self.close()


class GuidanceConstraint:
    """A matcher of llguidance, which begins at once or at a trigger."""

    def __init__(self, grammar: Grammar, model: Model) -> None:
        self._model = model
        self._tokenizer = model.guidance  # raises MissingExtraError
        import llguidance  # noqa: PLC0415  (in the extra ``server``)

        self._matcher = llguidance.LLMatcher(self._tokenizer, grammar.text, log_level=0)
        if self._matcher.is_error():
            raise RequestError(f"grammar: {first_line(self._matcher.get_error())}")
        self._triggers = [re.compile(pattern) for pattern in grammar.triggers]
        self._free = b""
        """The answer before the trigger."""

    def apply(self, array: Any, candidates: NDArray[Any]) -> None:  # noqa: ANN401
        """Set the logits by the matcher's mask."""
        del array
        if self._triggers:
            return
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=len(candidates), bitorder="little")
        candidates["logit"][allowed == 0] = -np.inf
        self._check()

    def accept(self, token: int) -> None:
        """Tell the matcher the token, or look for a trigger in the answer so far."""
        if not self._triggers:
            self._matcher.consume_token(token)
            self._check()
            return
        self._free += self._model.piece(token, True)
        text = self._free.decode(errors="ignore")
        found = [match for pattern in self._triggers if (match := pattern.search(text))]
        if found:
            self._triggers = []
            rest = text[found[0].start(1) :]
            self._matcher.consume_tokens(self._tokenizer.tokenize_str(rest, parse_special=True))
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"grammar: {first_line(self._matcher.get_error())}")

    def close(self) -> None:
        """Do nothing: Python frees the matcher."""


def _depth(gbnf: str) -> int:
    """Return how deep parentheses are nested; llama.cpp reads them by recursion."""
    depth = deepest = 0
    for bracket in re.findall(r"[()]", _QUOTED.sub("", gbnf)):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def first_line(message: str) -> str:
    """Return the first line of an error of llguidance, which may go on with the whole grammar."""
    return message.strip().split("\n", 1)[0][:300]
