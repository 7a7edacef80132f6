"""Find the lines of keys in a TOML file, which Python's parser does not tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

Keys = tuple[str | int, ...]
"""The way to a value: names of keys, and numbers from 0 in arrays."""

_TOKEN: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|\n|[\[\]{},=.]|[^\s\[\]{},=."\'#]+',
    re.DOTALL,
)


def line_of(text: str, keys: Sequence[str | int]) -> int:
    """Return the line (from 1) of a key, or of the innermost table around it that has one.

    Args:
        text: a TOML file without mistakes.
        keys: the way to the value.
    """
    lines = _Lines(text).found
    way = tuple(keys)
    return next((lines[way[:length]] for length in range(len(way), 0, -1) if way[:length] in lines), 1)


class _Lines:
    """Reads a file that `tomllib` has accepted, so that mistakes need no messages."""

    def __init__(self, text: str) -> None:
        self.found: dict[Keys, int] = {}
        self._tokens, self._at = list(_tokens(text)), 0
        self._counts: dict[Keys, int] = {}
        table: Keys = ()
        while self._skip_lines():
            if self._text() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _text(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _next(self) -> tuple[str, int]:
        self._at += 1
        return self._tokens[self._at - 1] if self._at <= len(self._tokens) else ("", 0)

    def _skip_lines(self) -> bool:
        while self._text() == "\n":
            self._at += 1
        return bool(self._text())

    def _header(self) -> Keys:
        line = self._next()[1]
        is_array = self._text() == "["
        self._at += is_array
        *outer, last = self._names("]")
        self._at += is_array
        table: Keys = ()
        for name in outer:
            table = (*table, name)
            if table in self._counts:
                table = (*table, self._counts[table] - 1)
        table = (*table, last)
        self.found.setdefault(table, line)
        if is_array:
            self._counts[table] = self._counts.get(table, 0) + 1
            table = (*table, self._counts[table] - 1)
            self.found[table] = line
        return table

    def _names(self, end: str) -> list[str]:
        names = []
        while (word := self._next()[0]) not in {end, ""}:
            if word != ".":
                names.append(word[1:-1] if word[0] in "\"'" else word)
        return names

    def _pair(self, table: Keys) -> None:
        line = self._tokens[self._at][1]
        for name in self._names("="):
            table = (*table, name)
            self.found.setdefault(table, line)
        self._value(table)

    def _value(self, keys: Keys) -> None:
        opened = self._text()
        if opened not in {"[", "{"}:
            while self._text() not in {"", "\n", ",", "]", "}"}:
                self._at += 1
            return
        self._at += 1
        number = 0
        while self._skip_lines() and self._text() not in {"]", "}"}:
            if self._text() == ",":
                self._at, number = self._at + 1, number + 1
            elif opened == "{":
                self._pair(keys)
            else:
                self.found[*keys, number] = self._tokens[self._at][1]
                self._value((*keys, number))
        self._at += 1


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Yield the tokens of a file, without comments, and the line of each."""
    line, at = 1, 0
    for found in _TOKEN.finditer(text):
        line += text.count("\n", at, found.start())
        at = found.start()
        if not found[0].startswith("#"):
            yield found[0], line
