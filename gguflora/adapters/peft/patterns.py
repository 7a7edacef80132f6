"""The patterns of an ``adapter_config.json`` for names of modules: many plain names, seldom regular expressions."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from gguflora.system.regexes import REGEXES

SECONDS: Final = 10.0
"""Time that all expressions of one configuration may take."""

_PLAIN: Final = re.compile(r"[\w.-]+", re.ASCII)


def is_plain(pattern: object) -> bool:
    """Whether a pattern is the name of a module or the end of one, and no expression with more than a dot."""
    return _PLAIN.fullmatch(str(pattern)) is not None


class Matcher:
    """Matches the expressions of one configuration, which all together may take `SECONDS`."""

    def __init__(self) -> None:
        self._left = SECONDS

    def match(self, pattern: str, module: str) -> Sequence[str | None] | None:
        """Match an expression at the beginning of a module's name; return the match and its groups.

        Raises:
            re.error: if it is no regular expression.
            TimeoutError: if no time is left.
        """
        if self._left <= 0:
            raise TimeoutError
        REGEXES.start(pattern)
        begun = time.monotonic()
        try:
            return REGEXES.match(pattern, module, self._left)
        except re.error as error:
            raise re.error(f"{error}: {pattern:.200}") from error
        finally:
            self._left -= time.monotonic() - begun


class ModulePatterns:
    r"""Patterns that PEFT tries as ``(.*\.)?(PATTERN)$`` on the name of a module.

    There can be one for each expert of each layer, so plain names are found by their length and what follows their last
    dot. A dot in them stands for any character, as in PEFT.

    Args:
        patterns: values by pattern.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._items = list(patterns.items())
        self._plain: dict[tuple[int, str], list[int]] = defaultdict(list)
        self._tails: dict[int, set[int]] = defaultdict(set)
        self._expressions: list[int] = []
        for number, (pattern, _) in enumerate(self._items):
            if is_plain(pattern):
                tail = pattern.rpartition(".")[2]
                self._plain[len(pattern), tail].append(number)
                self._tails[len(pattern)].add(len(tail))
            else:
                self._expressions.append(number)

    def matching(self, module: str, matcher: Matcher) -> Iterator[tuple[str, Any]]:
        """Yield the patterns that match a module, with their values, in the order of the file.

        Raises:
            re.error: if a pattern is no regular expression.
            TimeoutError: if no time is left.
        """
        numbers = list(self._plain_matches(module))
        for number in self._expressions:
            if matcher.match(rf"(.*\.)?({self._items[number][0]})$", module):
                numbers.append(number)
        yield from (self._items[number] for number in sorted(numbers))

    def _plain_matches(self, module: str) -> Iterator[int]:
        starts = [0, *(found.end() for found in re.finditer(r"\.", module))]
        for end in (module[start:] for start in starts):
            for size in self._tails.get(len(end), ()):
                for number in self._plain.get((len(end), end[len(end) - size :]), ()):
                    if _fits(self._items[number][0], end):
                        yield number


def _fits(pattern: str, text: str) -> bool:
    """Whether a plain name of the same length as a text matches it."""
    return pattern == text or all(a in {".", b} for a, b in zip(pattern, text, strict=True))
