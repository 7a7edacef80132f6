"""The command line, in this process or in one of its own."""

import contextlib
import io
import subprocess
import sys
import warnings
from unittest import mock

import gguflora.cli


def run(*arguments):
    """The command line in this process, which has everything loaded; warnings go where a process would print them."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with (
        mock.patch("sys.argv", ["gguflora", *words]),
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            gguflora.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    printed = "".join(f"{warning.message}\n" for warning in caught)
    return subprocess.CompletedProcess(words, code, out.getvalue(), printed + err.getvalue())


def run_process(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-P", "-m", "gguflora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
