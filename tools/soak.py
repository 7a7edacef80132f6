"""A server under good and hostile clients at once: ``python -m tools.soak --help``.

Every good answer is compared with the one that the same request gets alone. At the end the server must be the same
process, hold the memory, files and threads that it held after warming up, and have kept /health waiting for no more
than `SILENT` seconds of its own. Its memory must be level: from the second third of the time on it may not grow.
"""

from __future__ import annotations

import http.client
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import typer

from tools import fuzz_http, soak_requests
from tools.watch_health import Silences, watching

SILENT: Final = 0.2
"""Seconds of its own for which the server may keep /health waiting."""
GROWTH: Final = 64 << 20
"""Bytes by which the server alone may have grown since it was warm; its processes for templates have a limit each."""
LEVEL: Final = 16 << 20
"""Bytes by which the server alone may grow from the second third of the time to the last sixth."""
_SETTLE: Final = 15.0
"""Seconds after the clients have gone; the server gives freed memory back within 10 (`server/freed_memory.py`)."""
_EVERY: Final = 2.0
_HOSTILE: Final = 0.5
"""Share of hostile requests."""
_LOADED: Final = ("shout", "verse")

app = typer.Typer(add_completion=False)


@dataclass
class Report:
    """What a soak has seen.

    Attributes:
        good: good answers by kind.
        hostile: hostile requests by kind.
        retried: good requests that were sent again because the queue was full.
        found: what was wrong.
        warm: memory, open files and threads of the server when it was warm.
        end: the same at the end.
        seconds: time of the clients.
        silences: how long /health was not answered.
        memory: bytes of the server without its processes for templates, every `_EVERY` seconds of the clients' time.
    """

    good: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    found: list[str] = field(default_factory=list)
    warm: fuzz_http.Usage = field(default_factory=fuzz_http.Usage)
    end: fuzz_http.Usage = field(default_factory=fuzz_http.Usage)
    seconds: float = 0.0
    silences: Silences = field(default_factory=Silences)
    memory: list[int] = field(default_factory=list)

    def growth(self) -> int:
        """Return by how many bytes the server has grown from the second third of the time to the last sixth."""
        sixth = len(self.memory) // 6
        if not sixth:
            return 0
        return int(statistics.median(self.memory[-sixth:]) - statistics.median(self.memory[2 * sixth : 4 * sixth]))

    def lines(self) -> list[str]:
        """Return a summary."""
        hostile = ", ".join(f"{count} {kind}" for kind, count in sorted(self.hostile.items()))
        good = ", ".join(f"{count} {kind}" for kind, count in sorted(self.good.items()))
        seen = self.silences
        return [
            f"{self.seconds:.0f} s: {self.good.total()} good answers ({good}), {self.retried} of them asked again",
            f"{self.hostile.total()} hostile requests ({hostile})",
            f"/health: asked {seen.asked} times, at most {seen.longest:.2f} s, of its own {seen.longest_own:.2f} s",
            f"memory {self.warm.memory >> 20} -> {self.end.memory >> 20} MB, open files {self.warm.files} -> "
            f"{self.end.files}, threads {self.warm.threads} -> {self.end.threads}",
            f"MB of the server alone in each tenth of the time: {self._tenths()}; growth {self.growth() >> 20} MB",
            f"{len(self.found)} findings",
        ]

    def _tenths(self) -> str:
        size = max(len(self.memory) // 10, 1)
        parts = [self.memory[start : start + size] for start in range(0, len(self.memory), size)]
        return ", ".join(str(int(statistics.median(part)) >> 20) for part in parts)


class Soak:
    """Clients at work.

    Args:
        server: the server.
        clients: number of clients.
        seed: seed of the random numbers.
    """

    def __init__(self, server: fuzz_http.Server, clients: int, seed: int) -> None:
        self._server, self._clients = server, clients
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self.report = Report()
        self._good = soak_requests.good_requests(server.port)
        self._described = server.description()
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            del self._described["paths"][path]

    def run(self, seconds: float) -> fuzz_http.Usage:
        """Let all clients work for some time, and return what the server holds when they have gone."""
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._client, args=(number, random.Random(self._dice.random()), end))
            for number in range(self._clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(_SETTLE)
        return self._server.usage()

    def _client(self, number: int, dice: random.Random, end: float) -> None:
        hostile = soak_requests.Hostile(self._server, self._described, _LOADED, number, dice)
        kinds = hostile.kinds()
        try:
            while time.monotonic() < end:
                if dice.random() < _HOSTILE:
                    kind = dice.choice(list(kinds))
                    self._note(self.report.hostile, kind, kinds[kind]())
                else:
                    self._ask(dice.choice(self._good), end)
        except Exception as error:  # the server is gone, or this tool is wrong
            self._note(Counter(), "", f"client {number}: {error!r}")
        finally:
            hostile.close()

    def _ask(self, good: soak_requests.Good, end: float) -> None:
        answer = soak_requests.ask(self._server.port, good.path, good.body)
        while answer.status == http.client.TOO_MANY_REQUESTS and time.monotonic() < end:
            with self._lock:
                self.report.retried += 1
            time.sleep(0.2)
            answer = soak_requests.ask(self._server.port, good.path, good.body)
        if answer.status != http.client.TOO_MANY_REQUESTS:
            fault = good.fault(answer)
            self._note(self.report.good, good.kind, fault and f"{good.kind} {good.body}: {fault}")

    def _note(self, counter: Counter[str], kind: str, fault: str | None) -> None:
        with self._lock:
            counter[kind] += 1
            if fault and fault not in self.report.found:
                self.report.found.append(fault)


def soak(server: fuzz_http.Server, seconds: float, warm: float, clients: int, seed: int) -> Report:
    """Soak a server.

    Args:
        server: one in a process of its own, with `soak_requests.TEMPLATE` and a directory to load from.
        seconds: time of the clients.
        warm: time of the clients before, until the server has grown to what it needs.
        clients: number of clients.
        seed: seed of the random numbers.
    """
    work = Soak(server, clients, seed)
    work.report.warm = work.run(warm)
    assert server.pid is not None
    report, begun = work.report, time.monotonic()
    with watching(server.port, server.pid) as report.silences, _sampling(server, report.memory):
        report.end = work.run(seconds)
    report.seconds = time.monotonic() - begun - _SETTLE
    del report.memory[int(report.seconds / _EVERY) :]
    report.found += _faults(report)
    return report


@contextmanager
def _sampling(server: fuzz_http.Server, memory: list[int]) -> Iterator[None]:
    """Note the memory of the server alone every `_EVERY` seconds."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY):
            memory.append(server.usage().own)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _faults(report: Report) -> list[str]:
    """Return what a whole soak has shown beside single answers."""
    found = [f"/health: {text}" for text in report.silences.lost]
    if report.silences.longest_own > SILENT:
        found.append(f"/health was silent for {report.silences.longest_own:.2f} s of the server's own")
    if report.end.own > report.warm.own + GROWTH:
        found.append(f"the server has grown by {report.end.own - report.warm.own >> 20} MB")
    if report.growth() > LEVEL:
        found.append(f"memory is not level: {report.growth() >> 20} MB more at the end than in the second third")
    pipes = 2 * (report.end.processes - report.warm.processes)  # there are up to four, started when they are needed
    if report.end.files > report.warm.files + max(pipes, 0) + 4:
        found.append(f"open files: {report.warm.files} when warm, {report.end.files} at the end")
    if not report.end.threads:
        found.append("the server is gone")
    return found


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long the clients work.")] = 30,
    warm: Annotated[float, typer.Option(help="Minutes before, in which the server grows to what it needs.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of the server's model.")] = 1,
) -> None:
    """Mix good requests of every API with hostile ones, and compare every good answer."""
    from gguflora.diagnostics import demo  # noqa: PLC0415  (loads numpy)

    with tempfile.TemporaryDirectory(prefix="gguflora-soak-") as folder:
        template, loadable = Path(folder) / "template.jinja", Path(folder) / "loadable"
        template.write_text(soak_requests.TEMPLATE, encoding="utf-8")
        soak_requests.write_loadable(loadable, demo.HERE, _LOADED)
        options = (f"--chat-template-file={template}", f"--allow-load={loadable}", f"--threads={threads}")
        with fuzz_http.command(*options, "--ctx-size=2048", "--timeout=300") as server:
            report = soak(server, minutes * 60, warm * 60, clients, seed)
    report.found += filter(None, [server.said])
    for line in (*report.found, *report.lines()):
        typer.echo(line)
    raise typer.Exit(bool(report.found))


if __name__ == "__main__":
    app()
