"""Several keys: whose each is, and that a private cache tells nobody what others have sent."""

import pytest

from gguflora.errors import ServerError
from gguflora.server.keys import read_keys
from gguflora.server.serve import serve
from gguflora.server.settings import Settings
from support import serving
from support.serving import expected_text

KEYS = {"key-of-ann": "Ann", "key-of-bob": "Bob"}
SECRET = "The PIN of Ann is 4711 and she tells nobody."


def ask(http, key, prompt, **more):
    body = {"model": "base", "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
    reply = http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert reply.status_code == 200, reply.text
    return reply.json()


def reused(http, key, prompt):
    reply = ask(http, key, prompt)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["timings"]["cache_n"]
    return reply["timings"]["cache_n"]


@pytest.mark.parametrize("private", [True, False])
def test_what_one_holder_learns_of_another(private):
    settings = Settings(api_keys=KEYS, private_cache=private)
    with serving.serving(settings) as http:
        assert reused(http, "key-of-ann", SECRET) == 0
        learned = reused(http, "key-of-bob", SECRET[:20] + "?")
        assert (learned == 0) is private
        assert learned == 0 or learned >= 8
        assert reused(http, "key-of-bob", SECRET[:20] + "?") > 0  # his own
        assert reused(http, "key-of-ann", SECRET) > learned  # her own
        text = ask(http, "key-of-bob", serving.PROMPT, max_tokens=60)["choices"][0]["text"]
        assert text == expected_text()


def test_a_guess_costs_the_same_right_or_wrong():
    with serving.serving(Settings(api_keys=KEYS, private_cache=True)) as http:
        ask(http, "key-of-ann", SECRET)
        for guess in "345":  # her PIN begins with 4; each of his guesses shares only his own last one
            before = reused(http, "key-of-bob", SECRET[:18] + guess)
            assert before == (0 if guess == "3" else reused(http, "key-of-bob", SECRET[:18] + "x"))
        ask(http, "key-of-ann", SECRET, lora=[{"id": 0, "scale": 1.0}])
        assert ask(http, "key-of-bob", SECRET, lora=[{"id": 0, "scale": 1.0}])["timings"]["cache_n"] == 0


def test_keys_of_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nkey-of-ann Ann\n\n  key-of-bob   Bob B. \n")
    assert read_keys(path) == {"key-of-ann": "Ann", "key-of-bob": "Bob B."}
    for bad in ("", "# none\n", "nameless\n", "k Ann\nk Bob\n", b"\xff\xfe x\n"):
        path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        with pytest.raises(ServerError, match="key"):
            read_keys(path)
    with pytest.raises(ServerError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_only_known_keys(caplog, monkeypatch):
    with serving.serving(Settings(api_key="one", api_keys=KEYS)) as http:
        for key in ("one", *KEYS):
            assert http.get("/v1/models", headers={"X-Api-Key": key}).status_code == 200
        for key in ("-", "two", "Ann", "key-of-an", "key-of-anna"):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401
        monkeypatch.setattr(http.engine, "adapter_set", lambda *_: 1 / 0)
        assert http.get("/v1/models/x", headers={"X-Api-Key": "key-of-ann"}).status_code == 500
    assert [record.getMessage() for record in caplog.records] == ["GET /v1/models/x of Ann failed"]


def test_a_private_cache_needs_keys(monkeypatch):
    monkeypatch.delenv("GGUFLORA_API_KEY", raising=False)
    with pytest.raises(ServerError, match="private_cache needs keys"):
        serve("missing.gguf", private_cache=True)
