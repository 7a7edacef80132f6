"""The text of an answer from the bytes of its tokens: whole characters only, and nothing of a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gguflora.engine.requests import Piece, TokenLogprob


class AnswerText:
    """Collects tokens and gives out what is sure to belong to the answer.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text not given out: it may be the beginning of a stop text
        self._given = 0  # characters given out
        self._tokens: list[tuple[int, int, int, TokenLogprob | None]] = []  # token, first and last character, logprob
        self.stopped = False

    def push(self, token: int, piece: bytes, logprob: TokenLogprob | None = None) -> Piece:
        """Add a token; what can be given out now, perhaps nothing."""
        begin = self._given + len(self._held)
        self._held += self._decoder.decode(piece)
        unfinished = bool(self._decoder.getstate()[0])
        self._tokens.append((token, begin, self._given + len(self._held) + unfinished, logprob))
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        return self._give(len(self._held) - self._doubtful())

    def finish(self) -> Piece:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return Piece("")
        self._held += self._decoder.decode(b"", final=True)
        return self._cut(len(self._held))

    def _doubtful(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        longest = min(max((len(text) for text in self._stop), default=1) - 1, len(self._held))
        return next(
            (n for n in range(longest, 0, -1) if any(text.startswith(self._held[-n:]) for text in self._stop)), 0
        )

    def _give(self, n_chars: int) -> Piece:
        text, self._held = self._held[:n_chars], self._held[n_chars:]
        self._given += n_chars
        ended = [entry for entry in self._tokens if entry[2] <= self._given]
        self._tokens = self._tokens[len(ended) :]
        return _piece(text, ended)

    def _cut(self, n_chars: int) -> Piece:
        """The last piece: also tokens of which only a part is given out."""
        end = self._given + n_chars
        started = [entry for entry in self._tokens if entry[1] < end or entry[2] <= end]
        self._tokens = []
        return _piece(self._held[:n_chars], started)


def _piece(text: str, entries: list[tuple[int, int, int, TokenLogprob | None]]) -> Piece:
    return Piece(
        text,
        tuple(entry[0] for entry in entries),
        tuple(entry[3] for entry in entries if entry[3] is not None),
    )
