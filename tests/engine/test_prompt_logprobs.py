"""Log probabilities of a prompt's tokens are llama.cpp's, also when nothing is left to compute in a slot."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import llama_cpp
import numpy as np
import pytest

from gguflora.diagnostics import demo
from gguflora.engine import Engine, Request, Sampling
from gguflora.errors import RequestError
from support import serving
from support.serving import PROMPT

TEXT = (PROMPT + " The fox likes to eat mice. Its home is in the forest.\n") * 6
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine():
    with serving.engine(n_ctx=512, kv_type="F32") as opened:
        yield opened


def scored(engine: Engine, tokens, adapters="base", top=2, **options):
    request = Request(tokens, engine.adapter_set(adapters), logprobs=top, prompt_logprobs=True, **options)
    pieces = list(engine.submit(request))
    prompts = [piece.prompt for piece in pieces if piece.prompt is not None]
    assert len(prompts) == 1
    assert pieces[0].prompt is prompts[0]
    return prompts[0], pieces


@cache
def precise_llama(lora):
    path = None if lora is None else str(serving.lora_file(lora))
    kv = llama_cpp.GGML_TYPE_F32
    options = {"type_k": kv, "type_v": kv, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(demo.BASE), n_ctx=512, lora_path=path, **options)


def wanted(tokens, lora=None):
    """Log probabilities (n - 1, n_vocab) of each next token by llama-cpp-python, without the noise of 16-bit cells."""
    llama = precise_llama(lora)
    llama.reset()
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens) - 1], np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize(("adapters", "lora"), [("base", None), ("shout", "shout")])
def test_prompt_logprobs_are_llama_cpps(engine, adapters, lora):
    tokens = engine.tokenize(TEXT)
    assert len(tokens) > 64
    expected = wanted(tokens, lora)
    found, _ = scored(engine, tokens, adapters, max_tokens=0)
    assert [each.token for each in found] == tokens[1:]
    chosen = expected[np.arange(len(expected)), tokens[1:]]
    np.testing.assert_allclose([each.logprob for each in found], chosen, atol=0.05)
    for each, row in zip(found, expected, strict=True):
        np.testing.assert_allclose([logprob for *_, logprob in each.top], np.sort(row)[::-1][:2], atol=0.05)


def test_a_cached_prompt_is_computed_again(engine):
    tokens = engine.tokenize(TEXT)
    first, _ = scored(engine, tokens, max_tokens=4, sampling=GREEDY)
    again, pieces = scored(engine, tokens, max_tokens=4, sampling=GREEDY)
    np.testing.assert_allclose([each.logprob for each in first], [each.logprob for each in again], atol=0.05)
    plain = engine.submit(Request(tokens, max_tokens=4, sampling=GREEDY))
    assert "".join(piece.text for piece in pieces) == plain.text()
    assert plain.usage.reused_tokens == len(tokens) - 1


def test_beside_other_requests_and_sets(engine):
    """More prompts than slots, whose positions share batches with answers of other sets."""
    tokens = engine.tokenize(TEXT)
    alone = {name: scored(engine, tokens, name, max_tokens=1)[0] for name in ("base", "shout", "verse")}
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(engine.submit(Request(tokens[:20], max_tokens=60)).text) for _ in range(3)]
        jobs = [(name, pool.submit(scored, engine, tokens, name, max_tokens=1)) for name in [*alone] * 2]
        for name, job in jobs:
            found = [each.logprob for each in job.result()[0]]
            difference = np.abs(np.subtract(found, [each.logprob for each in alone[name]]))
            # batches of other sizes round otherwise: one position of hundreds may lie beyond 0.05
            assert np.sort(difference)[-2] < 0.05
            assert difference.max() < 0.1
            assert difference.mean() < 0.005
        assert all(isinstance(other.result(), str) for other in others)


def test_one_token_and_no_logprobs(engine):
    assert scored(engine, [5, 6], max_tokens=0)[0][0].token == 6
    alone = engine.submit(Request([5], max_tokens=1, logprobs=0, prompt_logprobs=True))
    assert all(piece.prompt is None for piece in alone)
    with pytest.raises(RequestError, match="prompt_logprobs needs logprobs"):
        engine.submit(Request([5, 6], prompt_logprobs=True))


@pytest.mark.parametrize("options", [{"n_batch": 4, "n_parallel": 4}, {"n_batch": 1, "n_parallel": 1}])
def test_small_batches(options):
    with serving.engine(kv_type="F32", **options) as small:
        tokens = small.tokenize(TEXT)[:60]
        found, _ = scored(small, tokens, "shout", max_tokens=1)
        chosen = wanted(tokens, "shout")[np.arange(59), tokens[1:]]
        np.testing.assert_allclose([each.logprob for each in found], chosen, atol=0.05)
