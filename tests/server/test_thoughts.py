"""A limit of the thoughts before an answer: they are ended with the template's tag after that many tokens."""

import pytest

from gguflora.engine.thoughts import ThoughtLimit, ThoughtWatch
from support import serving
from support.serving import QUESTION

USER = [{"role": "user", "content": QUESTION}]
OPEN = (
    "{{ bos_token }}Q: {{ messages[0].content }}\nA:"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)
CHOSEN = OPEN.replace("<think>{% endif %}", "{# <think> #}{% endif %}")
ASKED = {"model": "shout", "messages": USER, "max_tokens": 24, "temperature": 0}


def watched(limit, pieces, is_open=True):
    """The pieces of an answer whose model writes ``pieces``, with -1 for each token that was forced."""
    watch = ThoughtWatch(ThoughtLimit(limit, "<think>", "</think>", (7, 8), is_open))
    found = []
    for piece in pieces:
        while (token := watch.forced()) is not None:
            found.append(token)
            watch.accept(b"?")
        watch.accept(piece)
        found.append(piece)
    return found


def test_thoughts_end_at_their_limit():
    assert watched(2, [b"a", b"b", b"c", b"d"]) == [b"a", b"b", 7, 8, b"c", b"d"]
    assert watched(0, [b"a"]) == [7, 8, b"a"]
    assert watched(2, [b"a", b"</think>", b"c", b"d"]) == [b"a", b"</think>", b"c", b"d"]
    assert watched(9, [b"a", b"b"]) == [b"a", b"b"]


def test_what_has_begun_is_finished():
    assert watched(2, [b"a", b"\xe2\x82", b"\xac", b"c"]) == [b"a", b"\xe2\x82", b"\xac", 7, 8, b"c"]
    assert watched(2, [b"a", b"b</th", b"ink>", b"c"]) == [b"a", b"b</th", b"ink>", b"c"]
    assert watched(2, [b"a", b"b<", b"3", b"c"]) == [b"a", b"b<", b"3", 7, 8, b"c"]
    assert watched(2, ["\u00e9".encode(), "\u20ac".encode(), b"c"])[2:] == [7, 8, b"c"]


def test_only_thoughts_are_limited():
    assert watched(1, [b"\n", b"<th", b"ink>", b"a", b"b"], is_open=False) == [b"\n", b"<th", b"ink>", b"a", 7, 8, b"b"]
    assert watched(0, [b"<think>", b"a"], is_open=False) == [b"<think>", 7, 8, b"a"]
    for pieces in ([b"x", b"<think>", b"a", b"b"], [b"<b>", b"a", b"b"]):
        assert watched(1, pieces, is_open=False) == pieces


@pytest.fixture(scope="module")
def http():
    with serving.serving(threads=1, chat_template=OPEN) as client:
        yield client


def chat(client, **fields):
    answer = client.post("/v1/chat/completions", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget_tokens"])
@pytest.mark.parametrize("limit", [0, 5])
def test_the_answer_follows_the_thoughts(http, field, limit):
    """What follows the tag is what the model itself answers behind these thoughts."""
    free = chat(http)["message"]
    assert free["content"] == ""
    message = chat(http, **{field: limit})["message"]
    thoughts = message.get("reasoning_content", "")
    assert free["reasoning_content"].startswith(thoughts)
    assert bool(thoughts) == bool(limit)
    prompt = http.post("/apply-template", json=ASKED).json()["prompt"]
    asked = [*http.engine.tokenize(prompt, add_bos=False)]
    raw = {**{name: ASKED[name] for name in ("model", "temperature")}, "max_tokens": limit, "prompt": asked}
    first = http.post("/v1/completions", json={**raw, "echo": True, "logprobs": 0}).json()["choices"][0]
    written = "".join(first["logprobs"]["tokens"][len(asked) :])
    assert written.strip() == thoughts.strip()
    closed = [*asked, *http.engine.tokenize(written + "</think>", add_bos=False)]
    behind = http.post("/v1/completions", json={**raw, "prompt": closed, "max_tokens": 20}).json()["choices"][0]["text"]
    assert message["content"].startswith(behind.strip()[:20])
    assert message["content"]


def test_no_limit(http):
    assert chat(http, thinking_token_budget=-1) == chat(http, thinking_token_budget=None) == chat(http)


def test_a_grammar_holds_behind_limited_thoughts(http):
    choice = chat(http, thinking_token_budget=4, guided_choice=["mice", "fish"])
    assert choice["message"]["content"] in {"mice", "fish"}
    assert choice["message"]["reasoning_content"]
    assert choice["finish_reason"] == "stop"


def test_anthropics_budget(http):
    body = {**ASKED, "thinking": {"type": "enabled", "budget_tokens": 5}}
    whole = http.post("/v1/messages", json=body).json()
    wanted = chat(http, thinking_token_budget=5)["message"]
    assert [block["type"] for block in whole["content"]] == ["thinking", "text"]
    assert whole["content"][0]["thinking"] == wanted["reasoning_content"]
    assert whole["content"][1]["text"] == wanted["content"]
    streamed = http.post("/v1/messages", json={**body, "stream": True}).text
    assert "thinking_delta" in streamed
    assert "text_delta" in streamed


def test_a_model_that_opens_its_own_tag():
    """The template only names the tag; the limit waits for it and does not touch other answers."""
    with serving.serving(threads=1, chat_template=CHOSEN) as http:
        assert chat(http, thinking_token_budget=3) == chat(http)


def test_a_template_without_thoughts_has_no_limit_to_keep():
    with serving.serving(threads=1) as http:
        refused = http.post("/v1/chat/completions", json={**ASKED, "thinking_token_budget": 5})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "thinking_token_budget"
        assert chat(http, thinking_token_budget=0) == chat(http)
        for field in ("thinking_token_budget", "thinking_budget_tokens"):
            refused = http.post("/v1/completions", json={"prompt": "a", field: 5})
            assert refused.status_code == 400
            assert field in refused.json()["error"]["message"]
