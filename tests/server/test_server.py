"""OpenAI's API by OpenAI's own client; what it answers is what llama-cpp-python answers with the same adapter."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from support import serving
from support.serving import LONG, PROMPT, QUESTION, expected_text

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}
# of every word of these answers the second best is less likely by 5 % or more: no rounding makes it the best
SETS = {"base": (None, 1.0), "shout": ("shout", 1.0), "shout@0.4": ("shout", 0.4), "verse@0.5": ("verse", 0.5)}


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=2048) as client:
        yield client


@pytest.fixture(scope="module")
def client(http):
    return serving.openai_client(http)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "shout", "verse"]
    assert client.models.retrieve("shout@0.5+verse").id == "shout@0.5+verse"
    with pytest.raises(openai.NotFoundError, match="no adapter named 'tone'"):
        client.models.retrieve("tone")


@pytest.mark.parametrize("model", SETS)
def test_completion_is_llama_cpps(client, model):
    reply = client.completions.create(model=model, **GREEDY)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason, reply.model) == (expected_text(*SETS[model]), "stop", model)
    assert reply.usage.prompt_tokens == len(serving.llama().tokenize(PROMPT.encode()))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_is_llama_cpps(client):
    wanted = serving.llama("shout").create_chat_completion(**CHAT)["choices"][0]
    choice = client.chat.completions.create(model="shout", **CHAT).choices[0]
    assert (choice.message.content, choice.message.role) == (wanted["message"]["content"], "assistant")
    assert choice.finish_reason == wanted["finish_reason"] == "stop"


def test_streams_say_the_same(client):
    pieces = list(client.completions.create(model="verse@0.5", stream=True, **GREEDY))
    assert "".join(piece.choices[0].text for piece in pieces) == expected_text("verse", 0.5)
    assert len(pieces) > 10
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "stop"]
    assert all(piece.usage is None for piece in pieces)
    chunks = list(client.chat.completions.create(model="verse", stream=True, **CHAT))
    whole = client.chat.completions.create(model="verse", **CHAT)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_stream_with_usage(client):
    *chunks, last = client.completions.create(
        model="base", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert last.choices == []
    assert last.usage.completion_tokens == client.completions.create(model="base", **GREEDY).usage.completion_tokens
    assert all(chunk.choices for chunk in chunks)


def test_stream_on_the_wire(http):
    with http.stream("POST", "/v1/completions", json={**GREEDY, "max_tokens": 2, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert all(line.startswith("data: ") for line in lines[::2])
    assert not any(lines[1::2])
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-4][6:])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["mice", ["forest", "mice"], "likes to eat m"])
def test_stop(client, stop):
    cut = expected_text().split(stop if isinstance(stop, str) else "mice")[0]
    choice = client.completions.create(model="base", stop=stop, **GREEDY).choices[0]
    assert (choice.text, choice.finish_reason) == (cut, "stop")
    pieces = client.completions.create(model="base", stop=stop, stream=True, **GREEDY)
    assert "".join(piece.choices[0].text for piece in pieces) == cut


def test_logprobs_are_llama_cpps(client):
    wanted = serving.expected("shout", max_tokens=8, logprobs=3)["choices"][0]["logprobs"]
    found = client.completions.create(model="shout", **{**GREEDY, "max_tokens": 8}, logprobs=3).choices[0].logprobs
    assert found.tokens == wanted["tokens"]
    np.testing.assert_allclose(found.token_logprobs, wanted["token_logprobs"], atol=2e-2)
    for mine, theirs in zip(found.top_logprobs, wanted["top_logprobs"], strict=True):
        assert max(mine, key=mine.get) == max(theirs, key=theirs.get)
        assert len(mine) == 3
    texts = "".join(found.tokens)
    assert [texts[offset] for offset in found.text_offset] == [token[0] for token in found.tokens]


def test_logprobs_of_a_chat(client):
    choice = client.chat.completions.create(model="shout", logprobs=True, top_logprobs=2, **CHAT).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens)  # greedy
    streamed = client.chat.completions.create(model="shout", logprobs=True, stream=True, **CHAT)
    texts = [t.token for chunk in streamed if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert texts == [token.token for token in tokens]


def test_seed_and_n(client):
    random = {"model": "base", "prompt": PROMPT, "max_tokens": 40, "temperature": 2.0, "top_p": 1.0, "seed": 7, "n": 3}
    first, again = (client.completions.create(**random) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.prompt_tokens == len(serving.llama().tokenize(PROMPT.encode()))
    streamed = dict.fromkeys(range(3), "")
    for piece in client.completions.create(stream=True, **random):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert list(streamed.values()) == texts


def test_several_prompts_as_text_and_tokens(client):
    prompts = [PROMPT, "Q: Where does the owl live?\nA:"]
    texts = client.completions.create(model="shout", **{**GREEDY, "prompt": prompts}).choices
    tokens = [serving.llama().tokenize(prompt.encode()) for prompt in prompts]
    by_tokens = client.completions.create(model="shout", **{**GREEDY, "prompt": tokens}).choices
    one = client.completions.create(model="shout", **{**GREEDY, "prompt": tokens[1]}).choices
    assert [choice.text for choice in texts] == [choice.text for choice in by_tokens]
    assert texts[0].text == expected_text("shout")
    assert [choice.text for choice in one] == [texts[1].text]


def test_messages_in_parts_and_from_developers(client):
    parts = [{"type": "text", "text": "What does "}, {"type": "text", "text": "the fox eat?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    reply = client.chat.completions.create(model="shout", messages=messages, max_completion_tokens=60, temperature=0)
    wanted = serving.llama("shout")(f"Q: Be brief.\n\n{serving.QUESTION}\nA:", max_tokens=60, temperature=0)
    assert reply.choices[0].message.content == wanted["choices"][0]["text"]  # this template has no system messages


def test_many_clients_and_sets_at_once(client):
    """Nothing of one adapter set reaches another, whatever waits, runs together, and changes contexts."""

    def answer(model):
        return client.completions.create(model=model, **GREEDY).choices[0].text

    models = list(SETS) * 6
    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(answer, models)) == [expected_text(*SETS[model]) for model in models]


BAD = [
    ({"model": "tone"}, 404, "model_not_found", "no adapter named 'tone'"),
    ({"model": "shout@nan"}, 400, None, "finite"),
    ({"model": "shout@1e99"}, 400, None, "finite"),
    ({"model": "shout@x"}, 400, None, "number"),
    ({"model": "shout+shout"}, 400, None, "twice"),
    ({"prompt": "word " * 5000}, 400, "context_length_exceeded", "maximum context length is"),
    ({"prompt": []}, 400, "too_many_answers", "0 prompts"),
    ({"prompt": [[]]}, 400, None, "no tokens"),
    ({"prompt": [99999]}, 400, None, "token of the prompt"),
    ({"prompt": None}, 400, "invalid_value", "prompt"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"n": 100}, 400, "too_many_answers", "100 answers"),
    ({"temperature": -1}, 400, "invalid_value", "temperature"),
    ({"top_p": 1.5}, 400, "invalid_value", "top_p"),
    ({"seed": 2**70}, 400, "invalid_value", "seed"),
    ({"logprobs": 1000}, 400, "invalid_value", "logprobs"),
    ({"logit_bias": {"99999": 1}}, 400, None, "logit_bias"),
    ({"logit_bias": {"x": "y"}}, 400, "invalid_value", "logit_bias"),
    ({"stop": [""]}, 400, "invalid_value", "stop"),
    ({"stop": ["x"] * 99}, 400, "invalid_value", "stop"),
    ({"suffix": "x"}, 400, "invalid_value", "'suffix' is not supported"),
    ({"best_of": 3}, 400, "invalid_value", "'best_of' is not supported"),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
    ({"lora": [{"id": 5, "scale": 1}]}, 400, "unknown_adapter", "no adapter has the id 5"),
    ({"lora": "shout"}, 400, "invalid_value", "lora"),
]


@pytest.mark.parametrize(("change", "status", "code", "message"), BAD, ids=[str(bad[0])[:40] for bad in BAD])
def test_bad_requests(http, change, status, code, message):
    response = http.post("/v1/completions", json={**GREEDY, **change})
    error = response.json()["error"]
    assert response.status_code == status
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code


def test_bad_numbers_and_bad_json(http):
    for text in ('{"prompt": "x", "temperature": NaN}', '{"prompt": "x", "lora": [{"id": 0, "scale": Infinity}]}'):
        assert "finite" in http.post("/v1/completions", content=text).json()["error"]["message"]
    for text in ("{", "", "[]", "\xff", '"x"', "[" * 100_000):
        response = http.post("/v1/completions", content=text.encode("latin-1"))
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_bad_chats(http):
    for messages in ([], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "hello"):
        assert http.post("/v1/chat/completions", json={"messages": messages}).status_code == 400
    tools = {**GREEDY, "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert "'tools' is not supported" in http.post("/v1/completions", json=tools).json()["error"]["message"]
    assert http.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert http.get("/v1/completions").status_code == 405


def test_others_do_not_notice_bad_requests():
    body = {**LONG, "max_tokens": 150, "temperature": 0}
    with serving.serving(kv_type="F32") as http, ThreadPoolExecutor(1) as pool:
        alone = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        running = pool.submit(http.post, "/v1/completions", json=body)
        serving.wait_until(lambda: http.engine.stats().running)
        for change, *_ in BAD:
            http.post("/v1/completions", json={**GREEDY, **change})
        assert running.result().json()["choices"][0]["text"] == alone
