"""The examples for other tools that run workflows, run by these tools as they stand."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

import gguflora
from gguflora.diagnostics import demo
from support import ROOT
from support.dask_cluster import Cluster
from support.pages import put_commands, put_demo_files
from tools.fetch_workflows import programs_dir

EXAMPLES = ROOT / "examples"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Here, the demo's model and adapters as the examples expect them, and ``gguflora`` and ``python`` on the path."""
    put_demo_files(tmp_path)
    for name in demo.ADAPTERS:
        shutil.move(tmp_path / name, tmp_path / "adapters" / name)
    monkeypatch.setenv("PATH", f"{put_commands(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROGRAMS = programs_dir()  # before the tests' home


def tool(name, *arguments):
    """What a program of another tool prints."""
    if not (PROGRAMS / name).exists():
        pytest.skip(f"no {name}; `python -m tools.fetch_workflows` installs it")
    done = subprocess.run([PROGRAMS / name, *arguments], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def edit(folder, name):
    """Change an adapter's alpha."""
    path = folder / "adapters" / name / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))


def assert_merged(folder, out, name):
    gguflora.merge(folder / "base.gguf", folder / "adapters" / name, folder / "expected.gguf", force=True)
    assert out.read_bytes() == (folder / "expected.gguf").read_bytes()


def test_snakemake(folder):
    command = ["snakemake", "--snakefile", EXAMPLES / "Snakefile", "--cores", "2"]
    tool(*command)
    for name in demo.ADAPTERS:
        assert_merged(folder, folder / "out/merged" / f"{name}.gguf", name)
        lora = gguflora.convert(f"adapters/{name}", "base.gguf", "expected-lora.gguf", force=True).output
        assert (folder / "out/lora" / f"{name}.gguf").read_bytes() == lora.read_bytes()
        assert json.loads((folder / "out/merged" / f"{name}.json").read_text())["total"]["retention"] > 0.9
    (folder / "adapters/verse/README.md").write_text("which nothing reads")
    assert "Nothing to be done" in tool(*command)
    edit(folder, "verse")
    said = tool(*command)
    assert "verse" in said
    assert "adapters/shout" not in said
    assert_merged(folder, folder / "out/merged/verse.gguf", "verse")


def test_dvc(folder):
    shutil.copy(EXAMPLES / "dvc.yaml", folder)
    (folder / "out").mkdir()
    tool("dvc", "init", "--no-scm", "--quiet")
    tool(
        "dvc", "config", "cache.type", "symlink"
    )  # links in the outputs' places, which DVC removes before it runs a stage
    tool("dvc", "repro")
    for name in ("shout", "verse"):
        assert (folder / "out" / f"{name}.gguf").is_symlink()
        assert_merged(folder, folder / "out" / f"{name}.gguf", name)
    assert "up to date" in tool("dvc", "repro")
    edit(folder, "verse")
    said = tool("dvc", "repro")
    assert "Stage 'merge@shout' didn't change" in said
    assert "Running stage 'merge@verse'" in said
    assert_merged(folder, folder / "out/verse.gguf", "verse")
    assert "total.retention" in tool("dvc", "metrics", "show")


def python(program, *arguments):
    script = f"python {shlex.quote(str(EXAMPLES / program))} {shlex.join(arguments)}"
    done = subprocess.run(["bash", "-ec", script], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_joblib(folder):
    lines = python("joblib_merges.py", "base.gguf", "adapters", "out")
    assert len(lines) == len(demo.ADAPTERS)
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*.gguf")}
    for name in demo.ADAPTERS:
        assert_merged(folder, folder / "out" / f"{name}.gguf", name)
    edit(folder, "verse")
    again = python("joblib_merges.py", "base.gguf", "adapters", "out")
    changed = {path.stem for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"verse"}
    assert_merged(folder, folder / "out/verse.gguf", "verse")
    assert [line for line in again if "verse" not in line] == [line for line in lines if "verse" not in line]


@pytest.mark.parametrize("on_cluster", [False, True])
def test_process_pool(folder, on_cluster, tmp_path_factory):
    """With ProcessPoolExecutor, and on a Dask cluster."""
    arguments = ["base.gguf", "adapters", "out"]
    if not on_cluster:
        lines = python("process_pool.py", *arguments)
    else:
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
        try:
            cluster.start_worker()
            lines = python("process_pool.py", *arguments, cluster.address)
        finally:
            cluster.close()
    assert len(lines) == 2 * len(demo.ADAPTERS)
    merged = gguflora.merge("base.gguf", [("adapters/verse", 0.5)], "verse.gguf").output
    assert (folder / "out/verse-x0.5.gguf").read_bytes() == merged.read_bytes()
