"""When jobs start: as far as memory goes, which is asked for as jobs end and while they run."""

import threading

import pytest

from gguflora.pipeline import local_workers, runner
from gguflora.pipeline.local_workers import Workers
from gguflora.system.memory import available_memory
from support.recipes import SMALL, add_inputs, run_recipe, statuses

GB = 1 << 30
RECIPE = f"{SMALL}memory = 1000\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.05)
    return add_inputs(tmp_path, "one", "two", "three")


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A machine of 64 GB whose control group leaves what the files say, read by the code that reads real ones."""
    root = tmp_path / "machine"
    files = {
        "proc/meminfo": f"MemTotal: {64 * GB >> 10} kB\nMemAvailable: {48 * GB >> 10} kB\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/memory.max": f"{4 * GB}\n",
        "sys/fs/cgroup/memory.current": f"{4 * GB - 1500 * 2**20}\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    monkeypatch.setattr(local_workers, "available_memory", lambda: available_memory(root))
    return root / "sys/fs/cgroup"


class Watched:
    """Stands for `Workers.run`: notes which jobs run together, and holds the first one until others have begun."""

    def __init__(self, monkeypatch, others):
        self.running, self.most, self.began = 0, 0, threading.Semaphore(0)
        self.lock, self.others, self.calls = threading.Lock(), others, 0
        real = Workers.run
        monkeypatch.setattr(Workers, "run", lambda workers, request: self.run(real, workers, request))

    def run(self, real, workers, request):
        with self.lock:
            self.running, self.calls = self.running + 1, self.calls + 1
            self.most, is_first = max(self.most, self.running), self.calls == 1
        if is_first:
            self.on_first()
            for _ in range(self.others):
                assert self.began.acquire(timeout=60)
        else:
            self.began.release()
        answer = real(workers, request)
        with self.lock:
            self.running -= 1
        return answer

    def on_first(self):
        """What happens as soon as the first job runs."""


def test_a_job_starts_when_memory_becomes_free_while_others_run(folder, group, monkeypatch):
    watched = Watched(monkeypatch, others=2)
    alone = []

    def free():
        alone.append(watched.calls)
        (group / "memory.current").write_text("0\n")

    watched.on_first = lambda: threading.Timer(0.5, free).start()
    assert statuses(run_recipe(folder, RECIPE, jobs=3)) == ["done"] * 3
    assert alone == [1]  # there was room for one until then
    assert watched.most == 3


class Process:
    """Stands for the process of a worker."""

    process_id = 1

    def end(self):
        """Nothing is to be done."""

    terminate = wait = close = end


@pytest.mark.parametrize(
    ("held", "claim", "expected"),
    [(200, 1000, 300), (5000, 1000, 1100), (5000, None, 5100)],  # in a job, in one beyond its claim, between two
)
def test_what_jobs_hold_counts_up_to_their_claims(held, claim, expected, monkeypatch):
    monkeypatch.setattr(local_workers, "available_memory", lambda: 100 << 20)
    monkeypatch.setattr(local_workers, "held_memory", lambda _: held << 20)
    workers, process = Workers(2), Process()
    workers._all.add(process)
    if claim is not None:
        workers._claims[process] = claim << 20
    assert workers.memory == expected
    assert Workers(2, memory=7).memory == 7
