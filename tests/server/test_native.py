"""llama-server's own endpoints, and embeddings, against llama-cpp-python on the same files."""

import base64
import json

import llama_cpp
import numpy as np
import pytest

from gguflora.diagnostics import demo
from support import serving
from support.oracles.llama_cpp import quiet_llama_cpp
from support.serving import PROMPT, QUESTION, expected, expected_text, lora_file

GREEDY = {"prompt": PROMPT, "temperature": 0}


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=2048) as client:
        yield client


def test_completion(http):
    answer = http.post("/completion", json={**GREEDY, "n_predict": 60, "model": "shout"}).json()
    assert (answer["content"], answer["stop"], answer["stop_type"]) == (expected_text("shout"), True, "eos")
    assert answer["model"] == "shout"
    assert answer["tokens_evaluated"] == len(serving.llama().tokenize(PROMPT.encode()))
    assert answer["timings"]["predicted_n"] == answer["tokens_predicted"]
    stopped = http.post("/completion", json={**GREEDY, "n_predict": 60, "stop": ["mice"]}).json()
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", "mice")
    assert stopped["content"] == expected_text().split("mice")[0]
    scaled = http.post("/completion", json={**GREEDY, "n_predict": 60, "lora": [{"id": 0, "scale": 0.4}]}).json()
    assert scaled["content"] == expected_text("shout", 0.4)
    short = http.post("/completion", json={**GREEDY, "n_predict": 2, "n_probs": 3}).json()
    assert (short["stop_type"], short["tokens_predicted"]) == ("limit", 2)
    wanted = expected(max_tokens=2, logprobs=3)["choices"][0]["logprobs"]
    found = short["completion_probabilities"]
    assert [each["token"] for each in found] == wanted["tokens"]
    assert len(found[0]["top_logprobs"]) == 3


def test_several_completions(http):
    """Each answer has its own counts and its own end, whole and streamed."""
    body = {"prompt": [PROMPT, "The owl"], "temperature": 0, "n_predict": 60, "stop": ["mice"]}
    llm = serving.llama()
    counts = [len(llm.tokenize(text.encode())) for text in body["prompt"]]
    whole = http.post("/completion", json=body).json()
    assert [each["tokens_evaluated"] for each in whole] == counts
    assert [each["timings"]["predicted_n"] for each in whole] == [each["tokens_predicted"] for each in whole]
    assert whole[0]["content"] == expected_text().split("mice")[0]
    assert whole[0]["stop_type"] == "word"
    lines = http.post("/completion", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line]
    ends = sorted((event for event in events if event["stop"]), key=lambda event: event["index"])
    for index, (end, other) in enumerate(zip(ends, whole, strict=True)):
        assert "".join(each["content"] for each in events if each["index"] == index) == other["content"]
        for name in ("stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated"):
            assert end[name] == other[name]


def test_names_of_v1_completions_beside_llama_servers(http):
    for fields in ({"max_tokens": 0}, {"n_predict": 0}, {"n_predict": 0, "max_tokens": 5}):
        assert http.post("/completion", json={**GREEDY, **fields}).status_code == 400
    assert http.post("/completion", json={**GREEDY, "max_tokens": 2}).json()["tokens_predicted"] == 2
    named = http.post("/completion", json={**GREEDY, "n_predict": 2, "n_probs": 3}).json()["completion_probabilities"]
    other = http.post("/completion", json={**GREEDY, "n_predict": 2, "logprobs": 3}).json()["completion_probabilities"]
    assert other == named
    body = {**GREEDY, "n_predict": 2, "n_probs": 3, "echo": True}
    first, *rest = http.post("/completion", json=body).json()["completion_probabilities"]
    assert (first["logprob"], first["top_logprobs"]) == (None, [])
    assert [each["token"] for each in rest[-2:]] == [each["token"] for each in named]


def test_streamed_completion(http):
    lines = http.post("/completion", json={**GREEDY, "n_predict": 60, "model": "verse", "stream": True}).text
    events = [json.loads(line[6:]) for line in lines.splitlines() if line]
    assert "".join(event["content"] for event in events) == expected_text("verse")
    assert [event["stop"] for event in events[-2:]] == [False, True]
    assert events[-1]["tokens_predicted"] > 5


def test_tokens(http):
    plain = serving.llama()
    for text in (PROMPT, "", "näïve ☃", "<|x|>"):
        for add in (False, True):
            found = http.post("/tokenize", json={"content": text, "add_special": add}).json()["tokens"]
            assert found == plain.tokenize(text.encode(), add_bos=add, special=True)
    tokens = plain.tokenize(PROMPT.encode(), special=True)
    assert http.post("/tokenize", json={"prompt": PROMPT}).json() == {
        "tokens": tokens, "count": len(tokens), "max_model_len": 2048
    }  # fmt: skip
    assert http.post("/detokenize", json={"tokens": tokens}).json()["content"].endswith(PROMPT)
    pieces = http.post("/tokenize", json={"content": PROMPT, "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces).strip() == PROMPT
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400


def test_template(http):
    messages = [{"role": "user", "content": QUESTION}]
    prompt = http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    chat = {"messages": messages, "max_tokens": 60, "temperature": 0}
    wanted = serving.llama().create_chat_completion(**chat)["choices"][0]["message"]["content"]
    assert http.post("/completion", json={**GREEDY, "prompt": prompt, "n_predict": 60}).json()["content"] == wanted
    assert http.get("/props").json()["chat_template"] == serving.llama().metadata["tokenizer.chat_template"]


def test_props_and_slots(http):
    props = http.get("/props").json()
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (4, 2048)
    assert props["model_path"] == "base.gguf"
    http.post("/completion", json={**GREEDY, "n_predict": 5, "model": "shout@0.5"})
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert "shout@0.5" in [slot["adapters"] for slot in slots]
    assert not any(slot["is_processing"] for slot in slots)


def llama_cpps(text, lora=None, *, normalize=True):
    """The mean of the last hidden states, by llama-cpp-python."""
    with quiet_llama_cpp():
        llm = llama_cpp.Llama(
            str(demo.BASE), embedding=True, n_ctx=512, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN, verbose=False,
            lora_path=lora and str(lora_file(lora)),
        )  # fmt: skip
    found = llm.embed(text, normalize=normalize)
    llm.close()
    return np.array(found)


def test_embeddings(http):
    client = serving.openai_client(http)
    texts = [QUESTION, "The owl lives in the forest."]
    for model in ("base", "shout"):
        wanted = [llama_cpps(text, None if model == "base" else model) for text in texts]
        reply = client.embeddings.create(model=model, input=texts)  # in base64
        np.testing.assert_allclose([item.embedding for item in reply.data], wanted, atol=5e-3)
        floats = client.embeddings.create(model=model, input=texts, encoding_format="float")
        np.testing.assert_allclose([item.embedding for item in floats.data], wanted, atol=5e-3)
        assert [item.index for item in reply.data] == [0, 1]
    assert reply.model == "shout"
    assert reply.usage.prompt_tokens == sum(len(serving.llama().tokenize(text.encode())) for text in texts)
    tokens = serving.llama().tokenize(QUESTION.encode())
    by_tokens = client.embeddings.create(model="shout", input=[tokens], encoding_format="float").data[0].embedding
    np.testing.assert_array_equal(by_tokens, floats.data[0].embedding)
    short = client.embeddings.create(model="shout", input=QUESTION, dimensions=8, encoding_format="float").data[0]
    cut = np.array(by_tokens[:8])
    np.testing.assert_allclose(short.embedding, cut / np.linalg.norm(cut), atol=1e-6)


def test_embeddings_as_llama_server_writes_them(http):
    raw = http.post("/embeddings", json={"content": QUESTION, "embd_normalize": -1}).json()["data"][0]["embedding"]
    one = http.post("/v1/embeddings", json={"input": QUESTION}).json()["data"][0]["embedding"]
    wanted = llama_cpps(QUESTION, normalize=False)
    np.testing.assert_allclose(raw, wanted, atol=5e-3 * np.linalg.norm(wanted))
    assert np.linalg.norm(wanted) > 1.5  # so that it differs from a normalized one
    np.testing.assert_allclose(np.array(raw) / np.linalg.norm(raw), one, atol=1e-6)
    most = http.post("/v1/embeddings", json={"input": QUESTION, "embd_normalize": 0}).json()["data"][0]["embedding"]
    assert np.abs(most).max() == pytest.approx(32760)
    coded = http.post("/v1/embeddings", json={"input": QUESTION, "encoding_format": "base64"}).json()
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4"), one, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "no tokens"),
        ({"input": "x", "dimensions": 10**6}, "dimensions"),
        ({"input": "fox " * 4000}, "tokens"),
        ({"input": "x", "truncate": True}, "'truncate'"),
        ({}, "input"),
    ],
)
def test_embeddings_that_are_refused(http, body, message):
    refused = http.post("/v1/embeddings", json=body)
    assert refused.status_code == 400, refused.text
    assert message in refused.json()["error"]["message"]


def test_models_that_cannot_rank_say_so(http):
    for path in ("/v1/rerank", "/rerank", "/reranking"):
        refused = http.post(path, json={"query": "x", "documents": ["y"]})
        assert (refused.status_code, "no head that ranks" in refused.text) == (400, True)
