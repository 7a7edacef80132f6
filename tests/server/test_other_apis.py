"""Anthropic's Messages and OpenAI's Responses, read strictly by their own clients; the answers are llama.cpp's."""

import json

import anthropic
import openai
import pytest

from gguflora.errors import DivergedError
from gguflora.server.settings import Settings
from support import serving
from support.serving import QUESTION, expected_text

MESSAGES = [{"role": "user", "content": QUESTION}]
WANTED = {"max_tokens": 60, "temperature": 0}
ASKED = {"max_tokens": 60, "extra_body": {"temperature": 0}}  # newer clients do not know the temperature


@pytest.fixture(scope="module")
def http():
    with serving.serving(Settings(api_key="secret"), n_ctx=2048) as client:
        client.headers["X-Api-Key"] = "secret"
        yield client


@pytest.fixture(scope="module")
def claude(http):
    return anthropic.Anthropic(
        base_url=str(http.base_url), api_key="secret", max_retries=0, _strict_response_validation=True
    )


@pytest.fixture(scope="module")
def client(http):
    return openai.OpenAI(
        base_url=str(http.base_url.join("/v1")), api_key="secret", max_retries=0, _strict_response_validation=True
    )


def test_message(claude):
    message = claude.messages.create(model="shout", messages=MESSAGES, **ASKED)
    [block] = message.content
    assert (block.type, block.text) == ("text", expected_text("shout"))
    assert (message.model, message.role, message.stop_reason) == ("shout", "assistant", "end_turn")
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == 13
    assert message.usage.output_tokens > 5
    short = claude.messages.create(model="shout", messages=MESSAGES, **{**ASKED, "max_tokens": 3})
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
    assert expected_text("shout").startswith(short.content[0].text)


def test_stop_sequence(claude):
    message = claude.messages.create(model="base", messages=MESSAGES, stop_sequences=["forest", "mice"], **ASKED)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "mice")
    assert message.content[0].text == expected_text().split("mice")[0]
    with claude.messages.stream(model="base", messages=MESSAGES, stop_sequences=["mice"], **ASKED) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "mice")


def test_streamed_message(claude, http):
    with claude.messages.stream(model="verse", messages=MESSAGES, **ASKED) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == final.content[0].text == expected_text("verse")
    assert len(texts) > 5
    assert (final.stop_reason, final.model) == ("end_turn", "verse")
    assert final.usage.output_tokens >= len(texts) - 1
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == 13
    body = {"model": "verse", "messages": MESSAGES, "stream": True, **WANTED}
    lines = http.post("/v1/messages", json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
    assert (start["type"], start["message"]["usage"]["input_tokens"]) == ("message_start", 13)


def test_system_and_blocks(claude, http):
    blocks = [{"type": "text", "text": QUESTION[:5], "cache_control": {"type": "ephemeral"}}]
    blocks.append({"type": "text", "text": QUESTION[5:]})
    same = claude.messages.create(model="base", messages=[{"role": "user", "content": blocks}], **ASKED)
    assert same.content[0].text == expected_text()
    chat = [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "assistant", "content": "Hm."}, *MESSAGES]
    wanted = http.post("/v1/chat/completions", json={"messages": chat, "model": "base", **WANTED}).json()
    asked = claude.messages.create(
        model="base", system=[{"type": "text", "text": "Be brief."}], messages=chat[1:], **ASKED
    )
    assert asked.content[0].text == wanted["choices"][0]["message"]["content"]
    counted = claude.messages.count_tokens(model="base", system="Be brief.", messages=chat[1:])
    assert counted.input_tokens == wanted["usage"]["prompt_tokens"]


def test_fields_of_chat_completions_beside_anthropics(claude):
    body = {"lora": [{"id": 0, "scale": 0.4}], "temperature": 0}
    message = claude.messages.create(model="base", messages=MESSAGES, extra_body=body, max_tokens=60)
    assert (message.content[0].text, message.model) == (expected_text("shout", 0.4), "shout@0.4")
    with pytest.raises(anthropic.BadRequestError, match="'thoughts' is not a field"):
        claude.messages.create(model="base", messages=MESSAGES, extra_body={"thoughts": 1}, max_tokens=60)


def test_anthropics_errors(claude, http):
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="tone", messages=MESSAGES, **ASKED)
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert "shout" in missing.value.body["error"]["message"]
    image = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="'image' is not supported"):
        claude.messages.create(model="base", messages=image, **ASKED)
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model="base", messages=MESSAGES, **ASKED)
    for body in ({}, {"messages": MESSAGES}, {"messages": [], "max_tokens": 5}, {"messages": [{}], "max_tokens": 5}):
        refused = http.post("/v1/messages", json=body)
        assert (refused.status_code, refused.json()["type"]) == (400, "error")
        assert refused.json()["error"]["type"] == "invalid_request_error"


def test_what_messages_cannot_do_is_refused(http):
    for fields in ({"n": 2}, {"n": 2, "stream": True}, {"tool_choice": {"type": "any"}}):
        refused = http.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 5, **fields})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    free = {"tool_choice": {"type": "auto"}, "n": 1}
    assert http.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 5, **free}).status_code == 200


@pytest.mark.anyio
async def test_an_error_in_a_stream_is_whose_fault_it_is():
    from gguflora.server import anthropic as theirs
    from gguflora.server.errors import Failure, as_failure
    from gguflora.server.events import data_event
    from gguflora.server.translation import _translated

    head = {"id": "chatcmpl-1", "model": "base", "created": 1, "choices": []}
    for error, kind in ((DivergedError("too large"), "invalid_request_error"), (Failure(504, "late"), "api_error")):

        async def events(fields):
            yield data_event(head)
            yield data_event(fields)

        failed = events(as_failure(error).to_dict())
        sent = [block async for block in _translated(failed, 7, theirs._events)]
        first, last = (json.loads(block.split(b"data: ")[1]) for block in sent)
        assert first["message"]["usage"]["input_tokens"] == 7
        assert (last["type"], last["error"]["type"]) == ("error", kind)


def test_reasoning_before_a_call_belongs_to_its_turn():
    from gguflora.server.responses import ResponsesBody

    items = [
        {"role": "user", "content": "1 + 1?"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Add."}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"role": "assistant", "content": "2."},
    ]
    messages = ResponsesBody.model_validate({"input": items}).as_chat()["messages"]
    assert [message.get("reasoning_content") for message in messages] == [None, "Add.", None, None]


def test_response(client):
    answer = client.responses.create(model="shout", input=QUESTION, max_output_tokens=60, temperature=0)
    assert (answer.output_text, answer.status, answer.model) == (expected_text("shout"), "completed", "shout")
    assert answer.usage.input_tokens == 13
    assert answer.usage.total_tokens == 13 + answer.usage.output_tokens
    items = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    cut = client.responses.create(model="shout", input=items, max_output_tokens=3, temperature=0, store=False)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert expected_text("shout").startswith(cut.output_text)


def test_instructions_and_history(client, http):
    chat = [{"role": "system", "content": "Be brief."}, *MESSAGES, {"role": "assistant", "content": "Hm."}, *MESSAGES]
    wanted = http.post("/v1/chat/completions", json={"messages": chat, "model": "base", **WANTED}).json()
    first = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "Hm.", "annotations": []}]}  # fmt: skip
    answer = client.responses.create(
        model="base", instructions="Be brief.", input=[*MESSAGES, first, *MESSAGES], max_output_tokens=60, temperature=0
    )
    assert answer.output_text == wanted["choices"][0]["message"]["content"]
    assert answer.instructions == "Be brief."


def test_streamed_response(client):
    with client.responses.stream(model="verse", input=QUESTION, max_output_tokens=60, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert final.output_text == expected_text("verse")
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]  # fmt: skip
    assert final.usage.output_tokens > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp_1"},
        {"truncation": "auto"},
        {"background": True},
        {"include": ["web_search_call.action.sources"]},
        {"tools": [{"type": "web_search"}]},
        {"input": [{"type": "computer_call"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"conversation": "conv_1"},
        {"n": 2},
        {"n": 2, "stream": True},
        {"text": {"verbosity": "low"}},
        {"tool_choice": "required"},
        {"input": [3]},
    ],
)
def test_what_responses_cannot_do_is_refused(http, fields):
    refused = http.post("/v1/responses", json={"model": "base", "input": "?", **fields})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["message"]


def test_the_same_without_v1(http):
    chat = {"messages": MESSAGES, "model": "shout", **WANTED}
    assert http.post("/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == expected_text(
        "shout"
    )
    assert [model["id"] for model in http.get("/models").json()["data"]] == ["base", "shout", "verse"]
    assert http.get("/models/shout@0.5+verse").json()["id"] == "shout@0.5+verse"
    assert http.post("/messages", json={**chat, "max_tokens": 60}).json()["content"][0]["text"] == expected_text(
        "shout"
    )
    assert http.post("/messages", json={}).json()["type"] == "error"
    assert "/models" not in http.get("/openapi.json").json()["paths"]


def test_history_with_tools_becomes_chat_completions():
    from gguflora.server.anthropic import MessagesBody
    from gguflora.server.responses import ResponsesBody

    call = {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    wanted = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "2"},
    ]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": schema}}
    messages = MessagesBody.model_validate(
        {
            "max_tokens": 5,
            "tools": [{"name": "add", "description": "adds", "input_schema": schema}],
            "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": [
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "2"}]}]},
            ],
        }
    ).as_chat()  # fmt: skip
    assert (messages["messages"], messages["tools"]) == (wanted, [tool])
    assert messages["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert messages["parallel_tool_calls"] is False
    responses = ResponsesBody.model_validate(
        {
            "tools": [{"type": "function", "name": "add", "description": "adds", "parameters": schema}],
            "tool_choice": {"type": "function", "name": "add"},
            "input": [
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "toolu_1", "name": "add", "arguments": '{"a": 1}'},
                {"type": "function_call_output", "call_id": "toolu_1", "output": "2"},
            ],
        }
    ).as_chat()
    assert (responses["messages"], responses["tools"]) == (wanted, [tool])
    assert responses["tool_choice"] == messages["tool_choice"]


@pytest.mark.anyio
async def test_tool_calls_become_their_blocks():
    """What streams as a chat completion arrives as Anthropic's and Responses' events."""
    from gguflora.server import anthropic as theirs
    from gguflora.server import responses
    from gguflora.server.translation import Ending, Part

    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    items = [Part("reasoning", "hm"), Part("text", "I "), Part("text", "add"), Part("tool", "", 0, "c1", "add"),
             Part("tool", '{"a"', 0), Part("tool", ": 1}", 0), Part("tool", "{}", 1, "c2", "sub"),
             Ending("tool_calls", None, usage)]  # fmt: skip

    async def stream():
        for item in items:
            yield item

    head = {"id": "chatcmpl-1", "model": "base", "created": 1}
    sent = [json.loads(block.split(b"data: ")[1]) async for block in theirs._events(head, stream())]
    kinds = [(event["type"], event.get("index")) for event in sent]
    assert kinds == [
        ("message_start", None), ("content_block_start", 0), ("content_block_delta", 0), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_delta", 2), ("content_block_stop", 2),
        ("content_block_start", 3), ("content_block_delta", 3), ("content_block_stop", 3),
        ("message_delta", None), ("message_stop", None),
    ]  # fmt: skip
    assert sent[-2]["delta"]["stop_reason"] == "tool_use"
    reply = responses._Reply(responses.ResponsesBody.model_validate({"input": "?"}))
    last = json.loads(([block async for block in reply.events(head, stream())][-1]).split(b"data: ")[-1])
    output = last["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert (output[2]["arguments"], output[2]["call_id"], output[3]["name"]) == ('{"a": 1}', "c1", "sub")
