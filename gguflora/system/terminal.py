"""Text from files, names and models on its way to a terminal or a log, where control characters would act."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from textwrap import indent
from typing import Final

_ACTIVE: Final = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""ASCII's and Latin 1's control characters, separators of lines, and those that override the direction of writing."""


@lru_cache(maxsize=8)
def _pattern(keep: str) -> re.Pattern[str]:
    return re.compile(rf"(?![{re.escape(keep)}])[{_ACTIVE}]" if keep else f"[{_ACTIVE}]")


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Return ``text`` with control characters spelled out (``\x1b``), so that a terminal shows them and does not act.

    Lone surrogates, which stand for bytes of file names that are not UTF-8, are spelled out too.

    Args:
        text: any text.
        keep: control characters that stay as they are; nothing stays in a log, where each message is one line.
    """
    shown = _pattern(keep).sub(_spell, text)
    return shown.encode("utf-8", errors="backslashreplace").decode() if not shown.isascii() else shown


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class LogFormatter(logging.Formatter):
    """Formats a record as one line that no text in it can forge; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Return the line, without the traceback."""
        return printable(super().formatMessage(record), keep="\t")

    def formatException(self, ei: object) -> str:  # noqa: N802
        """Return the traceback, indented, so that no line of it looks like a record."""
        return indent(printable(super().formatException(ei)), "    ", lambda _: True)  # type: ignore[arg-type]
