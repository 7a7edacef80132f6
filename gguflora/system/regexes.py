"""Match regular expressions of strangers with a limit of time: some take longer than the universe has existed.

Python's ``re`` tries all ways to match, holds Python's lock meanwhile, and cannot be stopped by another thread. So
expressions that can have many ways are matched in a process of their own, which is ended when it takes too long.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from gguflora.system.pipes import PipeReader
from gguflora.system.processes import call_in_forks

_START_SECONDS: Final = 30.0
_BRANCHES: Final = re.compile(r"[*+?{|]")
"""What gives an expression more than one way to match a text."""
_SCRIPT: Final = """
import json, re, signal, sys
print(flush=True)
for line in sys.stdin:
    pattern, text, seconds = json.loads(line)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends this process, even if the other one is gone
    try:
        found = re.match(pattern, text)
        answer = None if found is None else [found[0], *found.groups()]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        answer = str(error) or type(error).__name__
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(answer), flush=True)
"""


class RegexProcess:
    """Matches regular expressions in a process that is started when it is needed and used again. Thread-safe."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Use no process of before: after a fork it belongs to the other process."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: PipeReader | None = None

    def match(self, pattern: str, text: str, seconds: float) -> Sequence[str | None] | None:
        """Match an expression at the beginning of a text, as ``re.match`` does.

        Returns:
            What it matches and its groups; None if it does not match.

        Raises:
            re.error: if it is no regular expression.
            TimeoutError: if it takes longer than ``seconds``, or the process dies.
        """
        if not _BRANCHES.search(pattern):
            found = re.match(pattern, text)
            return None if found is None else (found[0], *found.groups())
        self.start(pattern)
        with self._lock:
            try:
                answer = self._ask(pattern, text, seconds)
            except (TimeoutError, OSError, EOFError) as error:
                self._end()
                raise TimeoutError from error
            except BaseException:
                self._end()
                raise
        if isinstance(answer, str):
            raise re.error(answer)
        return answer

    def start(self, pattern: str) -> None:
        """Start the process if a pattern needs it, which takes some time of its own."""
        with self._lock:
            if self._process is not None or not _BRANCHES.search(pattern):
                return
            command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
            self._process = subprocess.Popen(  # noqa: S603  (a text of this module)
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
            assert self._process.stdout is not None
            self._answers = PipeReader(self._process.stdout)
            self._line(_START_SECONDS)

    def _ask(self, pattern: str, text: str, seconds: float) -> list[str | None] | str | None:
        if self._process is None or self._process.stdin is None:
            raise EOFError
        rest = memoryview(json.dumps([pattern, text, seconds]).encode() + b"\n")
        while rest:
            rest = rest[self._process.stdin.write(rest) :]
        answer: list[str | None] | str | None = json.loads(self._line(seconds + 1))
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._answers is not None
        end, received = time.monotonic() + seconds, b""
        while not received.endswith(b"\n"):
            part = self._answers.read(end - time.monotonic())
            if not part:
                raise EOFError
            received += part
        return received

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._answers is not None:
            self._answers.close()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


REGEXES: Final = RegexProcess()
"""Of this process."""

atexit.register(REGEXES.close)
call_in_forks(REGEXES.forget)
