"""Every field of a request is honoured, harmless, or refused by name."""

from dataclasses import replace

import pytest

from gguflora.engine import Request, Sampling
from gguflora.server.fields import HARMLESS, NO_EFFECT
from gguflora.server.schemas import ChatBody, CompletionBody
from support import serving
from support.serving import PROMPT, QUESTION, expected_text, lora_file

GREEDY = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60, "temperature": 0}


BUDGETS = {"thinking_budget_tokens", "thinking_token_budget"}
READ = {"echo", "function_call", "functions", "parallel_tool_calls", "tool_choice", "tools", *BUDGETS}
"""Fields that one of the two endpoints reads."""


@pytest.fixture(scope="module")
def http():
    with serving.serving(n_ctx=2048) as client:
        yield client


def post(http, path="/v1/completions", **fields):
    body = GREEDY if path.endswith("/completions") and "chat" not in path else CHAT
    return http.post(path, json={**body, **fields})


def text(http, **fields):
    response = post(http, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def tokens_of(words):
    return serving.llama().tokenize(words.encode(), add_bos=False)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_harmless_fields_change_nothing(http, path):
    plain = post(http, path).json()["choices"]
    changed = post(http, path, **dict.fromkeys(HARMLESS, "anything")).json()["choices"]
    no_effect = post(http, path, **{name: values[0] for name, values in NO_EFFECT.items() if values}).json()["choices"]
    assert plain == changed == no_effect
    assert post(http, path, nobody_knows_this=None).json()["choices"] == plain


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "field",
    [*((name, "x") for name in NO_EFFECT if name not in READ), ("tempreature", 0.5), ("top-p", 0.5), ("options", {})],
    ids=str,
)
def test_other_fields_are_refused_by_name(http, path, field):
    response = post(http, path, **dict([field]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, field[0])
    assert repr(field[0]) in response.json()["error"]["message"]


def test_fields_of_the_other_endpoint_are_refused(http):
    """Each of the fields that one endpoint reads, and the other does not."""
    for path, name in (
        *(("/v1/completions", name) for name in ChatBody.model_fields.keys() - CompletionBody.model_fields.keys()),
        *(("/v1/chat/completions", name) for name in CompletionBody.model_fields.keys() - ChatBody.model_fields.keys()),
    ):
        response = post(http, path, **{name: "x"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_fields_inside_of_fields_are_refused_too(http):
    refused = post(http, stream=True, stream_options={"include_usage": True, "rate": 3}).json()["error"]
    assert refused["param"] == "stream_options.rate"
    refused = post(http, lora=[{"id": 0, "scale": 1, "rank": 2}]).json()["error"]
    assert refused["param"] == "lora.0.rank"
    assert post(http, stream_options={"include_usage": False, "include_obfuscation": False}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "shout@0.4"},
        {"adapter_id": "shout@0.4"},
        {"adapter_name": "shout@0.4", "model": "base"},
        {"lora_path": "shout@0.4", "model": "default"},
        {"lora_request": {"lora_name": "shout@0.4", "lora_int_id": 1, "lora_path": "anything"}},
        {"lora": [{"id": 0, "scale": 0.4}]},
        {"lora": [{"id": 0, "scale": 0.4}], "adapter_id": "shout@0.4", "model": "shout@0.4"},
    ],
    ids=str,
)
def test_adapter_selectors_of_other_servers(http, fields):
    assert text(http, **fields) == expected_text("shout", 0.4)
    reply = post(http, "/v1/chat/completions", **fields).json()
    assert reply["choices"] == post(http, "/v1/chat/completions", model="shout@0.4").json()["choices"]


def test_adapter_named_by_its_path(http):
    assert text(http, lora_path=str(lora_file("shout"))) == expected_text("shout")
    assert text(http, adapter_id="shout.gguf") == expected_text("shout")


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"adapter_id": "tone"}, 404, "no adapter named 'tone'"),
        ({"lora_request": {"lora_name": "tone"}}, 404, "no adapter named 'tone'"),
        ({"lora_request": {}}, 400, "lora_name"),
        ({"adapter_id": "shout", "model": "verse"}, 400, "'adapter_id' and 'model' name different adapters"),
        ({"adapter_id": "shout", "lora_path": "verse"}, 400, "'adapter_id' and 'lora_path' name different"),
        ({"adapter_id": "shout", "lora": [{"id": 1, "scale": 1}]}, 400, "'adapter_id' and 'lora' name different"),
        ({"adapter_id": 3}, 400, "adapter_id"),
        ({"adapter_id": "shout", "adapter_source": "s3"}, 400, "'adapter_source' is not supported"),
    ],
    ids=str,
)
def test_bad_selectors(http, fields, status, message):
    response = post(http, **fields)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


FIELDS = [
    ({"top_k": -1}, {"top_k": 0}),
    ({"typical_p": 0.9}, {"typical_p": 0.9}),
    ({"typical": 0.9}, {"typical_p": 0.9}),
    ({"top_n_sigma": 1.5}, {"top_n_sigma": 1.5}),
    ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, {"xtc_probability": 0.5, "xtc_threshold": 0.2}),
    ({"dynatemp_range": 0.5, "dynatemp_exponent": 2}, {"dynatemp_range": 0.5, "dynatemp_exponent": 2}),
    (
        {"mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2},
        {"mirostat": 2, "mirostat_tau": 4, "mirostat_eta": 0.2},
    ),
    ({"repeat_penalty": 1.2, "repeat_last_n": 8}, {"repeat_penalty": 1.2, "repeat_last_n": 8}),
    ({"repetition_penalty": 1.2}, {"repeat_penalty": 1.2, "repeat_last_n": -1}),
    ({"repetition_penalty": 1.2, "repeat_last_n": 9}, {"repeat_penalty": 1.2, "repeat_last_n": 9}),
    (
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 3, "dry_penalty_last_n": 100},
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 3, "dry_penalty_last_n": 100},
    ),
    ({"dry_sequence_breakers": ["\n", "x"]}, {"dry_sequence_breakers": ("\n", "x")}),
    ({"min_tokens": 5, "ignore_eos": True}, {"min_tokens": 5, "ignore_eos": True}),
    ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
    ({"logit_bias": {"5": 1, "7": -2.5}}, {"logit_bias": {5: 1, 7: -2.5}}),
    ({"logit_bias": [[5, 1], [7, False]]}, {"logit_bias": {5: 1, 7: -1e9}}),
    ({"min_p": 0.1, "top_p": 0.5, "temperature": 1.5}, {"min_p": 0.1, "top_p": 0.5, "temperature": 1.5}),
    ({"seed": -1, "frequency_penalty": 0.5}, {"seed": -1, "frequency_penalty": 0.5}),
]


@pytest.mark.parametrize(("fields", "wanted"), FIELDS, ids=[str(fields) for fields, _ in FIELDS])
def test_sampling_fields_reach_the_engine(http, fields, wanted):
    assert CompletionBody(prompt="x", **fields).sampling(http.engine) == replace(Sampling(), **wanted)
    if "seed" not in fields:
        sampling = Sampling(**{"seed": 5, "temperature": 1.0, **wanted})
        request = Request(http.engine.tokenize(PROMPT), max_tokens=30, sampling=sampling)
        http.engine.submit(replace(request, max_tokens=1)).text()  # from now on the prompt's tokens are in the cache
        answer = http.engine.submit(request).text()
        assert text(http, **{"seed": 5, "max_tokens": 30, "temperature": 1.0, **fields}) == answer


def test_text_in_logit_bias_counts_for_its_tokens(http):
    token = tokens_of(" mice")
    banned = serving.llama()(PROMPT, max_tokens=60, temperature=0, logit_bias=dict.fromkeys(token, -100.0))
    for bias in ([[" mice", False]], {" mice": -100}, [[each, -100] for each in token]):
        assert text(http, logit_bias=bias) == banned["choices"][0]["text"] != expected_text()


def test_the_end_of_an_answer(http):
    plain = post(http).json()
    n_tokens = plain["usage"]["completion_tokens"]
    longer = post(http, min_tokens=n_tokens + 5).json()
    assert longer["usage"]["completion_tokens"] > n_tokens + 5
    endless = post(http, ignore_eos=True).json()
    assert (endless["usage"]["completion_tokens"], endless["choices"][0]["finish_reason"]) == (60, "length")
    stop = tokens_of(expected_text())[3]
    short = post(http, stop_token_ids=[stop]).json()["choices"][0]
    assert expected_text().startswith(short["text"])
    assert len(short["text"]) < len(expected_text())
    assert short["finish_reason"] == "stop"


@pytest.mark.parametrize("seed", [None, -1, 2**32 - 1])
def test_random_seeds(http, seed):
    free = {"seed": seed, "temperature": 5.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 24, "n": 3}
    replies = [choice["text"] for _ in range(2) for choice in post(http, **free).json()["choices"]]
    assert len(set(replies)) == len(replies)


def test_max_tokens_is_cut_to_what_there_is_room_for(http):
    for asked in (-1, 10**6):
        assert post(http, max_tokens=asked).json()["choices"][0]["text"] == expected_text()
        assert post(http, "/v1/chat/completions", max_tokens=asked).status_code == 200
    filled = post(http, max_tokens=-1, ignore_eos=True, prompt="word " * 300).json()
    assert filled["choices"][0]["finish_reason"] == "length"
    assert filled["usage"]["total_tokens"] == 2048
    assert post(http, n_predict=3, max_tokens=None).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"n_predict": 5}, "n_predict"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repetition_penalty"),
        ({"logit_bias": [[1]]}, "logit_bias"),
        ({"logit_bias": 3}, "logit_bias"),
        ({"logit_bias": [[1, 2, 3]]}, "logit_bias"),
        ({"mirostat": 3}, "mirostat"),
        ({"stop_token_ids": "x"}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
    ids=str,
)
def test_bad_values(http, fields, param):
    response = post(http, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
