"""A directory of adapters: every one is a model, loaded at first use, gone when memory is full, new when it changes."""

import asyncio
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gguflora.diagnostics import demo
from gguflora.engine import Engine, Request, Sampling
from gguflora.engine.adapter_folder import AdapterFolder
from gguflora.errors import EngineError, QueueFullError, RequestError, ServerError
from gguflora.server.app import create_app
from support import serving
from support.serving import PROMPT, expected_text, lora_file

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}


@pytest.fixture
def folder(tmp_path):
    """A GGUF file, a PEFT directory, a broken one of each, and what is no adapter."""
    shutil.copy(lora_file("shout"), tmp_path / "shout.gguf")
    shutil.copytree(demo.HERE / "verse", tmp_path / "verse")
    (tmp_path / "garbage.gguf").write_bytes(os.urandom(5000))
    (tmp_path / "half").mkdir()
    (tmp_path / "half/adapter_config.json").write_text("{")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("no adapter")
    shutil.copy(lora_file("shout"), tmp_path / ".hidden.gguf")
    return tmp_path


@pytest.fixture
def http(folder):
    with serving.serving(adapters={}, adapter_dir=folder, n_ctx=2048) as client:
        yield client


def ask(http, model, **more):
    return http.post("/v1/completions", json={**GREEDY, "model": model, **more})


def text(http, model):
    response = ask(http, model)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def loaded(engine):
    return [adapter.name for adapter in engine.adapters()]


def test_every_adapter_is_a_model_and_loads_at_first_use(http):
    models = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert models == ["base", "garbage", "half", "shout", "verse"]
    assert loaded(http.engine) == []
    assert text(http, "shout") == expected_text("shout")
    assert loaded(http.engine) == ["shout"]
    assert text(http, "verse@0.5") == expected_text("verse", 0.5)
    assert text(http, "shout@0.4") == expected_text("shout", 0.4)
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [
        "base", "shout", "verse", "garbage", "half"
    ]  # fmt: skip


def test_a_broken_one_is_400_and_harms_no_other(http):
    for name in ("garbage", "half"):
        refused = ask(http, name)
        assert refused.status_code == 400, refused.text
        assert name in refused.json()["error"]["message"]
        assert str(http.engine._folder._folder) not in refused.text
        assert ask(http, name, stream=True).status_code == 400
    assert ask(http, "shout+half").status_code == 400
    assert loaded(http.engine) in (["shout"], [])
    assert text(http, "shout") == expected_text("shout")


@pytest.mark.parametrize("name", ["tone", "../shout", "notes", ".hidden", "shout.gguf", "verse/..", "a" * 300, "x\0"])
def test_unknown_names_are_404(http, name):
    refused = http.post("/v1/completions", content=json.dumps({**GREEDY, "model": name}))
    assert refused.status_code == 404
    message = refused.json()["error"]["message"]
    assert all(known in message for known in ("base", "shout", "verse")) or "cannot name an adapter" in message


def test_a_changed_adapter_is_taken_up_by_its_content(http, folder):
    assert text(http, "shout") == expected_text("shout")
    first = http.engine.adapters()[0]
    os.utime(folder / "shout.gguf")
    assert text(http, "shout") == expected_text("shout")
    assert http.engine.adapters()[0] == first  # a new time is no new content
    before = (folder / "shout.gguf").stat()
    shutil.copy(lora_file("verse"), folder / "shout.gguf")
    os.utime(folder / "shout.gguf", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert text(http, "shout") == expected_text("verse")
    assert (http.engine.adapters()[0].id, http.engine.adapters()[0].load_id) == (first.id, first.load_id + 1)
    (folder / "shout.gguf").write_bytes(b"half of a file")
    assert ask(http, "shout").status_code == 400
    shutil.copy(lora_file("shout"), folder / "shout.gguf")
    assert text(http, "shout") == expected_text("shout")
    (folder / "new.gguf").write_bytes(lora_file("verse").read_bytes())
    assert text(http, "new") == expected_text("verse")
    (folder / "verse.gguf").touch()
    assert "are both adapters" in ask(http, "verse").json()["error"]["message"]


def many(folder, count):
    for number in range(count):
        shutil.copy(lora_file("shout" if number % 2 else "verse"), folder / f"a{number}.gguf")
    return lora_file("verse").stat().st_size  # the larger one


def test_the_least_recently_used_leave(tmp_path):
    size = many(tmp_path, 4)
    with serving.serving(adapters={}, adapter_dir=tmp_path, adapter_memory=2 * size) as http:
        for name in ("a0", "a1", "a0", "a2"):
            assert text(http, name) == expected_text("shout" if name == "a1" else "verse")
        assert loaded(http.engine) == ["a0", "a2"]
        assert text(http, "a1") == expected_text("shout")
        assert set(loaded(http.engine)) == {"a2", "a1"}
        too_much = ask(http, "a0+a1+a2")
        assert (too_much.status_code, "limited to" in too_much.text) == (400, True)


def test_more_clients_than_memory(tmp_path):
    size = many(tmp_path, 8)
    with serving.serving(adapters={}, adapter_dir=tmp_path, adapter_memory=2 * size, n_ctx=1024) as http:
        names = [f"a{number % 8}" for number in range(24)]
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda name: text(http, name), names))
        assert texts == [expected_text("shout" if int(name[1:]) % 2 else "verse") for name in names]
        assert sum(adapter.size for adapter in http.engine.adapters()) <= 2 * size


def test_none_leaves_under_a_request(tmp_path, monkeypatch):
    size = many(tmp_path, 2)
    monkeypatch.setattr("gguflora.engine.adapter_folder._WAIT_SECONDS", 0.2)
    with Engine(demo.BASE, adapter_dir=tmp_path, adapter_memory=size, n_ctx=32_768, threads=1) as engine:
        endless = Sampling(temperature=0, ignore_eos=True)
        tokens = engine.tokenize(PROMPT)
        running = engine.submit(Request(tokens, engine.adapter_set("a0"), max_tokens=30_000, sampling=endless))
        next(running)
        with pytest.raises(QueueFullError, match="adapters at work"):
            engine.submit(Request(tokens, engine.adapter_set("a1")))
        assert loaded(engine) == ["a0"]
        running.cancel()
        running.text()
        greedy = Sampling(temperature=0)
        answer = engine.submit(Request(tokens, engine.adapter_set("a1"), max_tokens=60, sampling=greedy))
        assert answer.text() == expected_text("shout")
        assert loaded(engine) == ["a1"]
        with pytest.raises(RequestError, match=r"needs .* limited"):
            engine.submit(Request(tokens, engine.adapter_set("a0+a1")))


def test_five_hundred_adapters_are_only_listed(tmp_path, monkeypatch):
    for number in range(250):
        (tmp_path / f"file{number}.gguf").write_bytes(b"GGUF")
        (tmp_path / f"folder{number}").mkdir()
        (tmp_path / f"folder{number}/adapter_config.json").write_text("{}")
    reads = []
    monkeypatch.setattr("gguflora.engine.adapter_folder.sha256_of", lambda path: reads.append(path) or "")
    with serving.serving(adapters={}, adapter_dir=tmp_path) as http:
        begin = time.perf_counter()
        assert len(http.get("/v1/models").json()["data"]) == 501
        assert time.perf_counter() - begin < 5  # 0.02 s where nothing else computes
        assert "and 480 more" in ask(http, "tone").json()["error"]["message"]
    assert reads == []


def test_a_name_of_both_is_the_loaded_one(folder):
    with serving.serving(adapters={"verse": lora_file("shout")}, adapter_dir=folder) as http:
        assert text(http, "verse") == expected_text("shout")
        http.engine.unload("verse")
        assert text(http, "verse") == expected_text("verse")


def test_directories_that_cannot_be_served(tmp_path):
    with pytest.raises(EngineError, match="is not a directory"):
        Engine(demo.BASE, adapter_dir=tmp_path / "none")
    shutil.copy(lora_file("shout"), tmp_path / "default.gguf")
    shutil.copy(lora_file("shout"), tmp_path / "a b.gguf")
    with Engine(demo.BASE, adapter_dir=tmp_path, n_ctx=256, threads=1) as engine:
        assert engine.adapter_names() == ["default"]
        with pytest.raises(ServerError, match="no adapter can be named 'default'"):
            create_app(engine, demo.BASE)


def test_no_file_is_looked_at_on_the_event_loop(http, monkeypatch):
    """A slow file system holds the request that names an adapter, and no other one."""
    on_loop, elsewhere = [], []

    def watched(method):
        def look(self, *args):
            try:
                asyncio.get_running_loop()
                on_loop.append((method.__name__, *args))
            except RuntimeError:
                elsewhere.append((method.__name__, *args))
            return method(self, *args)

        return look

    for method in (AdapterFolder.find, AdapterFolder.names):
        monkeypatch.setattr(AdapterFolder, method.__name__, watched(method))
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "model": "shout"}
    for path, body in (
        ("/v1/completions", {**GREEDY, "max_tokens": 2, "model": "shout"}),
        ("/v1/completions", {**GREEDY, "max_tokens": 2, "adapter_id": "verse"}),
        ("/completion", {"prompt": "x", "n_predict": 2, "model": "shout"}),
        ("/v1/chat/completions", chat),
        ("/v1/messages", chat),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2, "model": "shout"}),
        ("/v1/embeddings", {"input": "x", "model": "shout"}),
        ("/apply-template", chat),
    ):
        assert http.post(path, json=body).status_code == 200, path
        missing = http.post(path, json={**body, "model": "nobody"})
        assert missing.status_code == 404, path
    for path in ("/v1/models", "/v1/models/shout", "/lora-adapters", "/props", "/slots", "/metrics"):
        assert http.get(path).status_code == 200, path
    assert elsewhere
    assert on_loop == []
