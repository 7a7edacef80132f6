"""Recipes on a Dask cluster of real processes: the same bytes as at home, whoever is killed in the middle."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import pytest

import gguflora
from gguflora.errors import ClusterError
from gguflora.pipeline import dask_client, dask_worker
from support import builders
from support.builders import Adapter
from support.dask_cluster import PACKAGE, Cluster, is_alive, wait_for
from support.recipes import outputs, statuses

RECIPE = """
output = "out"
[[steps]]
name = "small"
action = "resize"
for = { adapter = ["one", "two"] }
adapter = "{adapter}"
rank = 2
memory = 600
out = "{adapter}-r2"

[[steps]]
name = "lora"
action = "convert"
for = { adapter = "steps.small" }
adapter = "{adapter}"
base = "base.gguf"
memory = 5000
out = "{adapter}.gguf"

[[steps]]
name = "merged"
action = "merge"
base = "base.gguf"
adapters = ["one", { path = "out/two-r2", scale = 0.5 }]
split = 3
out = "merged.gguf"
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    with contextlib.closing(Cluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workers(scheduler):
    start_worker(scheduler)
    start_worker(scheduler)
    return scheduler


@pytest.fixture
def cluster(workers):
    """With two workers of two threads that live, and an open gate."""
    workers.open_gate()
    while sum(worker.poll() is None for worker in workers.workers) < 2:
        start_worker(workers)
    with client_of(workers) as client:
        client.wait_for_workers(2)
    return workers


def client_of(cluster):
    return distributed.Client(cluster.address, set_as_default=False)


def start_worker(cluster, **options):
    return cluster.start_worker("--resources", "memory_mb=1000", **options)


def recipe_in(folder, *names):
    """The recipe, or some of its steps, and what it needs."""
    shutil.copyfile(builders.gguf_model("llama", "wide", "Q4_K_M"), folder / "base.gguf")
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(builders.adapter("llama", Adapter(seed=seed), "wide"), folder / name)
    head, *steps = RECIPE.split("[[steps]]")
    chosen = [step for step in steps if not names or step.split('"')[1] in names]
    (folder / "recipe.toml").write_text("[[steps]]".join([head, *chosen]))
    return folder / "recipe.toml"


def contents(folder):
    return {name: (folder / name).read_bytes() for name in outputs(folder) if name.startswith("out/")}


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """What a run on this machine makes."""
    folder = tmp_path_factory.mktemp("home")
    assert set(statuses(gguflora.run_pipeline(recipe_in(folder)))) == {"done"}
    return contents(folder)


@contextlib.contextmanager
def running(recipe, cluster, **options):
    """A run in the background, from when its first jobs are at the closed gate; opens it at the end."""
    cluster.close_gate()
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(gguflora.run_pipeline, recipe, scheduler=cluster.address, **options)
        try:
            wait_for(cluster.held)
            yield report
        finally:
            cluster.open_gate()


def assert_done(report, count=5):
    """All the jobs are, or it shows why not."""
    assert statuses(report) == ["done"] * count, [result.error for result in report.results]


def litter(folder):
    return [path for path in folder.rglob("*") if path.suffix in {".part", ".partial"}]


def refused(match, recipe, address):
    with pytest.raises(ClusterError, match=match):
        gguflora.run_pipeline(recipe, scheduler=address)
    assert not outputs(recipe.parent / "out")


def test_no_scheduler_and_no_workers(scheduler, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path, "small")
    monkeypatch.setattr(dask_client, "_TIMEOUT", 0.5)
    refused("tcp://127.0.0.1:9: no Dask scheduler can be reached", recipe, "tcp://127.0.0.1:9")
    refused("tpc://127.0.0.1:9: no Dask scheduler can be reached", recipe, "tpc://127.0.0.1:9")
    monkeypatch.setattr(dask_client, "_TIMEOUT", 5)
    refused("the scheduler has no workers", recipe, scheduler.address)


def test_failed_connections_are_closed(tmp_path, monkeypatch):
    """An open one closes when it is collected, which may be while the next one begins: the two would wait for ever."""
    recipe = recipe_in(tmp_path, "small")
    monkeypatch.setattr(dask_client, "_TIMEOUT", 0.5)
    before = io_loops()
    for address in ("tcp://127.0.0.1:9", "tpc://127.0.0.1:9", "tcp://127.0.0.1:port", "tls://127.0.0.1:9"):
        refused(f"{address}: no Dask scheduler can be reached", recipe, address)
        assert io_loops() <= before


def io_loops():
    return {thread for thread in threading.enumerate() if thread.name == "IO loop"}


def test_without_dask_it_says_what_to_install(tmp_path):
    code = (
        "import importlib.util as u, sys, gguflora.pipeline; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'distributed' else find(name, *more)\n"
        "try: gguflora.run_pipeline(sys.argv[1], scheduler='tcp://x')\n"
        "except gguflora.GgufloraError as error: print(error)"
    )
    command = [sys.executable, "-P", "-c", code, str(recipe_in(tmp_path, "small"))]
    assert "gguflora[distributed]" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_same_bytes_as_at_home(cluster, at_home, tmp_path):
    recipe = recipe_in(tmp_path)
    report = gguflora.run_pipeline(recipe, scheduler=cluster.address)
    assert_done(report)
    assert contents(tmp_path) == at_home
    assert report.results[-1].report["total"]["sv"] > 0.9
    assert not litter(tmp_path)
    assert set(statuses(gguflora.run_pipeline(recipe))) == {"kept"}  # here, too, and without the parts


def test_the_same_twice(cluster, at_home, tmp_path):
    """Jobs that differ only in the folder of their output are two."""
    recipe = recipe_in(tmp_path, "small")
    head, step = recipe.read_text().split("[[steps]]")
    again = step.replace('"small"', '"again"').replace('out = "', 'out = "again/')
    recipe.write_text("[[steps]]".join([head, step, again]))
    assert statuses(gguflora.run_pipeline(recipe, scheduler=cluster.address)) == ["done"] * 4
    for name, content in contents(tmp_path).items():
        assert content == at_home[name.replace("again/", "")]
    assert len(contents(tmp_path)) == 8


def test_store_of_fsspec(cluster, at_home, tmp_path):
    """Workers and client meet in a store that is no folder; the parts of the merge, too."""
    recipe = recipe_in(tmp_path)
    there = f"local://{tmp_path}/out"
    recipe.write_text(
        recipe.read_text().replace('output = "out"', f'output = "{there}"').replace("out/two", f"{there}/two")
    )
    report = gguflora.run_pipeline(recipe, scheduler=cluster.address)
    assert_done(report)
    assert report.results[-1].out == f"{there}/merged.gguf"
    assert contents(tmp_path) == at_home
    assert not litter(tmp_path)


@pytest.mark.parametrize(
    ("victim", "how"), [("worker", signal.SIGKILL), ("worker", signal.SIGTERM), ("job", signal.SIGKILL)]
)
def test_killed_in_the_middle(victim, how, cluster, at_home, tmp_path):
    """A worker with its job, or a job alone: done again by somebody, and what was half done is gone."""
    with running(recipe_in(tmp_path), cluster, jobs=1) as report:
        job, worker = next(iter(cluster.held().items()))
        os.kill(worker if victim == "worker" else job, how)
        wait_for(lambda: not is_alive(job))
        if victim == "worker":
            wait_for(lambda: not is_alive(worker))
        else:
            assert is_alive(worker)
        wait_for(lambda: cluster.held().keys() - {job})
    assert_done(report.result())
    assert contents(tmp_path) == at_home
    assert not litter(tmp_path)


def test_worker_killed_in_a_part_of_a_merge(cluster, at_home, tmp_path):
    recipe = recipe_in(tmp_path, "merged")
    recipe.write_text(recipe.read_text().replace("out/two-r2", "two-r2"))
    gguflora.resize(tmp_path / "two", tmp_path / "two-r2", rank=2)
    with running(recipe, cluster) as report:
        wait_for(lambda: len(cluster.held()) == 2)
        job, worker = next(iter(cluster.held().items()))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not is_alive(job))
    assert_done(report.result(), 1)
    assert contents(tmp_path)["out/merged.gguf"] == at_home["out/merged.gguf"]
    assert not litter(tmp_path)


def test_memory_that_workers_declare(cluster, tmp_path):
    """Of jobs of 600 MB one at a time is done by a worker with 1000 MB and two threads."""
    recipe = recipe_in(tmp_path, "small")
    for name in ("three", "four"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    recipe.write_text(recipe.read_text().replace('"one", "two"', '"one", "two", "three", "four"'))
    with running(recipe, cluster) as report:
        wait_for(lambda: len(cluster.held()) == 2)
        time.sleep(0.5)
        assert len(cluster.held()) == len(set(cluster.held().values())) == 2
    assert_done(report.result(), 4)


def test_a_failure_takes_nothing_else_down(cluster, tmp_path):
    recipe = recipe_in(tmp_path)
    weights = tmp_path / "one/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    report = gguflora.run_pipeline(recipe, scheduler=cluster.address, keep_going=True)
    found = {result.out.name: result for result in report.results}
    assert {name: result.status for name, result in found.items()} == {
        "one-r2": "failed", "two-r2": "done", "one-r2.gguf": "left", "two-r2.gguf": "done", "merged.gguf": "failed",
    }  # fmt: skip
    for name in ("one-r2", "merged.gguf"):
        assert str(weights) in found[name].error
    assert not litter(tmp_path)


def test_interrupted(cluster, tmp_path):
    """Ctrl+C at the client: jobs are stopped where they run, and nothing of them is left."""
    cluster.close_gate()
    command = [sys.executable, "-P", "-m", "gguflora", "pipeline", recipe_in(tmp_path), "--scheduler", cluster.address]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    jobs = wait_for(cluster.held)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    wait_for(lambda: not any(map(is_alive, jobs)))
    assert not outputs(tmp_path / "out")
    with client_of(cluster) as client:
        assert not any(client.processing().values())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Packages: gguflora of another version, and one that is so old that it does not know Dask."""
    folder = tmp_path_factory.mktemp("others")
    for name, kept in (("other", lambda name: name != "_version.py"), ("old", lambda name: name == "__init__.py")):
        (folder / name / "gguflora").mkdir(parents=True)
        for path in filter(lambda path: kept(path.name), PACKAGE.iterdir()):
            (folder / name / "gguflora" / path.name).symlink_to(path)
        (folder / name / "gguflora" / "_version.py").write_text('__version__ = "0.0.1"\n')
    return folder


@pytest.mark.parametrize(
    ("other", "said"), [("other", "has gguflora 0.0.1, expected"), ("old", f"has no gguflora {gguflora.__version__}")]
)
def test_worker_with_another_version(other, said, cluster, others, tmp_path):
    worker = start_worker(cluster, path=[others / other])
    try:
        with client_of(cluster) as client:
            client.wait_for_workers(3)
        refused(f"tcp://.*: {said}", recipe_in(tmp_path, "small"), cluster.address)
    finally:
        worker.kill()
        worker.wait()


def test_client_with_another_version_than_a_worker_that_came_later(cluster):
    with client_of(cluster) as client:
        assert "expected 0.0.2" in client.submit(dask_worker.run_job, {"version": "0.0.2"}).result()["error"]


def test_workers_that_do_not_share_the_folder(cluster, tmp_path, monkeypatch):
    """Under /proc/self/cwd every process sees its own folder."""
    recipe_in(tmp_path, "small")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match="does not see /proc/self/cwd as this machine does"):
        dask_client.DaskBackend(cluster.address, max_concurrency=1, memory=None, store=Path("/proc/self/cwd"))


def test_scheduler_that_dies(cluster, tmp_path):
    """The last test: there is no cluster after it."""
    with running(recipe_in(tmp_path), cluster) as report:
        cluster.scheduler.kill()
        assert {result.status for result in report.result(60).results} == {"failed", "left"}


def test_a_cluster_that_starts_workers_when_there_is_work(at_home, tmp_path):
    """It has none at first; tasks are submitted beyond the workers that there are, so that it grows."""
    recipe = recipe_in(tmp_path)
    with distributed.LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as cluster:
        cluster.adapt(minimum=0, maximum=2, interval="200ms", wait_count=20)
        assert_done(gguflora.run_pipeline(recipe, scheduler=cluster))
        assert contents(tmp_path) == at_home
        with distributed.Client(cluster, set_as_default=False) as client:
            assert set(statuses(gguflora.run_pipeline(recipe, scheduler=client, resume=False))) == {"done"}
            assert client.status == "running"  # it is the caller's


def test_jobs_share_the_memory_of_a_worker():
    running, most = [], []

    def work(memory):
        with dask_worker._claim(memory, 1000, lambda: False):
            running.append(memory)
            most.append(sum(running))
            time.sleep(0.02)
            running.remove(memory)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [400, 300, 600, 5000, 100, 400, 600, 200]))
    assert max(total for total in most if total != 5000) <= 1000
    assert 5000 in most
    assert any(total > 600 for total in most if total != 5000)
