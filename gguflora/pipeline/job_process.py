"""Run jobs: `run_job` runs one in this process; as a program, this module runs the jobs that it reads from stdin.

Separate processes keep a crash of one job from ending others. A request is a JSON object: ``action`` (a command),
``arguments`` (its keyword arguments) and ``out`` (the location of its output). An output of the recipe also has
``target`` (the keyword that names it), ``drafts`` (a folder to make it in), ``checks`` (limits of numbers in the
report), ``aside`` (where to put it if it fails them), ``permit`` (location and token of the run's lock, which the run
must still hold when the output takes its place), ``replace`` (whether it may replace what is there) and ``claim`` (see
`publish`). Locations are paths or URLs. The answer is that of `run_job`.
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
from gguflora.files.strict_json import to_json
from gguflora.pipeline.checks import Bounds, failed_checks
from gguflora.pipeline.commands import commands
from gguflora.pipeline.locations import to_location
from gguflora.pipeline.lock import is_held
from gguflora.pipeline.publish import publish
from gguflora.pipeline.state import write_json
from gguflora.system.processes import terminate_self

_REPORTING: Final = {"inspect", "compare"}
"""Actions whose only output is their report."""


def run_job(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job. Remote inputs are fetched into the cache; the output appears at its location only when complete.

    Returns:
        The command's ``report`` and the names of the ``files`` of its output, or an ``error``. If the report fails a
        check, also what ``failed``; the output is then where ``aside`` says, and the output location stays as it was.
    """
    try:
        return _run(request)
    except GgufloraError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "not enough memory"}
    except OSError as error:
        return {"error": f"{error.filename}: {error.strerror}" if error.filename else str(error)}


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    action, arguments, out = request["action"], dict(request["arguments"]), request["out"]
    is_remote = remote.is_remote(out)
    if "drafts" not in request and not is_remote:
        return {"report": run_command(action, arguments, Path(out))}
    if not is_remote:
        Path(request["drafts"]).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gguflora-", dir=None if is_remote else request["drafts"]) as folder:
        draft = Path(folder) / remote.file_name(out)
        try:
            report = run_command(action, arguments, draft, request.get("target", "out"))
        except GgufloraError as error:  # the name of the draft says nothing to the user
            return {"error": str(error).replace(folder, os.path.dirname(out))}  # noqa: PTH120  (may be a URL)
        failed = failed_checks(report, {path: Bounds(*limits) for path, limits in request.get("checks", {}).items()})
        place = request["aside"] if failed else out
        files = sorted(file.name for file in (draft if draft.is_dir() else Path(folder)).iterdir())
        if "permit" in request and not is_held(to_location(request["permit"][0]), request["permit"][1]):
            return {"error": "interrupted: the run that wanted this output has ended, or has lost its output folder"}
        if is_remote:
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the first file of a split model last
                remote.put(file, remote.join(place.rpartition("/")[0], file.name))
        else:
            is_ours = bool(failed) or request.get("replace", True)
            claim = None if failed or "claim" not in request else Path(request["claim"])
            publish(Path(folder), Path(place).parent, force=is_ours, claim=claim)
        shown = _placed(report, folder, os.path.dirname(place))  # noqa: PTH120  (may be a URL)
        answer = {"report": shown, "files": files}
        return {**answer, "failed": failed, "aside": place} if failed else answer


def _placed(value: Any, folder: str, place: str) -> Any:  # noqa: ANN401  (JSON)
    """Return a report in which paths in the folder of drafts have become those of the output."""
    if isinstance(value, Mapping):
        return {key: _placed(item, folder, place) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_placed(item, folder, place) for item in value]
    return value.replace(folder, place) if isinstance(value, str) and folder in value else value


def run_command(action: str, arguments: dict[str, Any], out: Path, target: str = "out") -> dict[str, Any]:
    """Run one command and return its report, ready for JSON.

    Args:
        action: name of the command.
        arguments: its keyword arguments, except for the output.
        out: path of the output.
        target: the keyword that names it.

    Raises:
        GgufloraError: if the command raises it.
    """
    command = commands()[action]
    if "adapters" in arguments:
        arguments["adapters"] = [tuple(item) for item in arguments["adapters"]]
    if action not in _REPORTING:
        report: dict[str, Any] = command(**arguments, **{target: out}, force=True).to_dict()
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
            print(to_json(run_job(json.loads(requests.get()))), file=answers, flush=True)


def _read(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    terminate_self()  # the parent process is gone: stop the running job


if __name__ == "__main__":
    main()
