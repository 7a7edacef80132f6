"""Nothing computed under one adapter set answers under another: KV cache, prefixes, caches, states, generators."""

import asyncio
import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from gguflora.errors import HotSwapError, RequestError
from gguflora.runtime import attached, bindings, guarded_llama
from gguflora.runtime.adapter_set import identity_of
from support import hotswap
from support.hotswap import A, B, assert_answers, expected, gguf_lora, last_logits, logits, open_llama

# random tokens are broken UTF-8, on which create_completion waits for more: let it say "a" only
ONLY_A = {64: 1000.0}
PROMPT, OTHER = list(hotswap.PROMPT), list(hotswap.OTHER)


# -- KV cache and prefix match ---------------------------------------------------------------------


def staleness(llm, adapters) -> float:
    """How far the logits of a prompt are off that shares a long prefix with one evaluated under another set."""
    adapters.apply(a=1.0)
    last_logits(llm, PROMPT)
    adapters.apply(b=1.0)
    return float(np.abs(last_logits(llm, OTHER) - expected((B, 1.0), prompt=OTHER)[-1]).max())


def test_a_shared_prefix_is_not_stale(llm, adapters):
    assert staleness(llm, adapters) < hotswap.TOLERANCE


def test_without_the_clearing_it_would_be_stale(llm, adapters, monkeypatch):
    """The test above can fail: this is what llama-cpp-python does by itself."""
    monkeypatch.setattr(attached.Adapters, "_forget", lambda self: None)
    assert staleness(llm, adapters) > 0.1


def test_the_same_prompt_again_is_not_stale(llm, adapters):
    """An exact match of the prompt evaluates nothing at all in llama-cpp-python."""
    for scales, state in (({"a": 1.0}, [(A, 1.0)]), ({"a": 0.5}, [(A, 0.5)]), ({}, []), ({"b": 1.0}, [(B, 1.0)])):
        adapters.apply(scales)
        token = next(llm.generate(PROMPT, temp=0.0))
        wanted = expected(*state)[-1]
        np.testing.assert_allclose(llm.scores[len(PROMPT) - 1], wanted, atol=hotswap.TOLERANCE, rtol=0)
        assert token == wanted.argmax()


@pytest.mark.parametrize("change", ["apply", "remove", "unload", "close", "using", "leave using"])
def test_every_change_forgets(llm, adapters, change):
    adapters.apply(a=1.0)
    block = adapters.using(b=1.0)
    if change == "leave using":
        block.__enter__()
    llm.eval(PROMPT)
    {
        "apply": lambda: adapters.apply(a=0.5),
        "remove": lambda: adapters.remove("a"),
        "unload": lambda: adapters.unload("a"),
        "close": adapters.close,
        "using": block.__enter__,
        "leave using": lambda: block.__exit__(None, None, None),
    }[change]()
    assert llm.n_tokens == 0
    assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == -1


def test_the_same_set_again_keeps_the_tokens(llm, adapters, monkeypatch):
    adapters.apply(a=1.0, b=0.5)
    last_logits(llm, PROMPT)
    adapters.apply(b=0.5, a=1.0)
    adapters.apply({"a": 1, "b": np.float32(0.5)})
    with adapters.using(a=1.0, b=0.5):
        adapters.load("c", gguf_lora(B))
        adapters.unload("c")
    assert llm.n_tokens == len(PROMPT)
    evaluated = []
    monkeypatch.setattr(llm, "eval", lambda tokens: evaluated.append(list(tokens)) or type(llm).eval(llm, tokens))
    last_logits(llm, OTHER)
    assert evaluated == [OTHER[20:]]


def test_identity_is_the_content_not_the_name(llm, adapters):
    adapters.load("twin", gguf_lora(A))
    adapters.apply(a=1.0)
    with_a = logits(llm)
    adapters.apply(twin=1.0)
    assert llm.n_tokens == len(PROMPT)  # the same file under another name
    adapters.unload("a")
    np.testing.assert_array_equal(logits(llm), with_a)
    adapters.load("a", gguf_lora(B))
    adapters.apply(a=1.0)
    assert llm.n_tokens == 0  # another file under the same name


def test_identity_tells_sets_apart():
    sets = [
        [],
        [("x", 1.0)],
        [("x", 0.5)],
        [("x", -1.0)],
        [("y", 1.0)],
        [("x", 1.0), ("x", 1.0)],
        [("x", 1.0), ("y", 0.5)],
    ]
    assert len({identity_of(each) for each in sets}) == len(sets)
    assert identity_of([("x", 1.0), ("y", 0.5)]) == identity_of([("y", 0.5), ("x", 1.0)])
    assert identity_of([("x", 0.1)]) == identity_of([("x", float(np.float32(0.1)))])


# -- generators ------------------------------------------------------------------------------------


def test_generate_does_not_go_on_across_a_change(llm, adapters):
    adapters.apply(a=1.0)
    tokens = llm.generate(PROMPT, temp=0.0)
    next(tokens)
    adapters.apply(a=1.0)
    next(tokens)
    adapters.apply(b=1.0)
    with pytest.raises(HotSwapError, match="changed while tokens were being generated"):
        next(tokens)
    assert_answers(llm, (B, 1.0))


def test_a_change_and_back_ends_generate_too(llm, adapters):
    tokens = llm.generate(PROMPT, temp=0.0)
    next(tokens)
    with adapters.using(a=1.0):
        pass
    with pytest.raises(HotSwapError):
        next(tokens)


def test_a_stream_ends_when_the_set_changes(llm, adapters):
    stream = llm.create_completion(PROMPT, max_tokens=20, stream=True, temperature=0.0, logit_bias=ONLY_A)
    next(stream)
    adapters.apply(a=1.0)
    with pytest.raises(HotSwapError):
        list(stream)


def test_generate_passes_everything_through(llm, adapters):
    alone = open_llama()
    with closing(alone):
        options = {"top_k": 3, "temp": 0.0, "repeat_penalty": 1.3}
        wanted, found = alone.generate(PROMPT, **options), llm.generate(PROMPT, **options)
        assert list(itertools.islice(found, 5)) == list(itertools.islice(wanted, 5))
        assert found.send([1, 2, 3]) == wanted.send([1, 2, 3])
        stop = {"stopping_criteria": llama_cpp.StoppingCriteriaList([lambda ids, scores: len(ids) > 28])}
        assert list(llm.generate(PROMPT, **options, **stop)) == list(alone.generate(PROMPT, **options, **stop)) != []
    found.close()
    with pytest.raises(StopIteration):
        next(found)


# -- caches of set_cache ---------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return LlamaRAMCache() if request.param == "memory" else LlamaDiskCache(str(tmp_path / "cache"))


def complete(llm, prompt):
    """A completion of four tokens, through whatever is cached."""
    llm.create_completion(prompt, max_tokens=4, temperature=0.0, logit_bias=ONLY_A)


@pytest.fixture
def loads(llm, monkeypatch):
    """What was loaded from a cache or a state: number of tokens of each."""
    seen = []
    load = llama_cpp.Llama.load_state
    monkeypatch.setattr(
        llama_cpp.Llama, "load_state", lambda self, state: (seen.append(state.n_tokens), load(self, state))[1]
    )
    return seen


def test_caches_are_kept_apart_by_set(llm, adapters, cache, loads):
    llm.set_cache(cache)
    sets = [({}, ()), ({"a": 1.0}, ((A, 1.0),)), ({"b": 1.0}, ((B, 1.0),)), ({"a": 0.5}, ((A, 0.5),))]
    for scales, _ in sets:
        adapters.apply(scales)
        complete(llm, PROMPT)
    assert loads == []  # each set met the prompt for the first time
    for scales, state in sets:
        adapters.apply(scales)
        loads.clear()
        complete(llm, OTHER)
        assert loads == [len(PROMPT) + 3]  # its own entry
        np.testing.assert_allclose(
            llm.scores[len(OTHER) - 1], expected(*state, prompt=OTHER)[-1], atol=hotswap.TOLERANCE, rtol=0
        )


def test_without_partitions_the_cache_would_be_stale(llm, adapters, cache, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr(guarded_llama.CachePartition, "_key", lambda self, tokens: tuple(tokens))
    monkeypatch.setattr(guarded_llama.GuardedLlama, "load_state", llama_cpp.Llama.load_state)
    llm.set_cache(cache)
    adapters.apply(a=1.0)
    complete(llm, PROMPT)
    adapters.apply(b=1.0)
    complete(llm, OTHER)
    assert np.abs(llm.scores[len(OTHER) - 1] - expected((B, 1.0), prompt=OTHER)[-1]).max() > 0.1


def test_what_was_cached_before_attach_and_by_the_base_stays_within_reach(llm, cache, loads):
    llm.set_cache(cache)
    complete(llm, PROMPT)
    adapters = attached.attach(llm)
    adapters.load("a", gguf_lora(A))
    adapters.apply(a=1.0)
    complete(llm, PROMPT)
    assert loads == []
    adapters.apply()
    complete(llm, PROMPT)
    assert len(loads) == 1
    adapters.apply(a=1.0)
    adapters.close()
    assert llm.cache is cache
    complete(llm, PROMPT)
    assert len(loads) == 2
    assert_answers(llm)


def test_a_cache_set_by_assignment_and_taken_back(llm, adapters):
    cache = LlamaRAMCache(capacity_bytes=1 << 30)
    assert llm.cache is None
    llm.cache = cache
    adapters.apply(a=1.0)
    complete(llm, PROMPT)
    assert PROMPT in llm.cache
    assert llm.cache.capacity_bytes == 1 << 30
    assert llm.cache.cache_size == cache.cache_size > 0
    assert PROMPT not in cache
    llm.set_cache(llm.cache)
    assert llm.cache.cache is cache
    adapters.apply()
    assert PROMPT not in llm.cache
    llm.set_cache(None)
    assert llm.cache is None


def test_a_cache_that_knows_the_constructors_adapter(loads):
    """Its plain keys belong to that adapter for good, not to the base that answers after close."""
    cache = LlamaRAMCache()
    llm = open_llama(lora_path=str(gguf_lora(A)))
    llm.set_cache(cache)
    complete(llm, PROMPT)
    adapters = attached.attach(llm)
    adapters.apply()
    complete(llm, OTHER)
    assert loads == []
    adapters.close()
    loads.clear()
    complete(llm, PROMPT)
    complete(llm, OTHER)
    np.testing.assert_allclose(llm.scores[len(OTHER) - 1], expected(prompt=OTHER)[-1], atol=hotswap.TOLERANCE, rtol=0)
    with attached.attach(llm) as again:
        complete(llm, PROMPT)
        np.testing.assert_allclose(llm.scores[len(PROMPT) - 1], expected()[-1], atol=hotswap.TOLERANCE, rtol=0)
        assert again.active == {}
    llm.close()


# -- saved states ----------------------------------------------------------------------------------


def test_a_state_belongs_to_its_set(llm, adapters):
    adapters.apply(a=1.0)
    llm.eval(PROMPT)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    adapters.apply(b=1.0)
    llm.eval(PROMPT)
    before = llm.scores[: len(PROMPT)].copy()
    with pytest.raises(HotSwapError, match=r"an adapter set other than the one applied now \(b at 1\)"):
        llm.load_state(state)
    np.testing.assert_array_equal(llm.scores[: len(PROMPT)], before)
    adapters.apply(a=1.0)
    llm.load_state(state)
    assert llm.n_tokens == len(PROMPT)
    last_logits(llm, [*PROMPT, 70, 71])
    wanted = expected((A, 1.0), prompt=[*PROMPT, 70, 71])[-1]
    np.testing.assert_allclose(llm.scores[len(PROMPT) + 1], wanted, atol=hotswap.TOLERANCE, rtol=0)


def test_a_state_from_before_attach_is_of_the_base(llm):
    llm.eval(PROMPT)
    state = llm.save_state()
    adapters = attached.attach(llm)
    llm.load_state(state)
    adapters.load("a", gguf_lora(A))
    adapters.apply(a=1.0)
    with pytest.raises(HotSwapError):
        llm.load_state(state)
    adapters.apply()
    llm.load_state(state)
    adapters.close()
    llm.load_state(state)


# -- the exchanged class ---------------------------------------------------------------------------


class MyLlama(llama_cpp.Llama):
    def save_state(self):
        self.saved = True
        return super().save_state()


def test_a_subclass_of_llama_keeps_its_methods(llm):
    llm.__class__ = MyLlama
    with attached.attach(llm):
        assert isinstance(llm, MyLlama)
        llm.save_state()
        assert llm.saved
    assert type(llm) is MyLlama


def test_a_copy_has_no_adapters(llm, adapters):
    adapters.apply(a=1.0)
    with closing(copy.copy(llm)) as twin:
        assert type(twin) is llama_cpp.Llama
        assert_answers(twin)


def test_a_pickled_llama_is_a_plain_one(llm, adapters):
    adapters.apply(a=1.0)
    for twin in (pickle.loads(pickle.dumps(llm)), copy.deepcopy(llm)):
        with closing(twin):
            assert type(twin) is llama_cpp.Llama
            assert_answers(twin)
    assert_answers(llm, (A, 1.0))


@pytest.mark.parametrize("logits_all", [False, True])
def test_an_answer_ends_at_the_end_of_the_context(logits_all):
    """llama.cpp rounds the size up to 256; a plain Llama with logits_all fails beyond the asked size."""
    bias = dict.fromkeys((257,), -100.0)
    with closing(open_llama(n_ctx=40, logits_all=logits_all)) as llm:
        options = {"max_tokens": None, "temperature": 0.0, "logit_bias": bias}
        plain = None if logits_all else llm("the ant", **options)
        with attached.attach(llm) as adapters:
            found = llm("the ant", **options)
            assert found["choices"][0]["finish_reason"] == "length"
            assert found["usage"]["total_tokens"] in ({40, 41} if logits_all else {256})
            if plain is not None:
                assert (found["choices"], found["usage"]) == (plain["choices"], plain["usage"])
            adapters.load("a", gguf_lora(A))
            adapters.apply(a=1.0)
            assert llm("the ant", **options)["choices"][0]["finish_reason"] == "length"


def test_every_piece_of_a_stream_may_be_taken_by_another_thread(llm, adapters):
    adapters.apply(a=1.0)
    whole = llm("the ant", max_tokens=6, temperature=0)["choices"][0]["text"]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        stream = llm("the ant", max_tokens=6, temperature=0, stream=True)
        taken = [pool.submit(next, stream, None).result(30) for pool in (first, second) * 5]
    assert "".join(piece["choices"][0]["text"] for piece in taken if piece) == whole

    async def answer():
        stream = llm("the ant", max_tokens=6, temperature=0, stream=True)
        pieces = []
        while (piece := await asyncio.to_thread(next, stream, None)) is not None:
            pieces.append(piece["choices"][0]["text"])
        return "".join(pieces)

    assert asyncio.run(answer()) == whole


def test_two_llamas_are_independent(llm, adapters):
    with closing(open_llama()) as second, attached.attach(second) as others:
        others.load("a", gguf_lora(B))
        cache = LlamaRAMCache()
        llm.set_cache(cache)
        second.set_cache(cache)
        others.apply(a=1.0)
        adapters.apply(a=1.0)
        complete(llm, PROMPT)
        complete(second, PROMPT)
        assert_answers(llm, (A, 1.0))
        assert_answers(second, (B, 1.0))
    assert_answers(llm, (A, 1.0))


def test_recurrent_memory_is_wiped(monkeypatch):
    """Recurrent and hybrid models keep a running state that must go with its contents."""
    wiped = []
    monkeypatch.setattr(llama_cpp, "llama_memory_clear", lambda memory, data: wiped.append(bool(data)))
    with closing(open_llama()) as llm:
        for recurrent, hybrid in ((False, False), (True, False), (False, True)):
            monkeypatch.setattr(llama_cpp, "llama_model_is_recurrent", lambda model, answer=recurrent: answer)
            monkeypatch.setattr(llama_cpp, "llama_model_is_hybrid", lambda model, answer=hybrid: answer)
            bindings.clear_memory(llm.ctx, llm.n_vocab())
    assert wiped == [False, True, True]


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"", b" a b", "caf\u00e9 \u4e2d".encode(), b"<s>x", b"ab" * 2000])
@pytest.mark.parametrize(("add_bos", "special"), [(True, False), (False, True)])
def test_tokens_are_those_of_llama(llm, adapters, text, add_bos, special):
    wanted = llama_cpp.Llama.tokenize(llm, text, add_bos, special)
    assert type(llm) is not llama_cpp.Llama
    assert llm.tokenize(text, add_bos, special) == wanted


def test_a_run_that_cannot_be_split_is_refused(llm, adapters):
    with pytest.raises(RequestError, match="divide them"):
        llm.tokenize(b"a" * (1 << 18))
