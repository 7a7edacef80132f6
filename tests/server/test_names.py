"""Names of models: what each stands for, what is listed, what is refused, and the name in the answer."""

import json
import subprocess
import sys

import httpx
import pytest

from gguflora.cli.options import named_aliases
from gguflora.diagnostics import demo
from gguflora.engine import Engine
from gguflora.errors import AdapterNameError, RequestError, ServerError
from gguflora.server.app import create_app
from gguflora.server.settings import Settings
from support import builders, serving
from support.cli import run
from support.serving import PROMPT, expected_text, lora_file
from support.soft_prompts import trained

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}
ALIASES = {"gpt-4o": "shout@0.4", "any model": None, "claude+x": "verse@0.5"}


@pytest.fixture(scope="module")
def http():
    settings = Settings(aliases=ALIASES, default_adapters="verse@0.5", cors=("https://page.example",))
    with serving.serving(settings) as client:
        yield client


def answer(http, **body):
    response = http.post("/v1/completions", json={**GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()["model"], response.json()["choices"][0]["text"]


def test_the_answer_names_the_set_that_answered(http):
    half = expected_text("verse", 0.5)
    assert answer(http) == answer(http, model="default") == ("verse@0.5", half)
    assert answer(http, model="base") == ("base", expected_text())
    assert answer(http, model="shout") == ("shout", expected_text("shout"))
    assert answer(http, model="shout@1.0") == ("shout@1.0", expected_text("shout"))
    assert answer(http, lora=[]) == ("base", expected_text())
    assert answer(http, lora=[{"id": 0, "scale": 0.4}]) == ("shout@0.4", expected_text("shout", 0.4))
    assert answer(http, model="base", lora=[{"id": 0, "scale": 1}]) == ("shout", expected_text("shout"))
    name = answer(http, lora=[{"id": 0, "scale": 0.123456789}, {"id": 1, "scale": 1}])[0]
    assert http.engine.adapter_set(name) == http.engine.adapter_set([("shout", 0.123456789), ("verse", 1)])
    events = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}], "stream": True})
    assert '"model": "verse@0.5"' in events.text


def test_aliases(http):
    listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert listed == ["base", "shout", "verse", *ALIASES]
    assert answer(http, model="gpt-4o") == ("gpt-4o", expected_text("shout", 0.4))
    assert answer(http, model="any model") == ("any model", expected_text("verse", 0.5))
    assert answer(http, model="claude+x") == ("claude+x", expected_text("verse", 0.5))
    assert http.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    http.post("/lora-adapters", json=[{"id": 0, "scale": 1}])
    try:
        assert answer(http, model="any model") == ("any model", expected_text("shout"))
        assert answer(http) == ("shout", expected_text("shout"))
    finally:
        http.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])


def test_unknown_names_get_the_known_ones(http):
    for name in ("tone", "shout+tone", "gpt-4o@0.5"):
        refused = http.post("/v1/completions", json={**GREEDY, "model": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert all(known in refused.text for known in ("base", "shout", "verse", *ALIASES))
    assert http.post("/v1/completions", json={**GREEDY, "model": "shout@x"}).status_code == 400


def test_any_model_is_accepted_where_the_server_says_so():
    with serving.serving(Settings(accept_any_model=True, default_adapters="shout")) as http:
        for name in ("gpt-4o-mini", "meta-llama/Llama 3", "llama3:8b@latest"):
            assert answer(http, model=name) == ("shout", expected_text("shout"))
        assert answer(http, model="base") == ("base", expected_text())
        assert http.post("/v1/completions", json={**GREEDY, "model": "shout@x"}).status_code == 400
        assert http.post("/v1/completions", json={**GREEDY, "model": "verse+tone"}).status_code == 404


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(aliases={"shout": None}), "the alias 'shout' is the name of"),
        (Settings(aliases={"base": None}), "the alias 'base' is the name of"),
        (Settings(aliases={"default": "shout"}), "the alias 'default' is the name of"),
        (Settings(aliases={"x": "tone"}), "the adapter set 'tone' cannot be served: no adapter named 'tone'"),
        (Settings(default_adapters="shout@x"), "the adapter set 'shout@x' cannot be served: the scale"),
    ],
)
def test_names_that_cannot_be_reached_are_refused_at_the_start(settings, message):
    with serving.engine() as engine, pytest.raises(ServerError, match=message):
        create_app(engine, demo.BASE, settings)


def test_default_names_no_adapter():
    with (
        serving.engine(adapters={"default": lora_file("shout")}) as engine,
        pytest.raises(ServerError, match="default"),
    ):
        create_app(engine, demo.BASE)
    with pytest.raises(AdapterNameError, match="base"):
        Engine(demo.BASE, adapters={"base": lora_file("shout")})


def test_a_scale_given_with_an_adapter_is_that_of_its_name():
    adapters = {"shout": (lora_file("shout"), 0.4), "verse": (lora_file("verse"), 0.0)}
    with serving.serving(adapters=adapters) as http:
        assert answer(http, model="shout") == ("shout", expected_text("shout", 0.4))
        assert answer(http, model="shout@1") == ("shout@1", expected_text("shout"))
        assert answer(http, lora=[{"id": 0, "scale": 0.4}])[0] == "shout"
        assert answer(http, model="verse") == ("verse", expected_text("verse"))


def test_replacing_keeps_the_id():
    with serving.engine() as engine:
        first = engine.adapters()[0]
        again = engine.load(lora_file("verse"), "shout", replace=True)
        assert (again.id, again.load_id) == (first.id, first.load_id + 2)
        assert [adapter.id for adapter in engine.adapters()] == [0, 1]
        assert engine.load(lora_file("verse"), "third").id == 2


def test_impossible_scales_of_soft_prompts_are_refused_when_they_are_set():
    soft = trained("llama", "PROMPT_TUNING")[0]
    with Engine(builders.gguf_model("llama"), adapters={"soft": soft}, n_ctx=128, threads=1) as engine:
        assert engine.adapter_set("soft") == (("soft", 1.0),)
        with pytest.raises(RequestError, match="is a soft prompt, which is on"):
            engine.adapter_set("soft@0.5")


def test_pages_of_other_origins(http):
    mine, foreign = {"Origin": "https://page.example"}, {"Origin": "https://evil.example"}
    asked = {**mine, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = http.options("/v1/completions", headers=asked)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    reply = http.post("/v1/completions", json=GREEDY, headers=mine)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://page.example")
    refused = http.post("/v1/completions", json=GREEDY, headers=foreign)
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


def test_anthropics_header_carries_the_key():
    with serving.serving(Settings(api_key="secret", cors=("*",))) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"X-Api-Key": "wrong"}).status_code == 401
        assert http.get("/v1/models", headers={"X-Api-Key": "secret"}).status_code == 200
        asked = {"Origin": "https://any.example", "Access-Control-Request-Method": "POST"}
        assert http.options("/v1/completions", headers=asked).status_code == 200  # preflights carry no key
        assert http.post("/v1/completions", json=GREEDY, headers={"Origin": "https://any.example"}).status_code == 401


def test_aliases_of_the_command_line():
    assert named_aliases(["a,b", "c=legal@0.5+tone"]) == {"a": None, "b": None, "c": "legal@0.5+tone"}


def test_llama_servers_spellings(tmp_path):
    lora = f"loud={lora_file('shout')}:0.4"
    options = ["-m", demo.BASE, "-c", "512", "-np", "2", "-ngl", "0", "--lora-scaled", lora, "--api-key", "secret"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "gguflora",
        "serve",
        *map(str, options),
        "-a",
        "gpt-4o",
        "--port",
        "0",
        "--json",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            ready = json.loads(process.stdout.readline())
            with httpx.Client(base_url=ready["url"], headers={"Authorization": "Bearer secret"}) as client:
                assert ready["adapters"] == ["loud"]
                assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "loud", "gpt-4o"]
                assert answer(client) == ("loud", expected_text("shout", 0.4))
                assert answer(client, model="gpt-4o") == ("gpt-4o", expected_text("shout", 0.4))
                assert answer(client, model="base") == ("base", expected_text())
                assert httpx.get(f"{ready['url']}/v1/models").status_code == 401
        finally:
            process.terminate()


@pytest.mark.parametrize("arguments", [[], [str(demo.BASE), "-m", str(demo.BASE)]])
def test_the_base_is_named_once(arguments):
    failed = run("serve", *arguments)
    assert failed.returncode == 2
    assert "name the base model once" in failed.stderr
