"""Activated LoRA at run time, held against PEFT's in torch: it begins at its invocation tokens, and not before."""

import itertools
import json
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from typing import Any

import llama_cpp
import numpy as np
import peft
import pytest
import torch

from gguflora.engine import Engine, Request, Sampling
from gguflora.errors import HotSwapError
from gguflora.runtime import attached
from gguflora.runtime.alora import n_in_common, segments, start_of
from support import builders, hotswap
from support.alora import HEAD, INVOCATION, ONCE, OTHER, TAIL, TWICE, alora, alora_gguf
from support.hotswap import A, gguf_lora, last_logits, logits, open_llama
from support.oracles.gguf_files import read_metadata
from support.oracles.peft import peft_model

NEVER = (*HEAD, *TAIL, 100, 101)
AT_START = (*INVOCATION, *TAIL)
AT_END = (*HEAD, *INVOCATION)
PROMPTS = {"once": ONCE, "twice": TWICE, "never": NEVER, "at start": AT_START, "at end": AT_END}


@cache
def torch_model(arch: str = "llama") -> Any:
    return peft_model(builders.hf_model(arch), alora(arch=arch))


@cache
def expected(prompt: tuple[int, ...], arch: str = "llama") -> np.ndarray:
    """PEFT's logits of the prompt in one forward pass."""
    with torch.inference_mode():
        return torch_model(arch)(input_ids=torch.tensor([prompt])).logits[0].numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=hotswap.TOLERANCE, rtol=0)


@pytest.fixture
def adapters(llm):
    adapters = attached.attach(llm)
    adapters.load("x", alora())
    adapters.apply(x=1.0)
    return adapters


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_logits_are_those_of_peft(arch, prompt):
    with closing(open_llama(arch)) as llm, attached.attach(llm) as adapters:
        base = logits(llm, prompt)
        adapters.load("x", alora_gguf(arch=arch))
        adapters.apply(x=1.0)
        found = logits(llm, prompt)
        assert_close(found, expected(prompt, arch))
        start = start_of(prompt, INVOCATION)
        kept = len(prompt) if start is None else start
        assert_close(found[:kept], base[:kept])
        assert start is None or np.abs(found[start:] - base[start:]).max() > 0.3


def test_whole_it_would_be_another_model(llm, adapters):
    """The tests here can fail: begun at the first token, as llama.cpp does by itself, the logits are far off."""
    from gguflora.runtime.bindings import set_loras

    adapters.apply()
    set_loras(llm.ctx, [(adapters._set.loaded["x"].pointer, 1.0)])
    assert np.abs(logits(llm, ONCE) - expected(ONCE)).max() > 0.3
    set_loras(llm.ctx, [])


def test_prompts_in_any_order_are_not_stale(llm, adapters):
    """Prompts share long beginnings, but what the adapter has computed of them is not always the same."""
    for one, other in itertools.permutations(PROMPTS.values(), 2):
        for prompt in (one, other):
            assert_close(last_logits(llm, prompt), expected(prompt)[-1])


def test_the_bases_cells_before_the_invocation_are_kept(llm, adapters, monkeypatch):
    last_logits(llm, (*HEAD, 90, 91))
    evaluated = []
    decode = type(llm._ctx).decode
    monkeypatch.setattr(
        type(llm._ctx), "decode", lambda self, batch: (evaluated.append(batch.n_tokens()), decode(self, batch))
    )
    assert_close(last_logits(llm, ONCE), expected(ONCE)[-1])
    assert sum(evaluated) == len(ONCE) - len(HEAD)
    evaluated.clear()
    assert_close(last_logits(llm, (*ONCE, 77)), expected((*ONCE, 77))[-1])
    assert sum(evaluated) == 1


@pytest.mark.parametrize("cut", [3, 17, 18, 19, 22, 29])
def test_evaluated_in_parts(llm, adapters, cut):
    """Also where the invocation tokens are split, and where they come a second time."""
    for prompt in (ONCE, TWICE):
        llm.reset()
        llm.eval(prompt[:cut])
        llm.eval(prompt[cut:])
        assert_close(llm.scores[len(prompt) - 1], expected(prompt)[-1])


def test_generated_invocation_tokens_begin_nothing(llm, adapters):
    """PEFT looks for them in the prompt only."""

    def force(ids: Any, scores: Any) -> Any:
        scores[INVOCATION[(len(ids) - len(NEVER)) % 3]] += 1000
        return scores

    tokens = llm.generate(list(NEVER), temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([force]))
    generated = tuple(next(tokens) for _ in range(7))
    assert generated[:3] == INVOCATION
    found = llm.scores[llm.n_tokens - 1].copy()
    evaluated = (*NEVER, *generated)[: llm.n_tokens]
    adapters.apply()
    assert_close(found, logits(llm, evaluated)[-1])


def test_greedy_text_goes_on_with_the_adapter(llm, adapters):
    wanted = list(ONCE)
    for _ in range(8):
        wanted.append(int(expected(tuple(wanted))[-1].argmax()))
    tokens = llm.generate(list(ONCE), temp=0.0)
    assert [next(tokens) for _ in range(8)] == wanted[len(ONCE) :]


def test_beside_a_lora_that_is_always_on(llm, adapters):
    """Before the invocation the logits are the LoRA's, after it not its alone."""
    adapters.load("a", gguf_lora(A))
    adapters.apply(a=1.0)
    alone = logits(llm, ONCE)
    assert_close(alone, hotswap.expected((A, 1.0), prompt=ONCE))
    adapters.apply(a=1.0, x=1.0)
    both = logits(llm, ONCE)
    assert_close(both[: len(HEAD)], alone[: len(HEAD)])
    assert np.abs(both[len(HEAD) :] - alone[len(HEAD) :]).max() > 0.3


def test_two_that_begin_at_different_places(llm, adapters):
    """Where only one occurs, the other changes nothing."""
    adapters.load("y", alora(OTHER, seed=6))
    adapters.apply(x=1.0, y=1.0)
    assert_close(logits(llm, ONCE), expected(ONCE))
    both = (*HEAD, *INVOCATION, *TAIL, *OTHER, 70, 71)
    found = logits(llm, both)
    cut = len(HEAD) + 3 + len(TAIL)
    assert_close(found[:cut], expected(both)[:cut])
    assert np.abs(found[cut:] - expected(both)[cut:]).max() > 0.1
    for prompt in (ONCE, both, (*HEAD, *OTHER, 70), both):
        fresh = logits(llm, prompt)[-1]
        assert_close(last_logits(llm, prompt), fresh)


def test_states_remember_where_it_began(llm, adapters):
    llm.eval(ONCE)
    state = llm.save_state()
    logits(llm, NEVER)
    llm.load_state(state)
    assert_close(last_logits(llm, (*ONCE, 77)), expected((*ONCE, 77))[-1])
    llm.load_state(state)
    assert_close(last_logits(llm, TWICE), expected(TWICE)[-1])


def test_texts_cannot_be_embedded(tmp_path):
    with closing(open_llama(embedding=True, logits_all=False)) as llm, attached.attach(llm) as adapters:
        adapters.load("x", alora())
        adapters.apply(x=1.0)
        with pytest.raises(HotSwapError, match="activated LoRA"):
            llm.embed("a")


def test_the_adapter_of_the_constructor(tmp_path):
    """llama-cpp-python applies it whole; attached, it begins where it should, and nothing of before is reused."""
    llm = open_llama(lora_path=str(alora_gguf()))
    llm.eval(ONCE)
    whole = llm.scores[len(ONCE) - 1].copy()
    assert np.abs(whole - expected(ONCE)[-1]).max() > 0.3
    with attached.attach(llm) as adapters:
        assert adapters.active == {alora_gguf().stem: 1.0}
        assert_close(last_logits(llm, ONCE), expected(ONCE)[-1])
    llm.close()


def test_generate_without_reset(llm, adapters):
    llm.eval((*HEAD, 100))
    assert next(llm.generate([101, 102, *TAIL], temp=0.0, reset=False)) == expected(ONCE)[-1].argmax()


# -- the engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    files = {"x": alora(), "y": alora(OTHER, seed=6), "a": gguf_lora(A)}
    with Engine(builders.gguf_model("llama"), adapters=files, n_ctx=256, threads=1, kv_type="F32") as engine:
        yield engine


def first_logprobs(engine: Engine, name: str, prompt: Sequence[int]) -> dict[int, float]:
    request = Request(
        list(prompt), engine.adapter_set(name), max_tokens=1, sampling=Sampling(temperature=0), logprobs=100
    )
    (piece, *_) = list(engine.submit(request))
    return {token: logprob for token, _, logprob in piece.logprobs[0].top}


def assert_logprobs(found: dict[int, float], wanted: np.ndarray) -> None:
    wanted = wanted.astype(np.float64)
    logprobs = wanted - wanted.max() - np.log(np.exp(wanted - wanted.max()).sum())
    for token, logprob in found.items():
        assert logprob == pytest.approx(logprobs[token], abs=1e-3)


def test_the_engine_answers_as_peft(engine):
    for one, other in itertools.permutations(PROMPTS.values(), 2):
        for prompt in (one, other):
            assert_logprobs(first_logprobs(engine, "x", prompt), expected(prompt)[-1])


def test_the_engine_with_several(engine, llm):
    adapters = attached.attach(llm)
    for name, file in (("x", alora()), ("y", alora(OTHER, seed=6)), ("a", gguf_lora(A))):
        adapters.load(name, file)
    both = (*HEAD, *INVOCATION, *TAIL, *OTHER, 70, 71)
    for name, scales in (("x+y", {"x": 1, "y": 1}), ("a@0.5+x", {"a": 0.5, "x": 1}), ("y", {"y": 1})):
        adapters.apply(scales)
        for prompt in (both, ONCE, (*HEAD, *OTHER, *INVOCATION), both):
            assert_logprobs(first_logprobs(engine, name, prompt), logits(llm, prompt)[-1])


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "invocation", "start"),
    [([1, 2, 3, 2, 3], [2, 3], 3), ([1, 2], [1, 2, 3], None), ([2, 2, 2], [2, 2], 1), ([], [1], None), ([1], [], None)],
)
def test_the_last_occurrence(tokens, invocation, start):
    assert start_of(tokens, invocation) == start


def test_the_last_occurrence_is_pefts():
    from peft.tuners.lora.variants import calculate_alora_offsets

    chance = np.random.default_rng(0)
    for _ in range(300):
        tokens, wanted = chance.integers(0, 3, 12).tolist(), chance.integers(0, 3, chance.integers(1, 4)).tolist()
        config = {"x": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=wanted)}
        (offset,) = calculate_alora_offsets(config, "x", torch.tensor([tokens]))
        assert start_of(tokens, wanted) == (None if offset is None else len(tokens) - offset)


def test_segments():
    starts = {"x": 4, "y": 7, "z": None}
    assert list(segments(0, 9, starts)) == [
        (0, 4, frozenset()), (4, 7, frozenset("x")), (7, 9, frozenset("xy")),
    ]  # fmt: skip
    assert list(segments(5, 6, starts)) == [(5, 6, frozenset("x"))]
    assert list(segments(4, 4, starts)) == []


def test_what_two_prompts_have_in_common():
    assert n_in_common({"x": 4}, {"x": 4}, 9) == 9
    assert n_in_common({"x": 4}, {"x": 6}, 9) == 4
    assert n_in_common({"x": None}, {"x": 6}, 9) == 6
    assert n_in_common({"x": None}, {"x": None}, 9) == 9
    assert n_in_common({"x": 12}, {"x": None}, 9) == 9


def test_the_gguf_names_the_invocation_tokens(tmp_path):
    assert json.loads((alora() / "adapter_config.json").read_text())["alora_invocation_tokens"] == list(INVOCATION)
    assert read_metadata(alora_gguf())["adapter.alora.invocation_tokens"] == list(INVOCATION)
