"""``echo`` and ``logprobs``: prompts scored as lm-eval does it, and lists that keep every entry."""

import numpy as np
import pytest

from gguflora.engine import TokenLogprob
from gguflora.server.openai_format import Choice, Echo, TextForm
from support import serving
from support.serving import PROMPT, expected_text

CONTINUATIONS = (" The fox likes to eat mice.", " A fish swims in the sea.")


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=512, kv_type="F32") as client:
        yield client


@pytest.fixture(scope="module")
def client(http):
    return serving.openai_client(http)


def loglikelihood(llama, context, continuation):
    """Sum of llama-cpp-python's log probabilities, and whether each token is the most likely one."""
    n_context = len(context)
    llama.reset()
    llama.eval(context + continuation)
    logits = np.array(llama.scores[n_context - 1 : n_context + len(continuation) - 1], np.float64)
    rows = logits - logits.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    chosen = rows[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((rows.argmax(1) == continuation).all())


@pytest.mark.parametrize("model", ["base", "shout"])
def test_loglikelihood_as_lm_eval_asks_for_it(http, model):
    """Its body, and its reading of the answer: everything but the context and the one generated token."""
    llama = serving.llama(None if model == "base" else model)
    context = llama.tokenize(PROMPT.encode())
    parts = [llama.tokenize(text.encode(), add_bos=False) for text in CONTINUATIONS]
    body = {"model": model, "prompt": [context + part for part in parts], "temperature": 0, "max_tokens": 1}
    reply = http.post("/v1/completions", json={**body, "logprobs": 1, "seed": 1234, "echo": True}).json()
    for choice, part in zip(sorted(reply["choices"], key=lambda each: each["index"]), parts, strict=True):
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        total, greedy = loglikelihood(llama, context, part)
        assert len(scores) == len(part)
        assert sum(scores) == pytest.approx(total, abs=0.3)
        assert all(score == max(top.values()) for score, top in zip(scores, tops, strict=True)) == greedy


def test_the_prompt_comes_first(client):
    reply = client.completions.create(model="base", prompt=PROMPT, echo=True, max_tokens=60, temperature=0, logprobs=2)
    choice = reply.choices[0]
    assert choice.text == PROMPT + expected_text()
    tokens = serving.llama().tokenize(PROMPT.encode())
    lists = choice.logprobs
    assert len(lists.tokens) == len(tokens) + reply.usage.completion_tokens - 1  # all but the end of text
    assert (lists.token_logprobs[0], lists.top_logprobs[0]) == (None, None)
    assert all(len(top) in {2, 3} for top in lists.top_logprobs[1:])
    for token, offset in zip(lists.tokens[1:], lists.text_offset[1:], strict=True):
        assert choice.text[offset:].startswith(token)
    assert [*lists.text_offset] == sorted(lists.text_offset)


def test_streams_and_plain_echo(client):
    greedy = {"model": "shout", "prompt": [PROMPT, "Q: Where does the owl live?\nA:"], "max_tokens": 8, "n": 2}
    options = {**greedy, "temperature": 0, "echo": True}
    for logprobs in (None, 1):
        whole = client.completions.create(**options, logprobs=logprobs).choices
        texts, scores = [""] * 4, [[] for _ in range(4)]
        for chunk in client.completions.create(**options, logprobs=logprobs, stream=True):
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            scores[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
        assert texts == [choice.text for choice in whole]
        assert [text.startswith("Q: ") for text in texts] == [True] * 4
        if logprobs:
            for found, choice in zip(scores, whole, strict=True):
                np.testing.assert_allclose(found[1:], choice.logprobs.token_logprobs[1:], atol=0.1)


def test_no_answer_at_all(client):
    reply = client.completions.create(model="base", prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)
    assert reply.choices[0].text == PROMPT
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.prompt_tokens
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (0, "length")


def test_all_entries_are_kept():
    """Tokens of equal or broken text have names of their own, and the chosen token is among them."""
    top = ((3, b"a", -0.5), (4, b"a", -1.0), (5, b"\xe6", -2.0), (6, b"\xe6\x97", -3.0), (7, b"", -4.0), (8, b"", -5.0))
    lists = TextForm().logprobs([TokenLogprob(9, b"\xa5", -6.0, top)], [0])
    assert lists["top_logprobs"] == [
        {"a": -0.5, "token_id:4": -1.0, "bytes:\\xe6": -2.0, "bytes:\\xe6\\x97": -3.0, "": -4.0, "token_id:8": -5.0}
        | {"bytes:\\xa5": -6.0}
    ]
    assert lists["tokens"] == ["bytes:\\xa5"]


def test_offsets_of_characters_in_several_tokens():
    choice = Choice(TextForm(), 0, True, Echo("<s>é日", b"<bos>"))
    parts = [b"<s>", b"\xc3", b"\xa9\xe6", b"\x97\xa5", b"<pad>"]
    choice._note([TokenLogprob(1, part, -1.0) for part in parts])
    assert choice.whole("stop")["logprobs"]["text_offset"] == [0, 0, 3, 3, 4, 5]
