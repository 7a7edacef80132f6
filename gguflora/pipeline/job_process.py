"""Jobs: `run_job` a request here. As a program, do those on stdin, so that nothing they do can take others down.

A request is a JSON object: ``action`` (a command), ``arguments`` (its keywords) and ``out`` (where its output goes); in
all of them a path is a location, local or remote. The answer has the command's ``report``, or an ``error``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, NoReturn

from gguflora.errors import GgufloraError
from gguflora.files import remote
from gguflora.pipeline.commands import commands
from gguflora.pipeline.state import write_json

_REPORTING: Final = {"inspect", "compare"}
"""Actions that write nothing but their report."""


def run_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job: remote inputs are fetched into the cache, the output is put into its place when it is whole."""
    try:
        return {"report": _run(request["action"], dict(request["arguments"]), request["out"])}
    except GgufloraError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "not enough memory"}
    except OSError as error:
        return {"error": f"{error.filename}: {error.strerror}" if error.filename else str(error)}


def _run(action: str, arguments: dict[str, Any], out: str) -> dict[str, Any]:
    if not remote.is_remote(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        return run_command(action, arguments, Path(out))
    with tempfile.TemporaryDirectory(prefix="gguflora-") as folder:
        report = run_command(action, arguments, Path(folder) / remote.file_name(out))
        for made in sorted(Path(folder).iterdir(), reverse=True):  # of a split model the first file last
            remote.put(made, remote.join(out.rpartition("/")[0], made.name))
    return report | ({"output": out} if "output" in report else {})


def run_command(action: str, arguments: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run one command; returns its report, ready for JSON.

    Raises:
        GgufloraError: as the command does.
    """
    command = commands()[action]
    if "adapters" in arguments:
        arguments["adapters"] = [tuple(item) for item in arguments["adapters"]]
    if action not in _REPORTING:
        report: dict[str, Any] = command(**arguments, out=out, force=True).to_dict()
        return report
    report = command(**arguments).to_dict()
    write_json(out, report)
    return report


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Do the jobs on stdin until there are no more."""
    signal.signal(signal.SIGTERM, _stop)  # so that a terminated job removes its temporary files
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between
    requests: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(requests,), daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            print(json.dumps(run_job(json.loads(requests.get()))), file=answers, flush=True)


def _read(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os.kill(os.getpid(), signal.SIGTERM)  # who asked is gone: stop what is running


if __name__ == "__main__":
    main()
