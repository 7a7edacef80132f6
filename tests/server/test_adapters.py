"""Adapters over HTTP: llama-server's scales, vLLM's loading and unloading, and what an adapter changes."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gguflora
from gguflora.diagnostics import demo
from gguflora.errors import GgufloraError
from gguflora.server.settings import Settings
from support import serving
from support.serving import PROMPT, expected_text, lora_file

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def http():
    with serving.serving() as client:
        yield client


def answer(http, **body):
    response = http.post("/v1/completions", json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_list(http):
    adapters = http.get("/lora-adapters").json()
    assert [(item["id"], item["name"], item["path"], item["scale"]) for item in adapters] == [
        (0, "shout", "shout.gguf", 0.0),
        (1, "verse", "verse.gguf", 0.0),
    ]


def test_lora_of_a_request(http):
    assert answer(http, lora=[{"id": 0, "scale": 0.4}]) == expected_text("shout", 0.4)
    assert answer(http, lora=[{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.5}]) == expected_text("verse", 0.5)
    assert answer(http, lora=[], model="shout") == expected_text()
    assert answer(http, lora=[{"id": 0, "scale": 9}, {"id": 0, "scale": 1}]) == expected_text("shout")
    chat = {"messages": [{"role": "user", "content": serving.QUESTION}], "temperature": 0, "max_tokens": 60}
    reply = http.post("/v1/chat/completions", json={**chat, "lora": [{"id": 0, "scale": 1}]}).json()
    assert reply["choices"][0]["message"]["content"] == expected_text("shout")


def test_scales_of_requests_that_name_no_set(http):
    assert answer(http) == answer(http, model="default") == expected_text()
    assert http.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}]).json() == {"success": True}
    try:
        assert answer(http) == answer(http, model="default") == expected_text("shout")
        assert answer(http, model="base") == answer(http, lora=[]) == expected_text()
        assert [item["scale"] for item in http.get("/lora-adapters").json()] == [1.0, 0.0]
        for bad in ([{"id": 7, "scale": 1}], [{"scale": 1}], {"id": 0, "scale": 1}, [{"id": 0, "scale": 1e300}]):
            assert http.post("/lora-adapters", json=bad).status_code == 400
        assert answer(http) == expected_text("shout")
    finally:
        http.post("/lora-adapters", json=[])
    assert answer(http) == expected_text()


def test_changes_are_inspects(http):
    reply = http.get("/lora-adapters/1/changes").json()
    report = gguflora.inspect(lora_file("verse"), demo.BASE)
    assert reply["name"] == "verse"
    assert [(row["name"], row["relative"]) for row in reply["changes"]] == [
        (c.name, c.relative) for c in report.changes
    ]
    assert {(row["layer"], row["module"]) for row in reply["changes"]} >= {(0, "attn_q"), (3, "ffn_down")}
    assert np.ptp([row["relative"] for row in reply["changes"]]) > 0
    assert http.get("/lora-adapters/9/changes").status_code == 404
    assert http.get("/lora-adapters/x/changes").status_code == 400


def test_changes_are_measured_once(http, monkeypatch):
    http.get("/lora-adapters/0/changes")
    monkeypatch.setattr("gguflora.server.adapter_stats.inspect", lambda *_: pytest.fail("measured again"))
    assert http.get("/lora-adapters/0/changes").status_code == 200


def test_changes_that_cannot_be_measured_are_tried_again(http, monkeypatch):
    def fail(*_):
        raise GgufloraError("gone")

    monkeypatch.setattr(http.changes, "_measured", {})
    monkeypatch.setattr("gguflora.server.adapter_stats.inspect", fail)
    assert http.get("/lora-adapters/0/changes").json()["error"]["message"] == "gone"
    monkeypatch.undo()
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: http.get("/lora-adapters/0/changes").status_code, range(8)))
    assert replies == [200] * 8


def load(http, path, name="new", **more):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def unload(http, name="new"):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_loading_is_off_at_first(http):
    for response in (load(http, lora_file("shout")), unload(http, "shout")):
        assert (response.status_code, response.json()["error"]["code"]) == (403, "loading_is_off")


@pytest.fixture
def folder(tmp_path):
    """What clients may load: a file, a directory, damaged things, and links out of it."""
    inside = tmp_path / "adapters"
    inside.mkdir()
    shutil.copy(lora_file("shout"), inside / "shout.gguf")
    shutil.copytree(demo.HERE / "verse", inside / "verse")
    (inside / "garbage.gguf").write_bytes(os.urandom(5000))
    (inside / "link.gguf").symlink_to(lora_file("shout"))
    (inside / "loop.gguf").symlink_to(inside / "loop.gguf")
    (inside / "links").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (inside / "links" / name).symlink_to(demo.HERE / "shout" / name)
    (inside / "up").symlink_to(tmp_path)
    shutil.copy(lora_file("shout"), tmp_path / "outside.gguf")
    shutil.copytree(inside, tmp_path / "adapters-2", symlinks=True)
    os.mkfifo(inside / "pipe.gguf")
    shutil.copytree(demo.HERE / "verse", inside / "piped")
    (inside / "piped" / "adapter_model.safetensors").unlink()
    os.mkfifo(inside / "piped" / "adapter_model.safetensors")
    return inside


@pytest.fixture
def loading(folder):
    with serving.serving(Settings(allow_load=folder)) as client:
        yield client


def test_load_and_unload(loading, folder):
    response = load(loading, "shout.gguf", "loud")
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'loud' added successfully.")
    assert load(loading, folder / "verse", "org/poet").status_code == 200
    assert answer(loading, model="loud") == expected_text("shout")
    assert answer(loading, model="org/poet@0.5") == expected_text("verse", 0.5)
    assert [item["name"] for item in loading.get("/lora-adapters").json()] == ["shout", "verse", "loud", "org/poet"]
    again = load(loading, "shout.gguf", "loud")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "already_loaded")
    assert load(loading, "verse", "loud", load_inplace=True).status_code == 200
    assert answer(loading, model="loud@0.5") == expected_text("verse", 0.5)
    assert unload(loading, "loud").text == "Success: LoRA adapter 'loud' removed successfully."
    assert loading.post("/v1/completions", json={**GREEDY, "model": "loud"}).status_code == 404
    assert unload(loading, "loud").status_code == 404
    assert answer(loading, model="base") == expected_text()


def test_load_refuses_what_lies_outside(loading, folder):
    outside = [
        folder.parent / "outside.gguf", "../outside.gguf", "up/outside.gguf", "link.gguf", "links", "loop.gguf",
        "../adapters-2/shout.gguf", lora_file("shout"), "/etc/passwd", "missing.gguf", "x" * 3000, "a\0b", "up",
        "pipe.gguf", "piped",
    ]  # fmt: skip
    replies = [load(loading, path) for path in outside]
    assert [reply.status_code for reply in replies] == [404] * len(outside)
    assert len({reply.text for reply in replies}) == 1  # so that nobody learns what exists elsewhere


def test_load_says_what_is_wrong_without_paths(loading, folder):
    damaged = load(loading, "garbage.gguf").json()["error"]["message"]
    assert "garbage.gguf" in damaged
    (folder / "adapter with a space").mkdir()
    shutil.copy(folder / "garbage.gguf", folder / "adapter with a space" / "x.gguf")
    for path in ("garbage.gguf", "adapter with a space/x.gguf", "adapter with a space", "."):
        response = load(loading, path)
        assert response.status_code in {400, 404}
        assert str(folder.parent) not in response.text
        assert "Traceback" not in response.text
    for name in ("base", "default", "a@b", "a+b", "", " ", "-x", "a" * 300):
        assert load(loading, "shout.gguf", name).status_code == 400
    assert answer(loading, model="shout") == expected_text("shout")


def test_a_failed_replacement_leaves_the_adapter(loading):
    assert load(loading, "garbage.gguf", "shout", load_inplace=True).status_code == 400
    assert answer(loading, model="shout") == expected_text("shout")
