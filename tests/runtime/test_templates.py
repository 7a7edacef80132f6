"""Chat templates of strangers: the texts that llama-cpp-python makes, with limits of time, memory and access."""

import functools
import json
import os
import threading
import time

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from gguflora.errors import RequestError
from gguflora.runtime.chat_template import ChosenTemplate
from gguflora.runtime.templates import RENDERER, TemplateRenderer
from support import serving

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 中文 <b>&\ud83d\n  "},
    {
        "role": "assistant",
        "content": "ok",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]
TEMPLATES = [
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message['content'] | trim }}{{ eos_token }}"
    "\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- for m in messages %}\n    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% break %}{% endif %}\n"
    "    {{- m.content }}\n{%- endfor %}",
    "{% if tools %}{{ tools | tojson(indent=2) }}{% else %}none{% endif %}{{ tools is none }}{{ functions is none }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ undefined_one }}|{{ messages | length }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ m is defined }}",
    "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages[1]['content']) }}{{ messages[::-1][0].role | upper }}",
    "{{ strftime_now('%Y') | length }}{{ enable_thinking }}{{ messages[2] | items | list }}",
]
VARIABLES = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_llama_cpp_pythons(template, tools):
    expected = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")(
        messages=MESSAGES, tools=tools, enable_thinking=False
    )
    assert RENDERER.render(template, {**VARIABLES, "tools": tools, "enable_thinking": False}) == expected.prompt


@pytest.fixture(scope="module")
def renderer():
    made = TemplateRenderer(seconds=0.5, memory=64 << 20, max_chars=10_000, processes=2)
    yield made
    made.close()


HOSTILE = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.5 s"),
    "one long step": ("{{ (999999999 ** 99999) ** 99 }}", "longer than 0.5 s"),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "memory",
    ),
    "a long product": ("{{ 'x' * 99999999999 }}", "memory"),
    "a long text": ("{% for i in range(99999) %}xxxxxxxxxx{% endfor %}", "more than 10000 characters"),
    "a long line": ("{{ 'x' * 20000 }}", "more than 10000 characters"),
    "classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    "attr": ("{% set f = '{0.__class__}' | attr('format') %}{{ f(1) }}", ""),
    "indirect format": ("{{ ['{0.__class__.__bases__}'.format] | map('string') | first }}", ""),
    "files": ("{% include '/etc/passwd' %}", "loader"),
    "changes": ("{{ messages.append(1) }}", "unsafe|not callable|cannot"),
    "its own error": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "no template": ("{% if %}", "refuses"),
    "deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "refuses"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_limits(renderer, name):
    template, said = HOSTILE[name]
    begun = time.monotonic()
    if said:
        with pytest.raises(RequestError, match=said):
            renderer.render(template, VARIABLES)
    else:  # harmless: the text of a function
        assert len(renderer.render(template, VARIABLES)) < 1000
    assert time.monotonic() - begun < 20
    assert renderer.render("{{ messages | length }}", VARIABLES) == "3"


def test_processes_are_used_again_and_bounded(renderer):
    assert renderer.render("{{ x }}", {"x": 1}) == "1"
    before = [one._process.pid for one in renderer._idle]
    assert all(renderer.render("{{ x }}", {"x": number}) == str(number) for number in range(50))
    assert [one._process.pid for one in renderer._idle] == before
    threads = [threading.Thread(target=test_limits, args=(renderer, "loops")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(renderer._idle) <= 2
    assert renderer.render("{{ x }}", {"x": 1}) == "1"


def test_a_process_that_has_grown_is_replaced(renderer):
    renderer.render("{{ x }}", {"x": 1})
    before = {one._process.pid for one in renderer._idle}
    used = [one._process.pid for one in renderer._idle][-1]
    with pytest.raises(RequestError, match="memory"):
        renderer.render(HOSTILE["doubling"][0], VARIABLES)
    assert renderer.render("{{ x }}", {"x": 2}) == "2"
    assert {one._process.pid for one in renderer._idle} & before == before - {used}


def test_what_is_no_json_is_refused(renderer):
    with pytest.raises(RequestError, match="cannot be told"):
        renderer.render("{{ x }}", {"x": object()})
    assert renderer.render("{{ x }}", {"x": json.loads("[1]")}) == "[1]"


def test_a_fork_has_processes_of_its_own(renderer):
    renderer.render("{{ x }}", {"x": 1})
    RENDERER.render("{{ x }}", {"x": 1})
    child = os.fork()
    if child == 0:
        os._exit(0 if not RENDERER._idle and RENDERER.render("{{ x }}", {"x": 2}) == "2" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert RENDERER.render("{{ x }}", {"x": 3}) == "3"


def test_a_hostile_template_holds_no_other_client():
    with serving.serving() as http:
        chat = {"messages": [{"role": "user", "content": serving.QUESTION}], "temperature": 0, "max_tokens": 60}
        good = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
        http.engine._model._chosen = ChosenTemplate(HOSTILE["loops"][0])
        replies = []
        ask = functools.partial(http.post, "/v1/chat/completions", json=chat, timeout=60)
        hanging = threading.Thread(target=lambda: replies.append(ask()))
        hanging.start()
        answered = 0
        while hanging.is_alive():
            text = http.post("/v1/completions", json={"prompt": serving.PROMPT, "max_tokens": 1, "temperature": 0})
            answered += text.status_code == 200
        assert answered >= 3
        hanging.join()
        assert (replies[0].status_code, "longer than 2 s" in replies[0].text) == (400, True)
        http.engine._model._chosen = None
        assert http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == good
