"""Run jobs: `run_job` runs one in this process; as a program, this module runs the jobs that it reads from stdin.

Separate processes keep a crash of one job from ending others. A request is a JSON object: ``action`` (a command),
``arguments`` (its keyword arguments) and ``out`` (the location of its output). Locations are paths or URLs. The answer
has the command's ``report`` or an ``error``.
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
"""Actions whose only output is their report."""


def run_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job. Remote inputs are fetched into the cache; the output appears at its location only when complete."""
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
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the first file of a split model last
            remote.put(file, remote.join(out.rpartition("/")[0], file.name))
    return report | ({"output": out} if "output" in report else {})


def run_command(action: str, arguments: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run one command and return its report, ready for JSON.

    Raises:
        GgufloraError: if the command raises it.
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
    """Run the jobs on stdin until it is closed."""
    signal.signal(signal.SIGTERM, _stop)  # so that a terminated job removes its temporary files
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print to stdout, which is for answers only
    requests: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(requests,), daemon=True).start()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        while True:
            print(json.dumps(run_job(json.loads(requests.get()))), file=answers, flush=True)


def _read(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os.kill(os.getpid(), signal.SIGTERM)  # the parent process is gone: stop the running job


if __name__ == "__main__":
    main()
