"""Tool calls by OpenAI's client: every choice, several at once, in a stream, and back in a history."""

import json
import re

import openai
import pytest

from gguflora.engine.requests import Grammar
from gguflora.server.replies import Reply
from gguflora.server.schemas import Tool
from gguflora.server.settings import Settings
from gguflora.server.tool_calls import (
    GEMMA,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    PLAIN,
    QWEN_CODER,
    format_of,
)
from gguflora.server.tool_grammar import call_grammar
from support import serving
from support.real_models import model as real_model
from support.serving import QUESTION

USER = {"role": "user", "content": QUESTION}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"$ref": "#/$defs/Unit"}},
    "required": ["city", "unit"],
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": None}},
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}


@pytest.fixture(scope="module")
def http():
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048) as client:
        yield client


@pytest.fixture(scope="module")
def client(http):
    return serving.openai_client(http)


def ask(client, **fields):
    options = {"model": "base", "messages": [USER], "max_tokens": 600, "seed": 1, "tools": TOOLS, **fields}
    return client.chat.completions.create(**options)


def check_call(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert sorted(arguments) == ["city", "unit"]
        assert len(arguments["city"]) <= 8
        assert arguments["unit"] in {"C", "F"}
    else:
        assert (call.function.name, arguments) == ("get_time", {})
    assert (call.type, bool(call.id)) == ("function", True)


@pytest.mark.parametrize("seed", range(4))
def test_required(client, seed):
    choice = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert len(choice.message.tool_calls) == 1
    check_call(choice.message.tool_calls[0])


def test_named(client):
    named = {"type": "function", "function": {"name": "get_weather"}}
    (call,) = ask(client, tool_choice=named).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    check_call(call)


def test_several_calls(client):
    found = [len(ask(client, tool_choice="required", seed=seed).choices[0].message.tool_calls) for seed in range(4)]
    assert min(found) >= 1
    assert max(found) <= 16


def test_none_and_auto(client):
    plain = client.chat.completions.create(model="base", messages=[USER], max_tokens=60, temperature=0).choices[0]
    none = ask(client, tool_choice="none", max_tokens=60, temperature=0).choices[0]
    assert none.message.content == plain.message.content
    auto = ask(client, max_tokens=60).choices[0]  # of a model that never learned to call one
    assert auto.message.content or auto.message.tool_calls


def test_streamed_calls_are_whole_ones(client):
    with client.chat.completions.stream(
        model="base", messages=[USER], tools=TOOLS, tool_choice="required", seed=2, max_tokens=600
    ) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    for call in choice.message.tool_calls:
        check_call(call)
    chunks = list(ask(client, tool_choice="required", seed=2, stream=True))
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_calls_and_results_in_a_history(http):
    """The demo's template knows neither, and they become text of the chat, here by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": "It is noon."},
    ]
    as_text = [
        USER,
        {"role": "assistant", "content": '{"name": "get_time", "arguments": {}}'},
        {"role": "user", "content": "Result of get_time: It is noon."},
    ]
    template, special = serving.llama().metadata["tokenizer.chat_template"], http.engine.special_texts
    texts, _ = render_jinja_template(
        conversations=[as_text], chat_template=template, add_generation_prompt=True, **special
    )
    assert http.post("/apply-template", json={"messages": history}).json()["prompt"] == texts[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among the tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "same name"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]},
            "cannot be enforced",
        ),
        ({"messages": [{**USER, "name": "Eve"}]}, "no place for it"),
        ({"messages": [USER, {"role": "assistant", "content": "", "reasoning_content": "x"}, USER]}, "no place for it"),
    ],
    ids=str,
)
def test_bad_tools(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **fields)


XML = """<function=get_weather>
<parameter=city>
a { " }
</parameter>
<parameter=unit>
C
</parameter>
</function>"""
ANSWERS = [
    (HERMES, "Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.\n", 1),
    (HERMES, "<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", 2),
    (HERMES, "It is <b>noon</b>, <tool", "It is <b>noon</b>, <tool", 0),
    (HERMES, "<tool_call>\n{CALL}", "", 1),
    (HERMES, "<tool_call>none</tool_call>", "none</tool_call>", 0),
    (LLAMA3, "{CALL}", "", 1),
    (LLAMA3, '{"some": "json"}', '{"some": "json"}', 0),
    (LLAMA3, "It is {noon}", "It is {noon}", 0),
    (MISTRAL, "[TOOL_CALLS][{CALL}, {CALL}]", "", 2),
    (MISTRAL, "Yes [or no]", "Yes [or no]", 0),
    (GEMMA, "{CALL}\n{CALL}", "", 2),
    (PLAIN, " {CALL}", "", 1),
    (MISTRAL, "[TOOL_CALLS]get_weather[ARGS]{ARGS}[TOOL_CALLS]get_weather[ARGS]{ARGS}", "", 2),
    (MISTRAL_ARGS, "Yes.[TOOL_CALLS]get_weather[ARGS]{ARGS}", "Yes.", 1),
    (MISTRAL_ARGS, "[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{ARGS}", "", 1),
    (MISTRAL_ARGS, "[TOOL_CALLS][{CALL}]", "", 1),
    (MISTRAL_ARGS, "[TOOL_CALLS]unknown[ARGS]{}", "unknown[ARGS]{}", 0),
    (MISTRAL_ARGS, "[TOOL_CALLS]get_weather[ARGS]{", "get_weather[ARGS]{", 0),
    (QWEN_CODER, "Let me see.\n<tool_call>\n{XML}\n</tool_call>", "Let me see.\n", 1),
    (QWEN_CODER, "<tool_call>\n{XML}\n</tool_call>\n<tool_call>\n{XML}\n</tool_call>", "", 2),
    (QWEN_CODER, "It is:\n\n{XML}\n</tool_call>", "It is:\n\n", 1),
    (QWEN_CODER, "<tool_call>\n{CALL}\n</tool_call>", "", 1),
    (QWEN_CODER, "a < b, <function=f>", "a < b, <function=f>", 0),
    (QWEN_CODER, "<tool_call>\n<function=get_weather>\nnone", "<function=get_weather>\nnone", 0),
    (PLAIN, '{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', 0),
]


@pytest.mark.parametrize(("format_", "text", "content", "n_calls"), ANSWERS, ids=[text[:30] for _, text, *_ in ANSWERS])
def test_answers_are_read_however_they_are_cut(format_, text, content, n_calls):
    arguments = {"city": 'a { " }', "unit": "C"}
    text = text.replace("{CALL}", json.dumps({"name": "get_weather", format_.key: arguments}))
    text = text.replace("{ARGS}", json.dumps(arguments)).replace("{XML}", XML)
    for size in (1, 3, 7, 1000):
        reply = Reply(format=format_, tools={"get_weather": WEATHER})
        deltas = [reply.push(text[at : at + size]) for at in range(0, len(text), size)] + [reply.push("", last=True)]
        assert "".join(delta.get("content", "") for delta in deltas) == reply.content == content
        streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in streamed] == list(range(n_calls))
        assert [json.loads(call["function"]["arguments"]) for call in streamed] == [arguments] * n_calls
        assert len(reply.message().get("tool_calls", [])) == n_calls


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "on": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "integer"}},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["string", "integer"]},
        "choice": {"enum": ["1", "2"]},
        "unit": {"$ref": "#/$defs/Unit"},
        "free": {},
    },
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}


@pytest.mark.parametrize(
    ("argument", "text", "value"),
    [
        ("text", "3", "3"),
        ("text", " two\nlines\n", " two\nlines\n"),
        ("text", "a <b> </c>", "a <b> </c>"),
        ("n", "-3", -3),
        ("x", "3", 3),
        ("x", "2.5", 2.5),
        ("on", "true", True),
        ("list", "[1, 2]", [1, 2]),
        ("maybe", "null", None),
        ("maybe", "Null", "Null"),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("choice", "1", "1"),
        ("unit", "F", "F"),
        ("free", '{"a": 1}', {"a": 1}),
        ("unknown", "x", "x"),
    ],
)
def test_types_of_bare_arguments(argument, text, value):
    """Qwen3-Coder writes arguments without quotes: the schema tells a number from a text, as the grammar does."""
    import llguidance

    written = f"<function=f>\n<parameter={argument}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    reply = Reply(format=QWEN_CODER, tools={"f": SCHEMA})
    reply.push("<tool_call>\n" + written, last=True)
    (call,) = reply.calls
    assert json.loads(call["function"]["arguments"]) == {argument: value}
    assert QWEN_CODER.text([{"name": "f", "arguments": {argument: value}}]).endswith(written) or argument == "x"
    if argument == "unknown":
        return
    tools = [Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": SCHEMA}})]
    grammar = call_grammar(QWEN_CODER, tools, several=False, forced=True, literal=json.dumps)
    tokens = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokens, grammar.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    assert matcher.consume_tokens(tokens.tokenize_str(written))
    assert matcher.is_accepting()


@pytest.mark.parametrize(("format_", "mark"), [(MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]{}"), (QWEN_CODER, "<parameter=")])
def test_models_with_these_formats_call(format_, mark):
    """The demo's model does not know them, so it is held to them: what it writes are calls, whole and streamed."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{# " + mark.replace("{}", "") + " #}"
        "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    )
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048, chat_template=template) as http:
        client = serving.openai_client(http)
        choice = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        check_call(choice.message.tool_calls[0])
        chunks = list(ask(client, tool_choice="required", parallel_tool_calls=False, stream=True))
        (streamed,) = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
        assert streamed.function.arguments == choice.message.tool_calls[0].function.arguments
        prompt = http.post("/apply-template", json={"messages": [USER], "tools": TOOLS, "tool_choice": "required"})
        assert prompt.json()["prompt"] == f"user: {QUESTION}\nget_weather\nget_time\n{format_.begin}"
        prefill = [USER, {"role": "assistant", "content": "The fox"}]
        prompt = http.post("/apply-template", json={"messages": prefill, "tools": TOOLS}).json()["prompt"]
        assert prompt == f"user: {QUESTION}\nassistant: The fox"  # the tools stood behind it


def test_tools_beside_a_form_of_the_answer(client):
    """The answer is a call or has the form, and a call that is asked for needs no form."""
    schema = {"type": "object", "properties": {"legs": {"type": "integer"}}, "required": ["legs"]}
    form = {"type": "json_schema", "json_schema": {"name": "legs", "schema": schema, "strict": True}}
    kinds = set()
    for seed in range(3):
        options = {"seed": seed, "temperature": 1.5, "parallel_tool_calls": False}
        choice = ask(client, response_format=form, **options).choices[0]
        kinds.add(choice.finish_reason)
        if choice.message.tool_calls:
            for call in choice.message.tool_calls:
                check_call(call)
        else:
            assert list(json.loads(choice.message.content)) == ["legs"]
    assert kinds <= {"tool_calls", "stop"}
    forced = ask(client, response_format=form, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert forced.finish_reason == "tool_calls"
    none = ask(client, response_format=form, tool_choice="none").choices[0]
    assert list(json.loads(none.message.content)) == ["legs"]
    expression = ask(client, extra_body={"guided_regex": "[a-c]{3}"}, seed=3).choices[0].message
    assert expression.tool_calls or len(expression.content) == 3


def test_older_form_of_functions(client, http):
    """``functions``, ``function_call`` and messages of the role ``function``, as OpenAI had them before tools."""
    functions = [tool["function"] for tool in TOOLS]
    common = {"tools": openai.omit, "functions": functions}
    choice = ask(client, **common, function_call={"name": "get_weather"}).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("function_call", None)
    assert (choice.message.tool_calls, choice.message.function_call.name) == (None, "get_weather")
    assert sorted(json.loads(choice.message.function_call.arguments)) == ["city", "unit"]
    chunks = list(ask(client, **common, function_call={"name": "get_weather"}, stream=True))
    (called,) = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert called.arguments == choice.message.function_call.arguments
    assert chunks[-1].choices[0].finish_reason == "function_call"
    plain = ask(client, tools=openai.omit, max_tokens=40, temperature=0).choices[0].message.content
    assert ask(client, **common, function_call="none", max_tokens=40, temperature=0).choices[0].message.content == plain
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "get_time", "content": "It is noon."},
    ]
    newer = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": "It is noon."},
    ]
    prompts = [http.post("/apply-template", json={"messages": each}).json()["prompt"] for each in (older, newer)]
    assert prompts[0] == prompts[1]
    as_tools = {"messages": [USER], "tools": TOOLS}
    as_functions = {"messages": [USER], "functions": functions}
    prompts = [http.post("/apply-template", json=each).json()["prompt"] for each in (as_tools, as_functions)]
    assert prompts[0] == prompts[1]
    for path in ("/v1/messages", "/v1/responses"):
        body = {"messages": [USER], "input": "x", "max_tokens": 5, "functions": functions}
        body.pop("input" if path == "/v1/messages" else "messages")
        reply = http.post(path, json=body)
        assert reply.status_code == 400
        assert "functions" in reply.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}], "tools": TOOLS}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"functions": [{"name": "f", "parameters": {"type": "x"}}]}, "functions"),
        ({"functions": [{"parameters": {}}]}, "functions.0.name"),
    ],
    ids=str,
)
def test_bad_functions(http, fields, param):
    reply = http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 5, **fields})
    assert (reply.status_code, reply.json()["error"]["param"].split(".literal")[0].split(".Named")[0]) == (400, param)


def test_calls_after_thoughts():
    """A grammar of calls begins behind the model's thoughts; a forced call does not cut them off."""
    from gguflora.server.chat_prompt import _after_thoughts

    thought = "Maybe <tool_call> would do.</think>\n\n"
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    for format_, call in ((HERMES, "<tool_call>"), (LLAMA3, '{"name": "'), (QWEN_CODER, "<function=")):
        made = _after_thoughts(call_grammar(format_, tools, several=True, literal=json.dumps), "</think>")
        assert not any(re.search(each, thought) for each in made.triggers)
        assert any(re.search(each, thought + call) for each in made.triggers)
    forced = call_grammar(HERMES, tools, several=True, literal=json.dumps, forced=True, tagged=True)
    made = _after_thoughts(forced, "</think>")
    assert made.triggers == ("</think>()",)
    import llguidance

    tokens = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokens, made.text, log_level=0)
    assert matcher.consume_tokens(tokens.tokenize_str('\n\n<tool_call>\n{"name": "get_time", "arguments": {}}'))


def test_reasoning_is_split_off():
    for text, in_thought in (("<think>\nHm.\n</think>\n\nNoon.", False), ("Hm.\n</think>\n\nNoon.", True)):
        for size in (1, 5, 1000):
            reply = Reply(("<think>", "</think>"), in_thought)
            deltas = [reply.push(text[at : at + size]) for at in range(0, len(text), size)]
            deltas.append(reply.push("", last=True))
            assert "".join(delta.get("content", "") for delta in deltas) == reply.message()["content"] == "Noon."
            thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
            assert thought.strip() == reply.message()["reasoning_content"].strip() == "Hm."
    plain = Reply(("<think>", "</think>"))
    assert plain.push("Noon <think>") == {"content": "Noon <think>"}


@pytest.mark.parametrize(
    "format_",
    [HERMES, QWEN_CODER, LLAMA3, MISTRAL, MISTRAL_ARGS, GEMMA, PLAIN],
    ids=lambda format_: format_.name,
)
@pytest.mark.parametrize("several", [False, True])
def test_grammars_take_what_models_write(format_, several):
    """By llguidance's own matcher; and not what is no call."""
    import llguidance

    tools = [Tool.model_validate(tool) for tool in TOOLS]
    grammar = call_grammar(format_, tools, several=several, forced=True, literal=json.dumps)
    assert isinstance(grammar, Grammar)
    tokens = llguidance.LLTokenizer("byte")
    calls = [{"name": "get_time", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "x", "unit": "F"}}]

    def accepts(text):
        matcher = llguidance.LLMatcher(tokens, grammar.text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.consume_tokens(tokens.tokenize_str(text)) and matcher.is_accepting()

    for number in (0, 1):
        assert accepts(format_.text(calls[number : number + 1]).removeprefix(format_.begin))
    assert accepts(format_.text(calls).removeprefix(format_.begin)) == several
    for wrong in ({"name": "get_time", "arguments": {"x": 1}}, {"name": "other", "arguments": {}}):
        assert not accepts(format_.text([wrong]).removeprefix(format_.begin))


def test_formats_of_templates():
    assert format_of("... <tool_call></tool_call> ...") is HERMES
    assert format_of("<tool_call>\\n<function=example>\\n<parameter=p>") is QWEN_CODER
    assert format_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert format_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is MISTRAL_ARGS
    assert format_of("Environment: ipython\\n <|python_tag|>") is LLAMA3
    assert format_of("<start_of_turn>model") is GEMMA
    assert format_of("{{ messages }}") is PLAIN


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_calls():
    from gguflora.engine import Engine
    from gguflora.server.chat_prompt import chat_prompt
    from gguflora.server.schemas import ChatBody

    with Engine(real_model("smollm2"), n_ctx=1024, threads=2) as engine:
        body = ChatBody(messages=[{"role": "user", "content": "What is the weather in Paris?"}], tools=TOOLS,
                        tool_choice="required", parallel_tool_calls=False)  # fmt: skip
        prompt = chat_prompt(engine, body)
        from gguflora.engine import Request, Sampling

        answer = engine.submit(Request(prompt.tokens, sampling=Sampling(temperature=0, grammar=prompt.grammar))).text()
        reply = prompt.reply()
        reply.push(answer, last=True)
        assert len(reply.calls) == 1
        assert json.loads(reply.calls[0]["function"]["arguments"])["city"] in {"Paris", "Paris, F"}
