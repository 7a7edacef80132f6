"""Assemble the text of an answer from the bytes of its tokens: whole characters, without stop texts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gguflora.engine.requests import Piece, TokenLogprob


class AnswerText:
    """Collects tokens and releases text as soon as it certainly belongs to the answer.

    Args:
        stop: texts that end the answer.

    Attributes:
        stop_text: the stop text that has occurred; None if none has.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text held back because it may be the beginning of a stop text
        self._n_released = 0  # characters released
        self._tokens: list[tuple[int, int, int, TokenLogprob | None]] = []  # token, start, stop (characters), logprob
        self.stop_text: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop text has occurred."""
        return self.stop_text is not None

    def push(self, token: int, piece: bytes, logprob: TokenLogprob | None = None) -> Piece:
        """Add a token and its bytes; return the text that can be released now, which may be empty."""
        start = self._n_released + len(self._held)
        self._held += self._decoder.decode(piece)
        unfinished = bool(self._decoder.getstate()[0])
        self._tokens.append((token, start, self._n_released + len(self._held) + unfinished, logprob))
        matches = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if matches:
            at, self.stop_text = min(matches)
            return self._release_last(at)
        return self._release(len(self._held) - self._possible_stop_length())

    def finish(self) -> Piece:
        """Return the text that was held back, after the last token; a character that is not whole is left out."""
        if self.stopped:
            return Piece("")
        text, tokens, self._held, self._tokens = self._held, self._tokens, "", []
        return _piece(text, tokens)

    def _possible_stop_length(self) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of a stop text."""
        longest = min(max((len(text) for text in self._stop), default=1) - 1, len(self._held))
        return next(
            (n for n in range(longest, 0, -1) if any(text.startswith(self._held[-n:]) for text in self._stop)), 0
        )

    def _release(self, n_chars: int) -> Piece:
        text, self._held = self._held[:n_chars], self._held[n_chars:]
        self._n_released += n_chars
        ended = [entry for entry in self._tokens if entry[2] <= self._n_released]
        self._tokens = self._tokens[len(ended) :]
        return _piece(text, ended)

    def _release_last(self, n_chars: int) -> Piece:
        """Return the last piece, with the tokens that only partly belong to the answer, too."""
        stop = self._n_released + n_chars
        started = [entry for entry in self._tokens if entry[1] < stop or entry[2] <= stop]
        self._tokens = []
        return _piece(self._held[:n_chars], started)


def _piece(text: str, entries: list[tuple[int, int, int, TokenLogprob | None]]) -> Piece:
    return Piece(
        text,
        tuple(entry[0] for entry in entries),
        tuple(entry[3] for entry in entries if entry[3] is not None),
    )
