"""A limit of the thoughts that a model writes before its answer: after it, they are ended with their closing tag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_TAIL: Final = 128
"""Bytes of thoughts that are kept, in which the closing tag is looked for; no tag is as long."""


@dataclass(frozen=True, slots=True)
class ThoughtLimit:
    """How long the thoughts of one answer may be.

    Attributes:
        tokens: largest number of tokens between the tags.
        opening: the tag that begins the thoughts.
        closing: the tag that ends them.
        ending: the tokens of ``closing``.
        is_open: whether the prompt has opened the first tag already.
    """

    tokens: int
    opening: str
    closing: str
    ending: tuple[int, ...]
    is_open: bool = False


class ThoughtWatch:
    """Counts the tokens of one answer's thoughts and ends them at their limit.

    As in llama.cpp's ``common/reasoning-budget.cpp``, a character that is not whole is finished first; so is a closing
    tag that has begun.
    """

    def __init__(self, limit: ThoughtLimit) -> None:
        self._left = limit.tokens
        self._opening, self._closing = limit.opening.encode(), limit.closing.encode()
        self._ending = limit.ending
        self._is_open = limit.is_open
        self._text = b""
        self._is_over = False
        self._forced: list[int] = []
        if self._is_open:
            self._check_limit()

    def forced(self) -> int | None:
        """Return the token that must come next; None if the model may choose."""
        return self._forced.pop(0) if self._forced else None

    def accept(self, piece: bytes) -> None:
        """Read the bytes of the answer's next token, with the spelling of a control token."""
        if self._is_over:
            return
        self._text = (self._text + piece)[-_TAIL:]
        if self._is_open:
            self._left -= 1
            self._check_limit()
            return
        start = self._text.lstrip()
        if start.startswith(self._opening):
            self._is_open, self._text = True, start[len(self._opening) :]
            self._check_limit()
        elif not self._opening.startswith(start):
            self._is_over = True  # an answer without thoughts

    def _check_limit(self) -> None:
        if self._closing in self._text:
            self._is_over = True
        elif self._left <= 0 and not _is_cut(self._text) and not _ends_with_start(self._text, self._closing):
            self._forced, self._is_over = list(self._ending), True


def _is_cut(text: bytes) -> bool:
    """Return whether a text ends inside of a character of UTF-8."""
    for back, byte in enumerate(reversed(text[-4:]), 1):
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


def _ends_with_start(text: bytes, mark: bytes) -> bool:
    return any(text.endswith(mark[:length]) for length in range(1, len(mark)))
