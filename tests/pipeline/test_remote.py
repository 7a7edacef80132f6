"""Pipelines whose inputs and outputs are elsewhere: in memory, on S3's protocol, on the Hub's."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import uuid
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants
from moto.server import ThreadedMotoServer

import gguflora
from gguflora.errors import OutputError, RecipeError, RemoteError
from gguflora.files import remote
from gguflora.files.remote.location import split_checksum
from gguflora.pipeline import job_process, lock
from gguflora.pipeline.recipe import Recipe
from support import ROOT
from support.recipes import add_inputs, statuses
from support.remote_servers import Repository, Site, serving

RECIPE = """
output = "{root}/out"

[sources]
adapters = "{root}/adapters/*"
base = "{root}/base.gguf"

[[steps]]
name = "lora"
action = "convert"
for = {{ adapter = "sources.adapters", base = "sources.base" }}
adapter = "{{adapter}}"
base = "{{base}}"
out = "{{adapter}}-{{base}}.gguf"

[[steps]]
name = "small"
action = "resize"
for = {{ adapter = "sources.adapters" }}
adapter = "{{adapter}}"
rank = 2
out = "peft/{{adapter}}"

[[steps]]
name = "merged"
action = "merge"
for = {{ lora = "steps.lora" }}
base = "{root}/base.gguf"
adapters = [{{ path = "{{lora}}", scale = 0.5 }}]
out = "{{lora}}-merged.gguf"

[[steps]]
name = "report"
action = "inspect"
adapter = "{root}/adapters/one"
out = "one.json"
"""
JOBS = 2 + 2 + 2 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local run of the recipe: what the remote ones must equal."""
    path = add_inputs(tmp_path_factory.mktemp("local"), "one", "two")
    (path / "local.toml").write_text(RECIPE.format(root="."))
    assert gguflora.run_pipeline(path / "local.toml").failed == 0
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bucket():
    """A server of S3's protocol."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("gguflora-tests")
        yield "s3://gguflora-tests"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def root(request, folder):
    """A folder elsewhere with the base and the adapters."""
    root = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else None
    root = root or f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
    store, path = fsspec.core.url_to_fs(root)
    store.put_file(str(folder / "base.gguf"), f"{path}/base.gguf")
    for name in ("one", "two"):
        store.put(f"{folder}/adapters/{name}/", f"{path}/adapters/{name}/", recursive=True)
    return root


def written(path, root, text=RECIPE):
    (path / "recipe.toml").write_text(text.format(root=root))
    return path / "recipe.toml"


def outputs(root):
    """The files of the output folder, by name."""
    store, path = fsspec.core.url_to_fs(f"{root}/out", use_listings_cache=False)
    # the files of .gguflora come and go; s3fs finds the folder itself if its first file comes just now
    names = [name for name in store.find(path) if ".gguflora" not in name and name != path]
    return {name.removeprefix(f"{path}/"): store.cat_file(name) for name in names}


def test_the_same_bytes_as_here_and_kept(root, folder, tmp_path):
    recipe = written(tmp_path, root)
    report = gguflora.run_pipeline(recipe, jobs=2, report=tmp_path / "report")
    assert statuses(report) == ["done"] * JOBS, [result.error for result in report.results]
    found, expected = outputs(root), {
        str(path.relative_to(folder / "out")): path.read_bytes()
        for path in (folder / "out").rglob("*")
        if path.is_file() and ".gguflora" not in path.parts
    }  # fmt: skip
    assert found.keys() == expected.keys()
    differing = {name for name in found if found[name] != expected[name]}
    assert not {name for name in differing if name.endswith("-merged.gguf") or "safetensors" in name}
    assert "one-base-merged.gguf" in (tmp_path / "report/report.html").read_text()
    merged = next(result for result in report.results if result.step == "merged")
    assert merged.report["output"] == merged.out == f"{root}/out/one-base-merged.gguf"
    store, path = fsspec.core.url_to_fs(f"{root}/out/.gguflora", use_listings_cache=False)
    assert not [name for name in store.find(path) if "lock" in name]
    assert not list(Path(tmp_path).rglob("*.part"))
    again = gguflora.run_pipeline(recipe)
    assert statuses(again) == ["kept"] * JOBS
    assert [result.report for result in again.results] == [result.report for result in report.results]


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_only_what_has_changed_there_is_done_again(root, folder, tmp_path):
    recipe = written(tmp_path, root)
    gguflora.run_pipeline(recipe, jobs=2)
    store, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
    store.put_file(
        str(folder / "adapters/two/adapter_model.safetensors"), f"{path}/adapters/one/adapter_model.safetensors"
    )
    store.rm_file(f"{path}/out/two-base.gguf")
    store.rm_file(f"{path}/out/peft/two/adapter_model.safetensors")
    done = {
        result.out.removeprefix(f"{root}/out/")
        for result in gguflora.run_pipeline(recipe).results
        if result.status == "done"
    }
    assert done == {"one-base.gguf", "peft/one", "one-base-merged.gguf", "one.json", "two-base.gguf", "peft/two"}
    assert gguflora.diff(f"{root}/out/peft/one", f"{root}/out/peft/two").cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('base = "{root}/base.gguf"', 'base = "{root}/bass.gguf"', r"recipe.toml:6: sources.base: .*: no such file"),
        ('"{root}/adapters/*"', '"{root}/nothing/*"', r":5: sources.adapters: .*: no such file or directory"),
        ('"{root}/adapters/*"', '"{root}/base.gguf/*"', r":5: sources.adapters: .*: no such file or directory"),
        ('"{root}/adapters/one"', '"{root}/adapters"', r":3\d: steps.4.adapter: .*holds no adapter_config.json"),
        ('"{{lora}}-merged.gguf"', '"../x.gguf"', r"steps.3.out: '../x.gguf' is not in the output folder"),
        ('"{{lora}}-merged.gguf"', '"/x.gguf"', r"steps.3.out: '/x.gguf' is not in the output folder"),
        ('"{{lora}}-merged.gguf"', '".gguflora/x"', r"steps.3.out: '.gguflora/x' is not in the output folder"),
        ('"{{lora}}-merged.gguf"', '"{{lora}}.gguf"', r"steps.3.out: writes .*, but so does step 'lora'"),
        ('"{root}/out"', '"https://host/out"', r":2: output: https://host/out: cannot be written"),
        ('"{root}/out"', '"hf://org/out"', r":2: output: hf://org/out: cannot be written"),
        ('"{root}/out"', '"nonsense://out"', r"recipe.toml:2: output: nonsense://out: .*Protocol not known"),
        ('"{root}/base.gguf"', '"s3://no-such-bucket-of-gguflora/x.gguf"', r"x.gguf: (no such file|.*[Bb]ucket)"),
        ('"{root}/base.gguf"', '"http://127.0.0.1:9/x.gguf"', r"x.gguf: cannot be reached"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_before_anything_runs(bucket, old, new, message, tmp_path, folder):
    root = f"memory://{uuid.uuid4().hex}"
    store, path = fsspec.core.url_to_fs(root)
    store.put_file(str(folder / "base.gguf"), f"{path}/base.gguf")
    store.put(f"{folder}/adapters/", f"{path}/adapters/", recursive=True)
    assert old in RECIPE
    recipe = written(tmp_path, root, RECIPE.replace(old, new, 1 if "out" in old else -1))
    with pytest.raises(RecipeError, match=message):
        gguflora.run_pipeline(recipe)
    assert not store.exists(f"{path}/out")


def test_one_run_at_a_time(root, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    recipe, place = written(tmp_path, root), f"{root}/out/.gguflora/lock"
    with lock.locked(f"{root}/out"):
        first = json.loads(remote.read_bytes(place))
        with pytest.raises(OutputError, match=rf"another pipeline \(process {os.getpid()} on .*\) is writing to it"):
            gguflora.run_pipeline(recipe)
        deadline = time.monotonic() + 20
        while json.loads(remote.read_bytes(place))["time"] == first["time"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(remote.read_bytes(place))["time"] > first["time"]
    assert remote.read_bytes(place) is None


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_pruning_in_a_store_leaves_what_the_pipeline_did_not_make(root, tmp_path):
    recipe = written(tmp_path, root)
    gguflora.run_pipeline(recipe)
    remote.write_bytes(f"{root}/out/peft/one/README.md", b"of the user")
    assert statuses(gguflora.run_pipeline(recipe, resume=False)) == ["done"] * JOBS
    recipe.write_text(recipe.read_text().replace('out = "peft/', 'out = "small/').replace('"one.json"', '"1.json"'))
    report = gguflora.run_pipeline(recipe, prune=True)
    assert set(report.pruned) == {"peft/one", "peft/two", "one.json"}
    found = outputs(root)
    assert {name for name in found if name.startswith(("peft/", "one.json"))} == {"peft/one/README.md"}
    assert {"1.json", "small/one/adapter_config.json", "one-base-merged.gguf"} <= found.keys()


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_only_objects_of_its_own_are_replaced(root, tmp_path):
    """As on disk: an object that no record names stays, unless --force says otherwise."""
    recipe = written(tmp_path, root)
    for name in ("one-base.gguf", "peft/two/notes"):
        remote.write_bytes(f"{root}/out/{name}", b"of the user")
    report = gguflora.run_pipeline(recipe, keep_going=True)
    refused = [result.error for result in report.results if "no record of this pipeline" in (result.error or "")]
    assert [error.partition(":  ")[0].split(": exists")[0] for error in refused] == [
        f"{root}/out/one-base.gguf",
        f"{root}/out/peft/two",
    ]
    assert remote.read_bytes(f"{root}/out/one-base.gguf") == b"of the user"
    assert statuses(gguflora.run_pipeline(recipe, force=True)).count("done") > 0
    assert remote.read_bytes(f"{root}/out/one-base.gguf")[:4] == b"GGUF"
    assert set(statuses(gguflora.run_pipeline(recipe))) == {"kept"}


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_a_dead_run_is_followed_by_one(root):
    place = f"{root}/out/.gguflora/lock"
    dead = {"host": "gone", "process": 7, "token": "dead", "time": time.time() - lock.STALE - 1}
    remote.write_bytes(place, json.dumps(dead).encode())
    with lock.locked(f"{root}/out"):
        assert json.loads(remote.read_bytes(place))["process"] == os.getpid()
    remote.write_bytes(place, json.dumps(dead).encode())
    assert remote.create_bytes(f"{place}-after-dead", b"{}")  # another is about to take over
    with pytest.raises(OutputError, match="another pipeline is taking it over from process 7 on gone"):
        lock.locked(f"{root}/out").__enter__()


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_a_lock_is_taken_over_only_from_who_is_dead(root, monkeypatch):
    """Not when the store cannot say who holds it, nor when somebody else took over in the meantime."""
    place, real = f"{root}/out/.gguflora/lock", remote.read_bytes
    dead = {"host": "gone", "process": 7, "token": "dead", "time": time.time() - lock.STALE - 1}
    alive = {"host": "here", "process": 8, "token": "alive", "time": time.time()}
    remote.write_bytes(place, json.dumps(alive).encode())

    def fail(url):
        raise RemoteError(f"{url}: connection lost")

    monkeypatch.setattr(remote, "read_bytes", fail)
    with pytest.raises(RemoteError, match="connection lost"):
        lock.locked(f"{root}/out").__enter__()
    answers = iter([json.dumps(dead).encode()])  # what it held when this run looked first
    monkeypatch.setattr(remote, "read_bytes", lambda url: next(answers, None) or real(url))
    with pytest.raises(OutputError, match="another pipeline has taken it over from process 7 on gone"):
        lock.locked(f"{root}/out").__enter__()
    monkeypatch.undo()
    assert json.loads(real(place)) == alive
    assert real(f"{place}-after-dead") is None
    for damaged in (b"[]", b"not JSON", b'{"time": "yesterday"}'):
        remote.write_bytes(place, damaged)
        with lock.locked(f"{root}/out"):
            assert json.loads(real(place))["process"] == os.getpid()


@pytest.mark.parametrize("root", ["memory"], indirect=True)
@pytest.mark.parametrize("how", ["taken over", "silent"])
def test_a_run_that_loses_its_lock_stops(root, how, tmp_path, monkeypatch):
    """It writes nothing more, neither outputs nor records, and leaves the folder to the other one."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    place, real, calls = f"{root}/out/.gguflora/lock", job_process.run_command, []
    other = json.dumps({"host": "there", "process": 8, "token": "other", "time": time.time()}).encode()

    def slow(*arguments):
        calls.append(arguments)
        if how == "taken over":
            remote.write_bytes(place, other)
        else:
            monkeypatch.setattr(lock, "STALE", -1.0)
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(job_process, "run_command", slow)
    report = gguflora.run_pipeline(written(tmp_path, root), keep_going=True)
    assert len(calls) == 1
    assert set(statuses(report)) <= {"failed", "left"}
    said = "another pipeline has taken over" if how == "taken over" else "another pipeline may take over"
    assert said in report.results[-1].error
    if how == "taken over":
        assert not outputs(root)
        assert remote.read_bytes(place) == other
    assert not [name for name in remote.stamps_of(f"{root}/out/.gguflora") if name.endswith(".json")]


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_recipes_of_one_name_prune_nothing_of_each_other(root, tmp_path):
    """In one store, from different folders; a recipe that has moved is known by the name that it gives itself."""
    recipes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipes.append(written(tmp_path / name, root))
        text = recipes[-1].read_text()
        recipes[-1].write_text(text.replace('out = "', f'out = "{name}/'))
        assert gguflora.run_pipeline(recipes[-1], prune=True).pruned == ()
    assert {name.partition("/")[0] for name in outputs(root)} == {"a", "b"}
    text = recipes[0].read_text()
    for name, place in (("a", "a"), ("moved", "c")):
        recipes[0].write_text('name = "nightly"\n' + text.replace('out = "a/', f'out = "{place}/'))
        (tmp_path / name).mkdir(exist_ok=True)
        moved = recipes[0].rename(tmp_path / name / "other.toml")
        report = gguflora.run_pipeline(moved, resume=False, prune=True)
        recipes[0] = moved
    assert len(report.pruned) == JOBS
    assert {name.partition("/")[0] for name in outputs(root)} == {"b", "c"}


@pytest.mark.parametrize("root", ["memory"], indirect=True)
def test_an_output_is_whole_or_absent(root, tmp_path, monkeypatch):
    """The store fails during an upload: the step fails, nothing half-written is left, the next run mends it."""
    from fsspec.implementations.memory import MemoryFileSystem

    def fail(self, source, target, **_):
        self.pipe_file(target, b"half")
        raise OSError("connection lost")

    recipe = written(tmp_path, root)
    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    report = gguflora.run_pipeline(recipe, keep_going=True)
    names = ("one-base.gguf", "two-base.gguf", "peft/one", "peft/two", "one.json")
    failed = {result.error for result in report.results if result.status == "failed"}
    assert failed == {f"{root}/out/{name}: connection lost" for name in names}
    assert not outputs(root)
    monkeypatch.undo()
    monkeypatch.setenv("GGUFLORA_CACHE", str(tmp_path / "cache"))
    assert statuses(gguflora.run_pipeline(recipe)) == ["done"] * JOBS


def test_killed_and_resumed_on_s3(bucket, folder, tmp_path, monkeypatch):
    root = f"{bucket}/{uuid.uuid4().hex}"
    text = "[[steps]]".join(RECIPE.split("[[steps]]")[:3])
    text = text.replace("{root}/adapters", f"{folder}/adapters").replace("{root}/base", f"{folder}/base")
    recipe = written(tmp_path, root, text)
    code = "import gguflora, sys; gguflora.run_pipeline(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-P", "-c", code, str(recipe)])
    deadline = time.monotonic() + 60
    while not outputs(root) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    with pytest.raises(OutputError, match="if it was killed, it is taken for dead"):
        gguflora.run_pipeline(recipe)
    monkeypatch.setattr(lock, "STALE", 0.0)
    report = gguflora.run_pipeline(recipe)
    assert report.failed == 0
    assert set(statuses(report)) <= {"done", "kept"}
    assert statuses(gguflora.run_pipeline(recipe)) == ["kept"] * 4


def test_sources_of_the_hub(folder, tmp_path, monkeypatch):
    files = {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("one", "two")
        for path in (folder / "adapters" / name).iterdir()
    }
    site = Site(
        {
            "org/many": {"main": Repository(files)},
            "org/base": {"v1": Repository({"b.gguf": (folder / "base.gguf").read_bytes()})},
        }
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = (
        "[[steps]]".join(RECIPE.split("[[steps]]")[:2])
        .replace("{root}/adapters/*", "hf://org/many/*")
        .replace("{root}/base.gguf", "hf://org/base@v1/b.gguf")
    )
    with serving(site):
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        recipe = written(tmp_path, tmp_path, text)
        report = gguflora.run_pipeline(recipe)
        assert [Path(result.out).name for result in report.results] == ["one-b.gguf", "two-b.gguf"]
        assert statuses(report) == ["done", "done"], report.results
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        site.asked.clear()
        assert statuses(gguflora.run_pipeline(recipe)) == ["kept", "kept"]
        assert not site.asked
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        site.repositories["org/many"]["main"] = Repository(files | {"two/README.md": b"new"})
        assert statuses(gguflora.run_pipeline(recipe)) == ["kept", "kept"]
        changed = files | {"two/adapter_model.safetensors": files["one/adapter_model.safetensors"]}
        site.repositories["org/many"]["main"] = Repository(changed)
        assert statuses(gguflora.run_pipeline(recipe)) == ["kept", "done"]


def test_the_page_about_it():
    """What it shows is a recipe."""
    page = (ROOT / "docs/pipelines.md").read_text()
    recipe, checked = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert [step["name"] for step in recipe_of(recipe)["steps"]] == ["lora", "merged"]
    assert split_checksum(tomllib.loads(checked)["base"])[1]
    for variable in re.findall(r"`(GGUFLORA_\w+)", page):
        assert any(variable in path.read_text() for path in Path(remote.__file__).parent.glob("*.py")), variable


def recipe_of(text):
    content = tomllib.loads(text)
    Recipe.model_validate(content)
    return content


def test_no_credentials(bucket, tmp_path, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for text, line in ((RECIPE, 2), (RECIPE.replace("{root}/out", "out"), 5)):
            with pytest.raises(RecipeError, match=rf"recipe.toml:{line}: .*: no credentials were found for this store"):
                gguflora.run_pipeline(written(tmp_path, bucket, text), dry_run=True)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_is_never_made(bucket, folder, tmp_path):
    text = RECIPE.replace("{root}/out", "s3://no-such-bucket-of-gguflora/out")
    with pytest.raises(OutputError, match="bucket does not exist"):
        gguflora.run_pipeline(written(tmp_path, folder, text))
    assert not fsspec.filesystem("s3").exists("no-such-bucket-of-gguflora")
