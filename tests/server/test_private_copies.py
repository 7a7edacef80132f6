"""What a client loads is what was checked: one open descriptor for check and copy, and a bound on their number."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from gguflora.diagnostics import demo
from gguflora.server import adapters, private_copies
from gguflora.server.errors import Failure
from gguflora.server.settings import Settings
from support import serving
from support.serving import PROMPT, expected_text, lora_file

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}


@pytest.fixture
def folder(tmp_path):
    """The folder of --allow-load."""
    allowed = (tmp_path / "allowed").resolve()
    allowed.mkdir()
    shutil.copy(lora_file("shout"), allowed / "x.gguf")
    shutil.copytree(demo.HERE / "verse", allowed / "verse")
    (allowed / "verse" / "optimizer.pt").write_bytes(bytes(100))
    (tmp_path / "secret.gguf").write_bytes(b"secret")
    return allowed


def load(http, name, path, **more):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def test_files_that_change_after_loading(folder):
    with serving.serving(Settings(allow_load=folder), adapters={}) as http:
        assert load(http, "x", "x.gguf").status_code == 200
        assert load(http, "v", "verse").status_code == 200
        before = http.get("/lora-adapters/0/changes").json()
        (folder / "x.gguf").write_bytes(b"other")
        shutil.rmtree(folder / "verse")
        http.changes._measured.clear()
        assert http.get("/lora-adapters/0/changes").json() == before
        for model, lora in (("x", "shout"), ("v", "verse")):
            reply = http.post("/v1/completions", json={**GREEDY, "model": model}).json()
            assert reply["choices"][0]["text"] == expected_text(lora)
        assert [item["path"] for item in http.get("/lora-adapters").json()] == ["x.gguf", "verse"]


def test_a_path_that_changes_between_check_and_use(folder, tmp_path, monkeypatch):
    check = adapters.path_inside

    def check_then_swap(*arguments):
        path = check(*arguments)
        (folder / "x.gguf").unlink(missing_ok=True)
        (folder / "x.gguf").symlink_to(tmp_path / "secret.gguf")
        return path

    with serving.serving(Settings(allow_load=folder)) as http:
        monkeypatch.setattr(adapters, "path_inside", check_then_swap)
        reply = load(http, "x", "x.gguf")
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_path")
        assert "secret" not in reply.text


def test_copies(folder, tmp_path):
    copies = private_copies.PrivateCopies()
    copy = copies.make(folder / "verse", folder)
    assert {path.name for path in copy.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    copies.keep("a", copy)
    other = copies.make(folder / "x.gguf", folder)
    copies.keep("a", other)
    assert not copy.exists()
    copies.forget("a")
    assert not other.exists()
    (folder / "verse" / "extra.json").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(Failure, match="leads out"):
        copies.make(folder / "verse", folder)
    with pytest.raises(Failure, match="changed"):
        copies.make(folder / "missing.gguf", folder)


def test_their_number(folder):
    with serving.serving(Settings(allow_load=folder, max_adapters=3)) as http:
        assert load(http, "x", "x.gguf").status_code == 200  # beside the two of the start
        refused = load(http, "y", "x.gguf")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_adapters")
        assert load(http, "y", "x.gguf", load_inplace=True).status_code == 400
        assert load(http, "x", "x.gguf", load_inplace=True).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 200
        assert load(http, "y", "x.gguf").status_code == 200


def test_their_number_while_several_are_loading(folder):
    with serving.serving(Settings(allow_load=folder, max_adapters=4)) as http, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda number: load(http, f"x{number}", "x.gguf"), range(8)))
        assert sorted(reply.status_code for reply in replies) == [200] * 2 + [400] * 6
        assert len(http.get("/lora-adapters").json()) == 4
        loaded = http.get("/lora-adapters").json()[-1]["name"]
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": loaded}).status_code == 200
        assert load(http, "y", "x.gguf").status_code == 200
