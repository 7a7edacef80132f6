"""Standard output that never ends a command: its reader may go, its disk may be full, its encoding may be small."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any


class _PatientFile(io.FileIO):
    """A file descriptor to which writing never fails. After an error the rest goes to /dev/null.

    Attributes:
        problem: the error, unless it is only that the reader has gone, such as ``head -1``.
    """

    problem: OSError | None = None

    def write(self, content: Any) -> int:  # noqa: ANN401  (any buffer)
        try:
            return super().write(content) or 0
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.problem = error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return memoryview(content).nbytes


def protect_streams() -> None:
    """Let the standard streams of this process swallow errors, and escape what their encoding lacks."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
            continue
        with suppress(OSError, AttributeError, ValueError):  # not a stream of the system, as in tests
            if stream.fileno() != descriptor:
                continue
            stream.flush()
            raw = _PatientFile(descriptor, "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
            )
            setattr(sys, name, text)


def problem_of_stdout() -> OSError | None:
    """Write what is buffered, and return the error if not everything could be written."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _PatientFile) else None
