"""Chats of an attached Llama are in the template of its adapter's directory, as they are in an engine."""

import copy
import pickle
import shutil
from contextlib import closing

import llama_cpp
import pytest

import gguflora
from gguflora.diagnostics import demo
from gguflora.errors import HotSwapError
from support.serving import lora_file

MESSAGES = [{"role": "user", "content": "What does the fox eat?"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}Question: {{ m.content }}\n{% endfor %}Answer:"
OPTIONS = {"max_tokens": 12, "temperature": 0.0, "repeat_penalty": 1.0}


@pytest.fixture
def folder(tmp_path):
    """An adapter's directory with a template of its own."""
    shutil.copytree(demo.HERE / "shout", tmp_path / "shout")
    (tmp_path / "shout/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "shout"


@pytest.fixture
def llm():
    with closing(llama_cpp.Llama(str(demo.BASE), n_ctx=256, n_threads=1, verbose=False)) as opened:
        yield opened


def chat(llm, **options):
    reply = llm.create_chat_completion(MESSAGES, **{**OPTIONS, **options})
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]


def in_template(llm):
    """What the Llama answers to the chat in the adapter's template, written out by hand."""
    begin = llm.detokenize([llm.token_bos()], special=True).decode()
    tokens = llm.tokenize(f"{begin}Question: {MESSAGES[0]['content']}\nAnswer:".encode(), add_bos=False, special=True)
    reply = llm.create_completion(tokens, **OPTIONS)
    return reply["choices"][0]["text"], len(tokens)


def test_the_template_comes_and_goes_with_its_adapter(llm, folder, caplog):
    plain = chat(llm)
    with gguflora.attach(llm) as adapters:
        adapters.load("shout", folder)
        assert chat(llm) == plain
        adapters.apply(shout=1.0)
        assert chat(llm) == in_template(llm) != plain
        assert "the chat template of shout is used" in caplog.text
        streamed = llm.create_chat_completion(MESSAGES, stream=True, **OPTIONS)
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in streamed]
        assert "".join(pieces) == chat(llm)[0]
        for twin in (copy.copy(llm), pickle.loads(pickle.dumps(llm))):
            with closing(twin):
                assert chat(twin) == plain
        adapters.load("verse", lora_file("verse"))
        adapters.apply(shout=1.0, verse=1.0)
        assert chat(llm)[1] == plain[1]  # of two adapters neither decides
        adapters.apply()
        assert chat(llm) == plain
        adapters.apply(shout=1.0)
    assert chat(llm) == plain


def test_choices(llm, folder):
    plain = chat(llm)
    with gguflora.attach(llm, chat_template="base") as adapters:
        adapters.load("shout", folder)
        adapters.load("verse", lora_file("verse"))
        adapters.apply(shout=1.0)
        assert chat(llm)[1] == plain[1]
        gguflora.attach(llm, chat_template="adapter")
        assert chat(llm) == in_template(llm)
        adapters.apply(shout=1.0, verse=0.5)
        assert chat(llm) == in_template(llm)
        with pytest.raises(HotSwapError, match="no adapter's directory"):
            adapters.apply(verse=1.0)
        assert adapters.active == {"shout": 1.0, "verse": 0.5}
        gguflora.attach(llm, chat_template=TEMPLATE)
        adapters.apply()
        assert chat(llm) == in_template(llm)


def test_a_handler_of_the_user_stays(llm, folder):
    asked = []

    def handler(**fields):
        asked.append(fields["messages"])
        return "mine"

    llm.chat_handler = handler
    with gguflora.attach(llm) as adapters:
        adapters.load("shout", folder)
        adapters.apply(shout=1.0)
        assert llm.create_chat_completion(MESSAGES) == "mine"
        assert asked == [MESSAGES]
        gguflora.attach(llm, chat_template="adapter")
        assert chat(llm) == in_template(llm)
    assert llm.chat_handler is handler
