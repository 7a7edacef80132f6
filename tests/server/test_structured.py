"""Answers that must look like something: schemas, expressions, choices and grammars, by every server's field."""

import json
import re
from typing import Literal

import openai
import pydantic
import pytest

from gguflora.server.settings import Settings
from gguflora.server.structured import closed_schema
from support import serving
from support.serving import PROMPT, QUESTION

CHAT = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 400, "seed": 3}
SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 2, "maximum": 8},
        "diet": {"enum": ["mice", "fish"]},
    },
    "required": ["animal", "legs", "diet"],
}


class Animal(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    legs: int = pydantic.Field(ge=2, le=8)
    diet: Literal["mice", "fish"]
    parent: "Animal | None" = None
    tags: list[Literal["wild", "tame"]] = pydantic.Field(max_length=2)


CHAIN = {
    "$ref": "#/$defs/a0",
    "$defs": {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(3000)} | {"a3000": {}},
}
"""A schema whose references overflow the stack of llguidance."""


@pytest.fixture(scope="module")
def http():
    with serving.serving(Settings(max_tokens=4096), n_ctx=2048) as client:
        yield client


@pytest.fixture(scope="module")
def client(http):
    return serving.openai_client(http)


def answer(http, path="/v1/chat/completions", **fields):
    body = CHAT if "chat" in path else {"prompt": PROMPT, "max_tokens": 400, "seed": 3}
    response = http.post(path, json={**body, **fields})
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["text"] if "text" in choice else choice["message"]["content"]


def check_animal(text):
    found = json.loads(text)
    assert list(found) == ["animal", "legs", "diet"]
    assert len(found["animal"]) <= 12
    assert found["legs"] in range(2, 9)
    assert found["diet"] in {"mice", "fish"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"grammar": {"type": "json", "value": SCHEMA}},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_json_schema(http, path, fields):
    check_animal(answer(http, path, **fields))
    check_animal(answer(http, path, temperature=2.0, top_p=1.0, min_p=0.0, **fields))


def test_parse_by_openais_client(client):
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model="shout", messages=CHAT["messages"], response_format=Animal, max_tokens=1500, seed=seed
        )
        assert isinstance(parsed.choices[0].message.parsed, Animal)


def test_an_answer_that_is_cut_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="base", messages=CHAT["messages"], response_format=Animal, max_tokens=3)


def test_whole_numbers_end(http):
    """A model that likes digits stops at the largest number that JSON's readers keep."""
    digits = [[token, 60] for token in http.engine.tokenize("1", add_bos=False)]
    text = answer(http, guided_json={"type": "integer"}, logit_bias=digits, temperature=0)
    assert 10**14 < int(text) < 2**53


def test_json_object(http):
    """Of any object; one that ends at its first chance is short."""
    close = [[token, 50] for token in http.engine.tokenize('"}', add_bos=False)]
    for seed in range(3):
        text = answer(http, response_format={"type": "json_object"}, seed=seed, logit_bias=close)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[A-C]{3}-[0-9]+"}, "[A-C]{3}-[0-9]+"),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, "(yes|no)!"),
        ({"grammar": {"type": "regex", "value": "a{2,5}"}}, "a{2,5}"),
        ({"guided_choice": ["a fox", 'a "hen"\n', "日本"]}, 'a fox|a "hen"\n|日本'),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"grammar": 'root ::= "yes" | "no" [0-9]'}, "yes|no[0-9]"),
        ({"guided_grammar": 'root ::= ("ab")+ "c"'}, "(ab)+c"),
        ({"guided_grammar": 'start: WORD ("," WORD)?\nWORD: /[x-z]{2}/'}, "[x-z]{2}(,[x-z]{2})?"),
        ({"structured_outputs": {"grammar": 'root ::= "z"'}}, "z"),
        (
            {"grammar": 'root ::= a-b [\\u0030-\\u0032]+ "\\U0000002d\\u65e5"\na-b ::= ("x" # one\n | "y")?'},
            "[xy]?[0-2]+-日",
        ),
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_expressions_choices_and_grammars(http, fields, pattern):
    for seed in range(3):
        text = answer(http, seed=seed, temperature=1.5, **fields)
        assert re.fullmatch(pattern, text), text


def test_grammars_that_keep_llama_cpp_busy(http):
    """llama.cpp's own matcher takes minutes for the first token of each."""
    ambiguous = "root ::= " + " | ".join(['"a" root'] * 500) + ' | "b"'
    assert re.fullmatch("a*b?", answer(http, grammar=ambiguous, max_tokens=5))
    optional = 'root ::= "a"? ' + '"a"? ' * 3000 + '"b"'
    response = http.post("/v1/chat/completions", json={**CHAT, "grammar": optional})
    assert response.status_code == 400
    assert "grammar: Parser Error: Current row has" in response.json()["error"]["message"]


def test_streams_and_several_answers(http):
    body = {**CHAT, "json_schema": SCHEMA, "n": 3, "temperature": 1.5}
    texts = [choice["message"]["content"] for choice in http.post("/v1/chat/completions", json=body).json()["choices"]]
    streamed = [""] * 3
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                streamed[choice["index"]] += choice["delta"].get("content") or ""
    for text in [*texts, *streamed]:
        check_animal(text)


def test_other_requests_are_free(http):
    plain = {"messages": CHAT["messages"], "max_tokens": 60, "temperature": 0}
    wanted = http.post("/v1/chat/completions", json=plain).json()["choices"]
    same = {**plain, "response_format": {"type": "text"}, "grammar": "", "json_schema": {}, "guided_json": None}
    assert http.post("/v1/chat/completions", json=same).json()["choices"] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grammar": "root ::= missing"}, "'grammar' cannot be enforced: Rule 'missing' not found"),
        ({"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000}, "nested too deeply"),
        ({"guided_grammar": 'root ::= "a"' + " " * (1 << 16)}, "'guided_grammar' has 65548 characters"),
        ({"grammar": 'root ::= "\\'}, "'grammar' cannot be enforced"),
        ({"guided_json": CHAIN}, "'guided_json' cannot be enforced: its rules or references go deeper"),
        ({"guided_grammar": f"start: %json {json.dumps(CHAIN)}"}, "go deeper"),
        (
            {"guided_grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'},
            "deeper",
        ),
        ({"grammar": 'root ::= "\\ud800"'}, "'grammar' cannot be enforced"),
        ({"guided_grammar": "start: missing"}, "'guided_grammar' cannot be enforced"),
        ({"guided_regex": "(a"}, "'guided_regex' cannot be enforced"),
        ({"guided_json": "{"}, "'guided_json' is not a JSON schema"),
        ({"guided_json": "[]"}, "'guided_json' is not a JSON schema"),
        ({"guided_json": {"type": "banana"}}, "'guided_json' cannot be enforced"),
        ({"guided_json": {"type": "string", "contentEncoding": "x", "not": {"const": 1}}}, "cannot be enforced"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "needs 'json_schema'"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "strict": True}}, "'strict'"),
        ({"grammar": {"type": "xml", "value": "x"}}, "'grammar' is a text in GBNF"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "'guided_json' and 'guided_regex' both"),
        ({"json_schema": {"$ref": "#/$defs/missing"}}, "'json_schema' cannot be enforced"),
    ],
    ids=str,
)
def test_bad_structures(http, fields, message):
    response = http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_schemas_are_closed_where_they_say_nothing():
    inner = {"type": "object", "properties": {"properties": {"type": "object", "properties": {}}}}
    closed = closed_schema({"$defs": {"a": inner}, "items": inner, "const": inner})
    for each in (closed["$defs"]["a"], closed["items"]):
        assert each["additionalProperties"] is False
        assert each["properties"]["properties"]["additionalProperties"] is False
    assert closed["const"] == inner
    assert closed_schema({"type": ["integer", "null"]})["maximum"] == 2**53 - 1
    assert closed_schema({"type": "integer", "minimum": 3}) == {"type": "integer", "minimum": 3}
    assert closed_schema({"properties": {}, "additionalProperties": True})["additionalProperties"] is True
