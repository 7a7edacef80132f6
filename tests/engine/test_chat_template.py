"""Whose chat template is used: the base's, that of the adapter's directory, or one from a file."""

import json
import shutil

import pytest

from gguflora.adapters.tokenizer import read_templates
from gguflora.diagnostics import demo
from gguflora.engine import Engine
from gguflora.engine.run import run
from gguflora.errors import AdapterError, EngineError
from support.serving import lora_file

MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<me>"
WANTED = "<s><user> Hi\n<me>"
OPTIONS = {"n_ctx": 256, "threads": 1}


@pytest.fixture
def folder(tmp_path):
    """An adapter's directory with a template of its own."""
    shutil.copytree(demo.HERE / "shout", tmp_path / "shout")
    (tmp_path / "shout/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "shout"


def text(**options):
    with Engine(demo.BASE, **{**OPTIONS, **options}) as engine:
        found = engine.chat_text(MESSAGES)
        assert engine.render_chat(MESSAGES) == engine.tokenize(found, add_bos=False)
        return found.replace(engine.special_texts["bos_token"], "<s>")


def test_the_adapters_is_used_if_it_is_one_and_differs(folder, tmp_path, caplog):
    base = text()
    assert base != WANTED
    assert text(adapters={"shout": folder}) == WANTED
    assert "the chat template of shout is used, which differs from the base's" in caplog.text
    assert text(adapters={"shout": folder}, chat_template="base") == base
    assert text(adapters={"shout": folder, "verse": lora_file("verse")}) == base
    assert text(adapters={"shout": folder, "verse": lora_file("verse")}, chat_template="adapter") == WANTED
    assert text(adapters={"shout": demo.HERE / "shout"}) == base
    caplog.clear()
    with Engine(demo.BASE, **OPTIONS) as engine:
        (folder / "chat_template.jinja").write_text(engine.chat_template)
    assert text(adapters={"shout": folder}) == base
    assert "chat template" not in caplog.text


def test_a_given_template(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert text(chat_template_file=tmp_path / "mine.jinja", adapters={"shout": folder}) == "Hi!"
    assert text(chat_template="{{ messages[0].content }}?") == "Hi?"


def test_what_cannot_be_a_template(folder, tmp_path):
    for options, message in (
        ({"chat_template": "adapter"}, "found templates in no adapter's directory"),
        ({"chat_template": "chatml"}, "expected adapter, base, or a template"),
        ({"chat_template_file": tmp_path / "none"}, "cannot be read as a chat template"),
        ({"chat_template_file": tmp_path / "none", "chat_template": "base"}, "are both given"),
    ):
        with pytest.raises(EngineError, match=message):
            text(**options)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AdapterError, match="cannot be read as a chat template"):
        text(adapters={"shout": folder})


def test_templates_of_a_directory(folder):
    assert read_templates(folder) == {"default": TEMPLATE}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_templates(folder) == {"default": "a", "tool_use": "b"}
    assert read_templates(demo.HERE / "shout") == {}


def test_run_takes_it(folder):
    options = {"adapters": {"shout": folder}, "max_tokens": 8, "temperature": 0, "threads": 1}
    plain = "{{ bos_token }}{{ messages[0].content }}"
    question = "Q: What does the fox eat?\nA:"
    given = run(demo.BASE, question, chat_template=plain, **options)
    raw = run(demo.BASE, question, raw=True, **options)
    assert given.text.strip() == raw.text.strip()
    (folder / "chat_template.jinja").write_text(plain)
    assert run(demo.BASE, question, **options).text == given.text
