"""Inputs from elsewhere: the Hub's protocol, web servers and other stores, sound and broken."""

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import huggingface_hub.constants
import llama_cpp
import numpy as np
import pytest

import gguflora
from gguflora.errors import GgufloraError, OutputError, RemoteError
from gguflora.files import remote
from gguflora.files.remote import outputs
from support import builders
from support.builders import Adapter
from support.cli import run
from support.oracles.gguf_files import read_tensors
from support.remote_servers import Repository, Site, serving

SIZE = 2_000_000
BYTES = np.random.default_rng(0).bytes(SIZE)
SHA = hashlib.sha256(BYTES).hexdigest()


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def adapters():
    return [builders.adapter("llama", Adapter(targets=("q_proj", "down_proj"), seed=seed)) for seed in (0, 1)]


@pytest.fixture
def site(tmp_path, monkeypatch, adapters):
    base = builders.gguf_model("llama")
    first, second = (files_of(adapter) for adapter in adapters)
    others = {"adapter_model.bin": BYTES, "optimizer.pt": BYTES, "README.md": b"# legal", "sub/x.safetensors": BYTES}
    site = Site(
        repositories={
            "org/legal": {"main": Repository(first | others), "v2": Repository(second)},
            "org/models": {"main": Repository({"base.gguf": base.read_bytes(), "a/b/big.gguf": BYTES})},
        },
        files={"big.bin": BYTES, **{f"legal/{name}": content for name, content in first.items()}},
    )
    with serving(site):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("GGUFLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("gguflora.files.remote.download.time.sleep", lambda _: None)
        yield site


def cached(tmp_path):
    """Names of all whole files in both caches."""
    found = [path for path in tmp_path.rglob("*") if path.is_file() and not {"checksums", "refs"} & {*path.parts}]
    return {path.name for path in found if path.name[0] != "." and path.suffix not in {".part", ".TAG", ".lock"}}


# the Hub


def test_a_command_takes_hub_ids(site, adapters, tmp_path):
    report = gguflora.convert("hf://org/legal", "hf://org/models/base.gguf", tmp_path / "remote.gguf")
    gguflora.convert(adapters[0], builders.gguf_model("llama"), tmp_path / "local.gguf")

    expected, found = read_tensors(tmp_path / "local.gguf"), read_tensors(tmp_path / "remote.gguf")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert report.adapter == "legal"
    fetched = {path.rpartition("/")[2] for method, path, _ in site.asked if method == "GET" and "resolve" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "base.gguf"}
    site.asked.clear()
    gguflora.convert("hf://org/legal", "hf://org/models/base.gguf", tmp_path / "again.gguf")
    assert not [path for method, path, _ in site.asked if method == "GET" and "resolve" in path]


def test_revisions_and_paths(site):
    main, other = remote.fetch("hf://org/legal", "adapter"), remote.fetch("hf://org/legal@v2", "adapter")
    weights = "adapter_model.safetensors"
    assert (main / weights).read_bytes() != (other / weights).read_bytes()
    commit = site.repositories["org/legal"]["v2"].commit
    same = remote.fetch(f"hf://org/legal@{commit}", "adapter")
    assert (same / weights).read_bytes() == (other / weights).read_bytes()
    assert remote.fetch("hf://org/models/a/b/big.gguf").read_bytes() == BYTES
    assert remote.list_matching("hf://org/legal/*.safetensors") == [f"hf://org/legal/{weights}"]
    assert remote.list_matching("hf://org/models@main/a/*") == ["hf://org/models@main/a/b"]


def test_offline(site, monkeypatch, tmp_path):
    before = remote.fetch("hf://org/legal", "adapter")
    remote.fetch(f"{site.url}/big.bin")
    look = remote.stat("hf://org/legal", "adapter")
    monkeypatch.setenv("GGUFLORA_OFFLINE", "1")
    site.asked.clear()
    assert remote.fetch("hf://org/legal", "adapter") == before
    assert remote.stat("hf://org/legal", "adapter") == look
    assert remote.fetch(f"{site.url}/big.bin").read_bytes() == BYTES
    for missing in ("hf://org/models/base.gguf", "hf://org/legal@v2", f"{site.url}/legal/"):
        with pytest.raises(RemoteError, match="was not fetched before, and GGUFLORA_OFFLINE forbids"):
            remote.fetch(missing, "adapter")
    assert not site.asked


@pytest.mark.parametrize("place", ["hf://org/models/a/b/big.gguf", "{url}/big.bin"])
def test_a_download_that_is_cut_short_goes_on(site, place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # what is lost with a connection
    site.cut = {"/big.gguf": (700_000, 2), "/big.bin": (700_000, 2)}
    assert remote.fetch(place.format(url=site.url)).read_bytes() == BYTES
    spans = site.bodies("/big.gguf") + site.bodies("/big.bin")
    starts = [int(span.removeprefix("bytes=").rstrip("-")) if span else 0 for span in spans]
    assert starts[0] == 0
    assert 100_000 < starts[1] <= 700_000
    assert starts[1] + 100_000 < starts[2] <= 1_400_000
    assert len(starts) == 3


def test_the_next_process_goes_on(site, tmp_path):
    site.cut = {"/big.bin": (900_000, 1)}
    code = """
import sys, gguflora.files.remote.download as d
d._ATTEMPTS = 1
from gguflora.files import remote
remote.fetch(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, f"{site.url}/big.bin"], capture_output=True, text=True, check=False
    )
    assert "ended after" in done.stderr or "ClientPayload" in done.stderr
    assert "big.bin" not in cached(tmp_path)
    assert remote.fetch(f"{site.url}/big.bin").read_bytes() == BYTES
    first, second = site.bodies("/big.bin")
    assert first is None
    assert int(second.removeprefix("bytes=").rstrip("-")) > 100_000


@pytest.mark.parametrize("place", ["hf://org/models/a/b/big.gguf", "{url}/big.bin#sha256=" + SHA])
def test_damage_on_the_way(site, place, tmp_path):
    damaged = BYTES[:-1] + bytes([BYTES[-1] ^ 1])
    site.headers = {"/big.gguf": {"ETag": f'"{SHA}"', "X-Linked-Etag": f'"{SHA}"'}}
    site.files["big.bin"] = site.repositories["org/models"]["main"].files["a/b/big.gguf"] = damaged
    with pytest.raises(RemoteError, match=f"its SHA-256 is [0-9a-f]*, expected {SHA}"):
        remote.fetch(place.format(url=site.url))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= SIZE]
    site.files["big.bin"] = site.repositories["org/models"]["main"].files["a/b/big.gguf"] = BYTES
    assert remote.fetch(place.format(url=site.url)).read_bytes() == BYTES


@pytest.mark.parametrize("place", ["hf://org/models/a/b/big.gguf", "{url}/big.bin"])
def test_damage_in_the_cache(site, place):
    path = remote.fetch(place.format(url=site.url))
    path.write_bytes(BYTES[:-1] + b"?")
    assert remote.fetch(place.format(url=site.url)).read_bytes() == BYTES


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hf://org/nothing", "no such repository, or it is private"),
        ("hf://org/legal@v9", "the repository has no such revision"),
        ("hf://org/models/nothing.gguf", "no such file or folder"),
        ("hf://org/models", r"holds no adapter_config.json; name the .gguf file that is meant; found: base.gguf"),
        ("hf://legal", "expected hf://org/name"),
        ("hf://org/legal/../../x", "expected hf://org/name"),
        ("hf://org/traversal", r"'\.\.' is not a valid file name"),
        ("hf://org/pickle", r"only .bin files, which are pickles; GGUFLORA_ALLOW_PICKLE=1"),
        ("{url}/nothing", r"no such file \(HTTP 404\)|no such file or folder"),
        ("{url}/round", "redirects without end"),
        ("hf://org/models/round.gguf", "redirects without end"),
        ("hf://org/failing", r"the server failed \(HTTP 500\)"),
        ("{url}/secret?key=swordfish", r"secret: not authorized; .* \(HTTP 401\)"),
        ("{url}/failing", r"the server failed \(HTTP 500\)"),
        ("http://127.0.0.1:9/nobody", "cannot be reached"),
        ("http://no-such-host.invalid/x", "cannot be reached"),
        ("http://user:swordfish@127.0.0.1:9/nobody", "http://127.0.0.1:9/nobody: cannot be reached"),
        ("{url}/big.bin#sha256=12", "needs 64 hexadecimal digits"),
        ("nonsense://x/y", "cannot be opened: Protocol not known: nonsense"),
        ("memory://nothing/here", "no such file or folder"),
        ("file:///nothing/here", "no such file or directory"),
    ],
)
def test_what_cannot_be_fetched(site, place, said, tmp_path):
    site.status = {
        "/round": 302,
        "/main/round.gguf": 302,
        "/secret": 401,
        "/failing": 500,
        "/failing/revision/main": 500,
    }
    site.repositories["org/models"]["main"].files["round.gguf"] = BYTES
    site.repositories["org/traversal"] = {"main": Repository({}, ["adapter_config.json", "../../adapter.safetensors"])}
    site.repositories["org/pickle"] = {"main": Repository({"adapter_config.json": b"{}", "adapter_model.bin": BYTES})}
    with pytest.raises(RemoteError, match=said) as error:
        remote.fetch(place.format(url=site.url), "adapter")
    assert "swordfish" not in str(error.value)
    assert len(str(error.value)) < 400
    assert not cached(tmp_path)


def test_tokens(site, monkeypatch):
    site.token = "hf_swordfish"
    with pytest.raises(RemoteError, match="private and HF_TOKEN"):
        remote.fetch("hf://org/legal", "adapter")
    monkeypatch.setenv("HF_TOKEN", site.token)
    assert remote.fetch("hf://org/legal", "adapter").name == "legal"


def test_pickles_when_told(site, monkeypatch):
    site.repositories["org/pickle"] = {"main": Repository({"adapter_config.json": b"{}", "adapter_model.bin": BYTES})}
    monkeypatch.setenv("GGUFLORA_ALLOW_PICKLE", "1")
    assert (remote.fetch("hf://org/pickle", "adapter") / "adapter_model.bin").read_bytes() == BYTES


@pytest.mark.parametrize("claimed", [10**15, SIZE + 5])
@pytest.mark.parametrize("place", ["hf://org/models/a/b/big.gguf", "{url}/big.bin"])
def test_lengths_that_are_lies(site, place, claimed, tmp_path):
    size = {"Content-Length": str(claimed)}
    site.headers = {"/big.bin": size, "/big.gguf": {"X-Linked-Size": str(claimed)}}
    site.cut = {"/big.bin": (SIZE, 99)}
    with pytest.raises(GgufloraError) as error:
        remote.fetch(place.format(url=site.url))
    assert isinstance(error.value, RemoteError | OutputError)
    assert not cached(tmp_path)


# web servers and other stores


def test_a_server_without_ranges(site):
    site.ranges, site.cut = False, {"/big.bin": (900_000, 1)}
    assert remote.fetch(f"{site.url}/big.bin").read_bytes() == BYTES
    assert len(site.bodies("/big.bin")) == 2


def test_a_file_that_changed_is_fetched_again(site):
    first = remote.fetch(f"{site.url}/big.bin")
    assert remote.fetch(f"{site.url}/big.bin") == first
    assert len(site.bodies("/big.bin")) == 1
    site.files["big.bin"] = BYTES[::-1]
    assert remote.fetch(f"{site.url}/big.bin").read_bytes() == BYTES[::-1]
    site.headers = {"/big.bin": {"ETag": ""}}  # nothing tells versions apart: never trust the cache
    for content in (BYTES, BYTES[::-1]):
        site.files["big.bin"] = content
        assert remote.fetch(f"{site.url}/big.bin").read_bytes() == content


def test_a_folder_of_a_web_server(site, adapters):
    folder = remote.fetch(f"{site.url}/legal/", "adapter")
    assert folder.name == "legal"
    assert files_of(folder).keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    assert gguflora.diff(f"{site.url}/legal/", adapters[0]).cosine == pytest.approx(1)


def test_a_split_model(site, tmp_path):
    names = [f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    contents = {name: name.encode() * 300 for name in names}
    site.files |= contents
    site.repositories["org/split"] = {"main": Repository(contents)}
    for place in (f"{site.url}/{names[1]}", f"hf://org/split/{names[1]}"):
        path = remote.fetch(place)
        assert path.name == names[1]
        assert {name: (path.parent / name).read_bytes() for name in names} == contents
    del site.files[names[2]]
    with pytest.raises(RemoteError, match="no such file"):
        remote.fetch(f"{site.url}/{names[0]}")


def test_one_download_at_a_time(site):
    code = "import sys; from gguflora.files import remote; print(remote.fetch(sys.argv[1]))"
    command = [sys.executable, "-P", "-c", code, f"{site.url}/big.bin"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(site.bodies("/big.bin")) == 1


def test_memory_and_file_urls(site, adapters, tmp_path):
    import fsspec

    fsspec.filesystem("memory").put(f"{adapters[0]}/", "/test-remote/legal/", recursive=True)
    assert gguflora.diff("memory://test-remote/legal", adapters[0]).cosine == pytest.approx(1)
    assert remote.fetch(f"file://{adapters[0]}", "adapter") == adapters[0]


def test_an_upload_leaves_other_files(adapters):
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{adapters[0]}/", "/test-upload/legal/", recursive=True)
    store.pipe({"/test-upload/legal/optimizer.pt": b"state", "/test-upload/legal/adapter_model.bin": b"old weights"})
    outputs.put(Path(adapters[0]), "memory://test-upload/legal")
    names = {entry.rpartition("/")[2] for entry in store.ls("/test-upload/legal", detail=False)}
    assert "optimizer.pt" in names
    assert "adapter_model.bin" not in names
    assert {path.name for path in Path(adapters[0]).iterdir()} <= names


# the faces


def test_every_command_with_inputs_is_one():
    import typer

    from gguflora.cli.app import app

    for command in typer.main.get_command(app).commands:
        function = getattr(gguflora, command.replace("-", "_"), None)
        if command in {"demo", "doctor", "pipeline", "unmerge"}:  # no inputs; a recipe's own; changed in place
            assert not remote.input_kinds(function or gguflora.run_pipeline)
            continue
        assert remote.input_kinds(function).keys() <= inspect.signature(function).parameters.keys()
        assert function.__wrapped__, command


@pytest.mark.parametrize(
    "command", ["convert", "merge", "combine", "resize", "inspect", "diff", "export", "extract", "run"]
)
def test_commands_take_urls(site, command, tmp_path):
    legal, base, out = "hf://org/legal", "hf://org/models/base.gguf", tmp_path / "out.gguf"
    words = {
        "convert": (legal, "--base", base, "-o", out),
        "merge": (base, "--lora-scaled", f"{legal}:0.5", "-o", out),
        "combine": (f"{legal}:0.5", f"{site.url}/legal/", "-o", tmp_path / "out"),
        "resize": (legal, "--rank", 1, "-o", tmp_path / "out"),
        "inspect": (legal, "--base", base),
        "diff": (legal, "hf://org/legal@v2"),
        "export": (f"{site.url}/lora.gguf", "--base", base, "-o", tmp_path / "out"),
        "run": (base, "--lora", legal, "-p", "Hello", "--max-tokens", 2, "--json"),
        "extract": (f"{site.url}/merged.gguf", "--base", base, "--rank", 1, "-o", out),
    }[command]
    if command == "extract":
        gguflora.merge(base, legal, tmp_path / "merged.gguf")
        site.files["merged.gguf"] = (tmp_path / "merged.gguf").read_bytes()
    if command == "export":
        gguflora.convert(legal, base, out)
        site.files["lora.gguf"] = out.read_bytes()
    result = run(command, *words)
    assert result.returncode == 0, result.stderr
    assert command != "run" or json.loads(result.stdout)["adapters"] == "legal@1"


def test_outputs_of_commands_are_local(site):
    legal, base = "hf://org/legal", "hf://org/models/base.gguf"
    for out in ("s3://bucket/x.gguf", Path("s3://bucket/x.gguf")):
        with pytest.raises(OutputError, match="outputs of single commands are local"):
            gguflora.convert(legal, base, out)
    result = run("merge", base, "--lora", legal, "-o", "s3://bucket/x.gguf")
    assert result.returncode == 1
    assert "outputs of single commands are local" in result.stderr
    with pytest.raises(RemoteError, match="only a local model can be changed in place"):
        gguflora.merge(base, legal, in_place=True)
    with pytest.raises(RemoteError, match="a Path does not keep the two slashes"):
        gguflora.convert(Path(legal), base, "x.gguf")
    assert not site.asked


def test_hot_swapping(site):
    path = remote.fetch("hf://org/models/base.gguf")
    with closing(llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)) as llm:
        adapters = gguflora.attach(llm)
        adapters.load("legal", "hf://org/legal")
        adapters.apply(legal=0.5)
        assert adapters.active == {"legal": 0.5}
        adapters.close()


def test_the_command_line_with_the_hub_s_own_variables(site, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-m", "gguflora", "diff", "hf://org/legal", "hf://org/legal@v2", "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert abs(json.loads(done.stdout)["cosine"]) < 0.5
    assert (tmp_path / "home/hub/models--org--legal/refs/v2").is_file()
    shutil.rmtree(tmp_path / "cache")
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, env=offline, stdout=subprocess.PIPE, text=True, check=False)
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("missing", "place", "said"),
    [
        ("fsspec", "https://host/x", "gguflora[remote]"),
        ("huggingface_hub", "hf://org/legal", "gguflora[remote]"),
        ("s3fs", "s3://bucket/x", "Install s3fs"),
    ],
)
def test_a_missing_package_is_named(missing, place, said):
    code = f"""
import importlib.util as u, sys
find = u.find_spec
u.find_spec = lambda name, *more: None if name == {missing!r} else find(name, *more)
sys.modules[{missing!r}] = None
from gguflora.errors import GgufloraError
from gguflora.files import remote
try: remote.fetch({place!r})
except GgufloraError as error: print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True, stdout=subprocess.PIPE)
    assert said in done.stdout.decode()


def test_a_hub_that_cannot_be_reached(site, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="hf://org/legal: cannot be reached"):
        remote.fetch("hf://org/legal", "adapter")
