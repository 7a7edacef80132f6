"""A pytest plugin: in continuous integration a test may be skipped only for a reason that is listed.

`tests/allowed_skips.txt` lists them, one a line: ``test id | reason | why``, where ``*`` stands for anything in the
first two. A skip that no line allows ends the run with an error. Elsewhere (``CI`` unset) nothing is checked.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import ROOT

LIST = ROOT / "tests/allowed_skips.txt"


@dataclass(frozen=True)
class Allowed:
    """One line of the list."""

    test: str
    reason: str
    why: str

    def covers(self, test: str, reason: str) -> bool:
        """Whether it allows this skip."""
        return _matches(self.test, test) and _matches(self.reason, reason)


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text, flags=re.DOTALL) is not None


def read_list(path: Path) -> list[Allowed]:
    """The lines of a list.

    Raises:
        ValueError: for a line that has not three parts.
    """
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(" | ")]
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{path}, line {number}: expected `test id | reason | why`, found {line!r}")
        allowed.append(Allowed(*parts))
    return allowed


class SkipsAreListed:
    """Collects the skips of a run, and fails it if one is not on the list."""

    def __init__(self, allowed: list[Allowed]) -> None:
        self.allowed = allowed
        self.unlisted: dict[str, str] = {}

    def _check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = text.removeprefix("Skipped: ")
        if not any(line.covers(report.nodeid, reason) for line in self.allowed):
            self.unlisted[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test."""
        self._check(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file."""
        self._check(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """End a run with an error that has succeeded otherwise."""
        if self.unlisted and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which skips they were."""
        if self.unlisted:
            terminalreporter.section(f"skips that {LIST.name} does not list", red=True)
            for test, reason in self.unlisted.items():
                terminalreporter.line(f"{test}: {reason}")


def in_continuous_integration() -> bool:
    """Whether this is a run of continuous integration, which sets ``CI``."""
    return os.environ.get("CI", "").lower() not in {"", "0", "false"}


def pytest_configure(config: pytest.Config) -> None:
    """Check skips in continuous integration."""
    if in_continuous_integration():
        config.pluginmanager.register(SkipsAreListed(read_list(LIST)))
