"""Adapters with chat templates of their own: each request gets that of the adapters it names."""

import json
import shutil

import pytest

from gguflora.diagnostics import demo
from gguflora.engine import Sampling
from gguflora.engine.chat import Chat
from gguflora.errors import EngineError
from gguflora.server.settings import Settings
from support import serving
from support.serving import PROMPT, QUESTION

USER = [{"role": "user", "content": QUESTION}]
LINES = (
    "{{ bos_token }}Now.\n{% for m in messages %}Q: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
TAGS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if enable_thinking %}!{% endif %}"
)


def rendered(template, **special):
    """By transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"chat_template": template, "add_generation_prompt": True, **special}
    return render_jinja_template(conversations=[USER], **options)[0][0]


def add(folder, name, template=None, like="shout", **config):
    target = folder / name
    shutil.copytree(demo.HERE / like, target)
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    if config:
        (target / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    add(folder, "lines", LINES)
    add(folder, "tags", TAGS, eos_token="<over>")
    add(folder, "tags2", TAGS, like="verse", eos_token="<over>")
    add(folder, "plain")
    add(folder, "broken")
    (folder / "broken/chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    return folder


@pytest.fixture(scope="module")
def http(folder):
    with serving.serving(Settings(), threads=1, adapters={}, adapter_dir=folder) as client:
        yield client


def prompt(client, model, **fields):
    answer = client.post("/apply-template", json={"model": model, "messages": USER, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt"]


def test_each_adapter_gets_its_own_template(http):
    bos = http.engine.special_texts["bos_token"]
    base = prompt(http, "base")
    assert prompt(http, "lines") == prompt(http, "lines@0.5") == rendered(LINES, bos_token=bos)
    assert prompt(http, "tags") == rendered(TAGS, eos_token="<over>")
    assert prompt(http, "plain") == base
    assert base not in {prompt(http, "lines"), prompt(http, "tags")}
    assert http.get("/props").json()["chat_template"] == http.engine.chat_template


def test_a_set_gets_a_template_only_if_it_has_one(http, caplog):
    base = prompt(http, "base")
    assert prompt(http, "tags+tags2@0.5") == prompt(http, "tags")
    caplog.clear()
    for _ in range(2):
        assert prompt(http, "lines+tags") == prompt(http, "lines+plain") == base
    said = [record.message for record in caplog.records if "different chat templates" in record.message]
    assert len(said) == 2
    assert all("the engine's is used" in each for each in said)


@pytest.mark.parametrize("fields", [{"lora_path": "tags"}, {"lora_request": {"lora_name": "tags"}}])
def test_other_ways_to_name_an_adapter(http, fields):
    assert prompt(http, "base", **fields) == prompt(http, "tags")


def test_what_a_template_reads_is_asked_of_the_adapters_template(http):
    """Fields are honoured or refused by the template that the request gets."""
    assert prompt(http, "tags", enable_thinking=True).endswith("!")
    for model in ("base", "lines"):
        refused = http.post("/apply-template", json={"model": model, "messages": USER, "enable_thinking": True})
        assert refused.status_code == 400
        assert "enable_thinking" in refused.json()["error"]["message"]


def test_every_api_uses_it(http):
    n_tokens = len(http.engine.tokenize(prompt(http, "tags"), add_bos=False))
    n_base = len(http.engine.tokenize(prompt(http, "base"), add_bos=False))
    assert n_tokens != n_base
    limit = {"model": "tags", "max_tokens": 1, "messages": USER}
    chat = http.post("/v1/chat/completions", json=limit).json()
    assert chat["usage"]["prompt_tokens"] == n_tokens
    answer = http.post("/v1/responses", json={"model": "tags", "input": QUESTION, "max_output_tokens": 1}).json()
    assert answer["usage"]["input_tokens"] == n_tokens
    usage = http.post("/v1/messages", json=limit).json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == n_tokens
    for model, wanted in (("tags", n_tokens), ("base", n_base)):
        counted = http.post("/v1/messages/count_tokens", json={**limit, "model": model}).json()
        assert counted["input_tokens"] == wanted
    assert http.post("/v1/messages/count_tokens", json={**limit, "model": "nobody"}).status_code == 404


def test_a_broken_template_harms_only_its_adapter(http):
    answer = http.post("/v1/chat/completions", json={"model": "broken", "messages": USER})
    assert answer.status_code == 400
    assert "the chat template of the adapter 'broken' cannot be used" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json={"model": "broken", "prompt": PROMPT, "max_tokens": 1}).is_success
    assert http.post("/v1/chat/completions", json={"model": "lines", "messages": USER, "max_tokens": 1}).is_success


def test_a_changed_template_is_taken_up(http, folder):
    add(folder, "new", "old{{ messages[0].content }}")
    assert prompt(http, "new") == f"old{QUESTION}"
    (folder / "new/chat_template.jinja").write_text("newer{{ messages[0].content }}")
    assert prompt(http, "new") == f"newer{QUESTION}"


def test_the_adapters_token_ends_its_answers(http, folder):
    """The token is an ordinary one of the base, so that the answer certainly has it."""
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    text = http.post("/v1/completions", json={**asked, "model": "plain"}).json()["choices"][0]["text"]
    tokens = http.engine.tokenize(text, add_bos=False)
    end = next(token for place, token in enumerate(tokens) if place > 3 and token not in tokens[:place])
    spelled = http.engine.detokenize([end]).decode()
    add(folder, "ended", LINES, eos_token=spelled)
    (folder / "ended/tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": end, "content": spelled}]}))
    chat = {"messages": USER, "max_tokens": 24, "temperature": 0}
    whole = http.post("/v1/chat/completions", json={**chat, "model": "lines"}).json()["choices"][0]
    cut = http.post("/v1/chat/completions", json={**chat, "model": "ended"}).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert whole["message"]["content"].startswith(cut["message"]["content"] + spelled)
    beyond = http.post("/v1/chat/completions", json={**chat, "model": "ended", "ignore_eos": True}).json()["choices"][0]
    assert beyond["message"]["content"].startswith(whole["message"]["content"])


@pytest.mark.parametrize("named", [False, True])
def test_the_adapters_template_if_it_is_asked_for(folder, named):
    where = {"adapters": {name: folder / name for name in ("lines", "tags", "tags2", "plain")}}
    with serving.serving(
        threads=1, chat_template="adapter", **(where if named else {"adapters": {}, "adapter_dir": folder})
    ) as http:
        base = prompt(http, "base")
        assert prompt(http, "tags") == prompt(http, "tags+tags2") == prompt(http, "plain+tags") != base
        assert prompt(http, "plain") == base
        refused = http.post("/v1/chat/completions", json={"model": "lines+tags", "messages": USER})
        assert refused.status_code == 400
        assert "the adapters lines, tags have different chat templates" in refused.json()["error"]["message"]


@pytest.mark.parametrize("options", [{"chat_template": "base"}, {"chat_template": "{{ messages[0].content }}?"}])
def test_a_template_for_all(folder, options):
    with serving.serving(threads=1, adapters={}, adapter_dir=folder, **options) as http:
        assert prompt(http, "tags") == prompt(http, "lines+tags") == prompt(http, "base")


def test_one_adapter_at_the_start_and_others_later(folder):
    """The engine's template is that of the one adapter; an adapter without a template was made for the base's."""
    with serving.serving(threads=1, adapters={"first": folder / "tags"}, adapter_dir=folder) as http:
        assert prompt(http, "base") == prompt(http, "first") == rendered(TAGS, eos_token="<over>")
        assert prompt(http, "lines") == rendered(LINES, bos_token=http.engine.special_texts["bos_token"])
        with serving.serving(threads=1, adapters={}) as plain:
            assert prompt(http, "plain") == prompt(plain, "base")


def test_a_chat_in_the_terminal(folder):
    names = ("lines", "tags")
    with serving.engine(threads=1, adapters={name: folder / name for name in names}) as engine:
        made, told = [], []
        sampling = Sampling(temperature=0)
        chat = Chat(engine, made.append, told.append, made.append, max_tokens=8, sampling=sampling)
        chat.handle("/lora lines 1")
        answer = chat.say(QUESTION)
        wanted = serving.llama("shout")(f"Now.\n{PROMPT}", max_tokens=8, temperature=0)
        assert answer.text == wanted["choices"][0]["text"]


def test_a_start_without_templates_is_refused_only_where_none_can_come(folder, tmp_path):
    with pytest.raises(EngineError, match="found templates in no adapter's directory"):
        serving.engine(threads=1, adapters={"plain": folder / "plain"}, chat_template="adapter").__enter__()
    with serving.engine(threads=1, adapters={}, adapter_dir=tmp_path, chat_template="adapter") as engine:
        assert engine.template_of(()) is None
