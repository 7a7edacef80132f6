"""Bodies that are small to send and costly to read are refused by their bytes, before anything reads them."""

import asyncio
import json

import pytest
from pydantic import TypeAdapter, ValidationError

from gguflora.server import bodies
from gguflora.server.bodies import check_body, receive_body
from gguflora.server.errors import Failure
from gguflora.server.schemas import ChatBody, CompletionBody, LoraScales
from support import serving


def refusal(body):
    with pytest.raises(Failure) as caught:
        check_body(body)
    return caught.value.code, caught.value.status


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b"{}, " * 500_000 + b"{}]}",
        b'{"prompt": [' + b'"a",' * 500_000 + b'"a"]}',
        b'{"prompt": [' + rb'"\\",' * 390_000 + b'"a"]}',
        b"[" + b"0," * 1_000_000 + b"0]",
        b"[" * 2_000_000,
        b"[" * 200 + b"]" * 200,
        b'{"a":' * 400_000,
        b"{" + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}",
    ],
)
def test_bodies_of_many_values(body):
    assert refusal(body) == ("body_too_complex", 400)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_texts_in_other_encodings(encoding):
    assert refusal('{"prompt": "é∀"}'.replace("∀" if encoding == "latin-1" else "", "").encode(encoding)) == (
        "invalid_json",
        400,
    )


@pytest.mark.parametrize(
    "value",
    [
        "a, b: {c} [d]" * 100_000,
        '"' * 900_000,
        "\\" * 900_000,
        '\\"' * 400_000 + "\\",
        [1] * 200_000,
        {"messages": [{"role": "user", "content": "x"}] * 1024},
        "é中😀" * 100_000,
    ],
)
def test_long_texts_and_lists_of_tokens_pass(value):
    check_body(json.dumps({"prompt": value}).encode())
    check_body(json.dumps({"prompt": value}, ensure_ascii=False).encode())


def test_every_structure_inside_texts_is_text():
    inside = json.dumps({"a": [1, 2, {"b": '\\"}]'}]})
    for _ in range(4):
        inside = json.dumps([inside, inside])
    check_body(inside.encode())


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionBody, {"prompt": ["a", *[0] * 10_000]}),
        (CompletionBody, {"prompt": [{}] * 10_000}),
        (CompletionBody, {"prompt": [[1], *[["a"] * 100] * 100]}),
        (CompletionBody, {"prompt": "a", "stop": [0] * 10_000}),
        (CompletionBody, {"prompt": "a", "lora": [{}] * 10_000}),
        (CompletionBody, {"prompt": "a", "logit_bias": {f"x{n}": "y" for n in range(10_000)}}),
        (ChatBody, {"messages": [0] * 10_000}),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * 10_000}]}),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * 10_000}]}),
        (LoraScales, [0] * 10_000),
    ],
)
def test_a_list_of_wrong_items_makes_few_errors(model, body):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    assert len(caught.value.errors()) < 20


def test_right_bodies_are_read_as_before():
    body = CompletionBody.model_validate({"prompt": [[1, 2], [3]], "logit_bias": {"5": 1.5}, "stop": "x"})
    assert (body.prompts(), body.logit_bias, body.stop) == ([[1, 2], [3]], [(5, 1.5)], ["x"])


def receiving(*messages):
    left = list(messages)

    async def receive():
        if not left:
            await asyncio.sleep(60)
        return left.pop(0)

    return receive


def test_a_body_arrives_whole_or_not_at_all():
    parts = [{"type": "http.request", "body": b'{"a":', "more_body": True}, {"type": "http.request", "body": b"1}"}]

    async def run():
        receive = await receive_body(receiving(*parts, {"type": "http.disconnect"}), 100, 5)
        assert (await receive())["body"] == b'{"a":1}'
        assert (await receive())["type"] == "http.disconnect"
        with pytest.raises(Failure, match="limit is 6 bytes") as large:
            await receive_body(receiving(*parts), 6, 5)
        with pytest.raises(Failure, match=r"within 0\.01 s") as slow:
            await receive_body(receiving(parts[0]), 100, 0.01)
        assert (large.value.status, slow.value.status) == (413, 408)

    asyncio.run(run())


def test_prompts_are_counted_before_they_are_split(monkeypatch):
    with serving.serving() as http:
        calls = []
        monkeypatch.setattr(http.engine, "tokenize", lambda *_, **__: calls.append(1) or [1])
        reply = http.post("/v1/completions", json={"prompt": ["a"] * 20_000})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "too_many_answers")
        assert not calls
        assert http.post("/v1/completions", content=b"[" * 100_000).json()["error"]["code"] == "body_too_complex"
        monkeypatch.undo()
        reply = http.post("/v1/completions", json={"prompt": "ab " * 300_000})
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "at least" in reply.json()["error"]["message"]  # refused by its bytes, not by its tokens


def test_the_bound_of_tokens_holds():
    with serving.engine() as engine:
        for text in ("The quick brown fox. " * 50, "é中 \n\n" * 50, "", " " * 100, "</s><s>" * 30):
            least = engine._model.fewest_tokens(text)
            assert least <= len(engine.tokenize(text, add_bos=False)), text
        assert least > 5
    assert bodies.MAX_VALUES > 1 << 17  # a prompt that fills a context of 131072 tokens


SURROGATES = [
    {"\ud800": 1},
    {"model": "\ud800"},
    {"prompt": "\ud800", "stop": ["\ud800"]},
    {"prompt": {"\ud800": "\ud800"}},
    {"prompt": "a", "logit_bias": {"\ud800": 1}},
    {"prompt": "a", "lora": [{"\ud800": 1}]},
    {"prompt": "a", "response_format": {"type": "\ud800"}},
    {"messages": [{"role": "\ud800", "content": "\ud800", "\udfff": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "\ud800", "text": "\ud800"}]}]},
    {"input": "\ud800", "tools": [{"type": "\ud800"}]},
    {"input": [{"\ud800": "\ud800"}]},
    {"query": "\ud800", "documents": [{"\ud800": 1}]},
    {"content": "\ud800", "\ud800": 0},
    {"lora_name": "\ud800", "lora_path": "\ud800"},
    {"tokens": ["\ud800"]},
    ["\ud800", {"\ud800": 1}],
]


def test_halves_of_surrogate_pairs():
    """No body is an error of the server's."""
    with serving.serving() as http:
        described = http.get("/openapi.json").json()["paths"]
        for path in [path for path, methods in described.items() if "post" in methods]:
            for body in SURROGATES:
                answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
                assert answer.status_code < 500, (path, body, answer.text)
