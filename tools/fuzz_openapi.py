"""Send schemathesis' requests to a server, made from its OpenAPI description: ``python -m tools.fuzz openapi``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gguflora.files.strict_json import to_json
from tools.fuzz_http import Server

_CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "501", "503", "504"]
"""
"""Of the errors of a server only these may be told: what is not installed, ends, or takes too long."""


def fuzz(server: Server, seconds: float, seed: int, examples: int | None = None) -> tuple[int, list[str]]:
    """Let schemathesis send requests for some time.

    Args:
        server: the server.
        seconds: how long to go on.
        seed: seed of the random numbers.
        examples: requests of each operation, in place of ``seconds``.

    Returns:
        The number of requests, and what was found: statuses of 500, and connections that broke or hung.

    Raises:
        RuntimeError: if schemathesis could not begin.
    """
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or "schemathesis"
    with tempfile.TemporaryDirectory(prefix="gguflora-schemathesis-") as folder:
        Path(folder, "schemathesis.toml").write_text(_CONFIG, encoding="utf-8")
        report = Path(folder, "report.json")
        limits = ["--phases=coverage,fuzzing", f"--max-time={max(seconds, 1):.0f}"]
        if examples is not None:
            limits = ["--phases=fuzzing", f"--max-examples={examples}"]
        command = [
            program, "run", f"http://127.0.0.1:{server.port}/openapi.json", f"--seed={seed}", *limits,
            "--checks=not_a_server_error", "--request-timeout=60", "--generation-database=none", "--no-color",
            "--report=json", f"--report-json-path={report}",
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"schemathesis did not begin: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        said = json.loads(report.read_text(encoding="utf-8"))
    found = [to_json(item)[:2000] for key in ("failures", "errors") for item in said[key]]
    return said["test_cases"]["generated"], found
