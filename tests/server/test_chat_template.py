"""What a chat's fields do in the prompt, by transformers' rendering of real templates."""

import json

import pytest

from gguflora.errors import GgufloraError
from gguflora.server.chat_prompt import chat_prompt
from gguflora.server.chat_template import traits_of
from gguflora.server.errors import Failure
from gguflora.server.schemas import ChatBody
from support import serving
from support.serving import QUESTION

CHATML = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
    "\nAnswer in <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{%- if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{- m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TYPED = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": QUESTION}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def http():
    with serving.serving() as client:
        yield client


class OneTemplate:
    """An engine's chats with a template of the test's own."""

    def __init__(self, engine, template):
        self._engine = engine
        self.chat_template = template

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def chat_text(self, messages, *, to_answer=True, **options):
        return self._engine._model.chat_text(messages, template=self.chat_template, to_answer=to_answer, **options)


@pytest.fixture(scope="module")
def plain():
    with serving.engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def chatml(plain):
    return OneTemplate(plain, CHATML)


def text_of(engine, **fields):
    tokens = chat_prompt(engine, ChatBody.model_validate({"messages": [USER], **fields})).tokens
    return engine.detokenize(tokens).decode()


def rendered(template, messages, **options):
    """By transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **options)
    return texts[0]


def test_traits(chatml, plain):
    known, unknown, typed = traits_of(chatml), traits_of(plain), traits_of(OneTemplate(plain, TYPED))
    assert (known.tools, known.calls, known.results, known.names, known.reasoning) == (True, dict, True, True, True)
    assert (known.thinking, known.format.name, known.system) == (("<think>", "</think>"), "Hermes", True)
    assert (unknown.tools, unknown.calls, unknown.names, unknown.system) == (False, None, False, False)
    assert (typed.typed, known.typed, unknown.typed) == (True, False, False)


def test_typed_content_reaches_its_template(plain):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    engine = OneTemplate(plain, TYPED)
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": parts}]
    assert text_of(engine, messages=messages) == "[system]Be.[user]one two[assistant]"
    assert text_of(engine) == f"[user]{QUESTION}[assistant]"
    assert text_of(engine, tools=TOOLS).startswith("[system]You have access to functions.")


def test_tools_calls_and_results_are_transformers(chatml):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Eve"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
    ]
    as_sent = json.loads(json.dumps(history))
    as_sent[2]["tool_calls"][0]["function"]["arguments"] = json.dumps({"x": "é"})
    as_sent[2]["content"] = None
    wanted = rendered(CHATML, history, tools=TOOLS, add_generation_prompt=True)
    assert text_of(chatml, messages=as_sent, tools=TOOLS) == wanted
    assert "é" in wanted
    assert "Eve" in wanted
    assert text_of(chatml, messages=as_sent, tools=TOOLS, tool_choice="required") == wanted + "<tool_call>\n"
    assert "Tools:" not in text_of(chatml, messages=as_sent, tools=TOOLS, tool_choice="none")


def test_an_answer_that_is_spelled_like_the_template_is_continued(chatml, plain):
    """The text of the last message may stand in what the template writes after it, too."""
    start = rendered(CHATML, [USER, {"role": "assistant", "content": "zzz"}]).split("zzz")[0]
    for content in ("im", "<", "end|", "|im_end|>"):
        assert text_of(chatml, messages=[USER, {"role": "assistant", "content": content}]) == start + content
    parts = [{"type": "text", "text": "as"}, {"type": "text", "text": "\n?"}]
    typed = OneTemplate(plain, TYPED + "<as\n?>")
    found = text_of(typed, messages=[USER, {"role": "assistant", "content": parts}])
    assert found == f"[user]{QUESTION}[assistant]as\n?"
    trimming = OneTemplate(plain, CHATML.replace("{{- m.content }}", "{{- m.content | trim }}"))
    assert text_of(trimming, messages=[USER, {"role": "assistant", "content": "It eats "}]) == start + "It eats"


def test_a_call_is_no_answer_to_continue(plain):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked = text_of(plain, messages=[USER, {"role": "assistant", "content": "So:", "tool_calls": [call]}])
    assert '"x": 1' in asked  # as text, since this template knows no calls
    assert asked.endswith("}}A:")  # the answer that follows is a new one


@pytest.mark.parametrize("content", ["The fox", "It eats ", " So: \n"])
def test_a_last_answer_is_continued(chatml, content):
    messages = [USER, {"role": "assistant", "content": content}]
    wanted = rendered(CHATML, messages, continue_final_message=True)
    assert text_of(chatml, messages=messages) == wanted
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert text_of(chatml, messages=messages, **options) == wanted
    assert wanted.endswith(content)
    ended = rendered(CHATML, messages, add_generation_prompt=True)
    assert text_of(chatml, messages=messages, add_generation_prompt=True) == ended
    closed = rendered(CHATML, messages, add_generation_prompt=False)
    assert text_of(chatml, messages=messages, add_generation_prompt=False) == closed


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}[u]{{ m.content | trim }}"
    "{% elif m.role == 'assistant' %}[a]{{ m.content }}{% endif %}{% endfor %}"
)


def test_no_message_vanishes(plain, chatml):
    """A template without system messages gets them with the next message of a user; an unknown role is refused."""
    system, engine = {"role": "system", "content": "Be brief."}, OneTemplate(plain, NO_SYSTEM)
    answer = {"role": "assistant", "content": "Mice."}
    assert text_of(engine, messages=[system, USER]) == f"[u]Be brief.\n\n{QUESTION}"
    history = [USER, answer, system, {**system, "role": "developer"}, USER]
    assert text_of(engine, messages=history) == f"[u]{QUESTION}[a]Mice.[u]Be brief.\n\nBe brief.\n\n{QUESTION}"
    assert text_of(engine, messages=[USER, system]) == f"[u]{QUESTION}[u]Be brief."
    assert text_of(engine, messages=[{**USER, "content": " x \n"}]) == "[u]x"
    typed = OneTemplate(
        plain, TYPED.replace("[{{ m.role }}]", "{% if m.role == 'user' %}[u]{% else %}{% continue %}{% endif %}")
    )
    assert text_of(typed, messages=[system, USER]) == f"[u]Be brief.\n\n{QUESTION}[assistant]"
    robot = {"role": "robot", "content": "Beep."}
    assert "Beep." in text_of(chatml, messages=[robot, USER])
    with pytest.raises(Failure, match="does not show this message of the role 'robot'"):
        text_of(engine, messages=[robot, USER])
    first_only = OneTemplate(
        plain, "{{ messages[0].content }}" + NO_SYSTEM.replace("for m in messages", "for m in messages[1:]")
    )
    with pytest.raises(Failure, match="does not show this message of the role 'system'"):
        text_of(first_only, messages=[USER, system, USER])


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "output_text", None])
def test_parts_that_are_no_text_are_refused_by_name(http, kind):
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, "data": "x"}]}
    for path in ("/v1/chat/completions", "/apply-template"):
        refused = http.post(path, json={"messages": [USER, message]})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], repr(kind) in error["message"]) == ("messages.1.content", True), error


def test_variables_of_the_template(chatml):
    assert text_of(chatml, enable_thinking=False).endswith("</think>\n\n")
    assert text_of(chatml, chat_template_kwargs={"enable_thinking": False}).endswith("</think>\n\n")
    assert text_of(chatml, enable_thinking=True).endswith("<|im_start|>assistant\n")


def test_variables_that_no_template_reads(plain):
    assert text_of(plain, enable_thinking=False) == text_of(plain)
    for fields in (
        {"enable_thinking": True},
        {"chat_template_kwargs": {"style": "brief"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"enable_thinking": []}},
        {"chat_template_kwargs": {"reasoning_effort": {"level": "high"}}},
        {"continue_final_message": True, "add_generation_prompt": True},
    ):
        with pytest.raises((Failure, GgufloraError)):
            text_of(plain, **fields)


def test_variables_beside_transformers_own_statement(plain):
    engine = OneTemplate(
        plain, CHATML.replace("{{- m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    )
    assert traits_of(engine).variables == traits_of(OneTemplate(plain, CHATML)).variables > {"enable_thinking"}
    assert text_of(engine, enable_thinking=False).endswith("</think>\n\n")


def test_reasoning_of_the_answer(chatml):
    def reply(**fields):
        prompt = chat_prompt(chatml, ChatBody.model_validate({"messages": [USER], **fields}))
        reader = prompt.reply()
        reader.push("<think>Hm.</think>Noon.", last=True)
        return reader.message()

    assert (reply()["content"], reply()["reasoning_content"]) == ("Noon.", "Hm.")
    assert reply(reasoning_format="none")["content"] == "<think>Hm.</think>Noon."
    assert "reasoning_content" not in reply(include_reasoning=False)


def test_the_server_continues_an_answer(http):
    whole = {"messages": [USER], "max_tokens": 60, "temperature": 0}
    text = http.post("/v1/chat/completions", json=whole).json()["choices"][0]["message"]["content"]
    start, rest = text.split(" mice")[0], " mice" + text.split(" mice")[1]
    begun = {**whole, "messages": [USER, {"role": "assistant", "content": start}]}
    found = http.post("/v1/chat/completions", json=begun).json()["choices"][0]["message"]["content"]
    assert found == rest


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("Where ", "is it?")]}]},
        {"messages": [USER, {"role": "assistant", "content": "The"}]},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "required"},
        {"messages": [USER, {"role": "assistant", "content": "The"}, USER], "add_generation_prompt": False},
    ],
)
def test_apply_template_shows_what_a_chat_gets(http, fields):
    body = {"messages": [USER], **fields}
    prompt = http.post("/apply-template", json=body).json()["prompt"]
    usage = http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]
    counted = http.post("/v1/messages/count_tokens", json={"max_tokens": 1, "messages": [USER]}).json()
    tokens = serving.llama().tokenize(prompt.encode(), add_bos=False, special=True)
    assert usage["prompt_tokens"] == len(tokens)
    assert counted["input_tokens"] == len(tokens) or fields
    # the cells of the chat are those of the prompt: all but the last token are found there
    again = http.post("/completion", json={"prompt": tokens, "n_predict": 1}).json()
    assert again["tokens_cached"] == len(tokens) - 1


def test_apply_template_refuses_what_a_chat_refuses(http):
    for fields in ({"model": "nobody"}, {"tool_choice": "required"}, {"enable_thinking": True}):
        body = {"messages": [USER], **fields}
        refused, chat = (http.post(path, json=body) for path in ("/apply-template", "/v1/chat/completions"))
        assert (refused.status_code, refused.json()) == (chat.status_code, chat.json())
        assert refused.status_code == (404 if "model" in fields else 400)
