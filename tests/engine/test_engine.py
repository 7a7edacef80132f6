"""The engine answers with exactly the adapters asked for, whatever it did before and beside."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import gguf
import llama_cpp
import pytest

from gguflora.engine import Engine, adapter_loader
from gguflora.engine import scheduler as scheduler_module
from support import builders, hotswap, zoo
from support.alora import ONCE, TWICE
from support.engines import (
    OPTIONS,
    SETS,
    adapters_of_every_kind,
    ask,
    assert_fresh,
    assert_fresh_base,
    named,
    open_engine,
    tokens_of,
)
from support.hotswap import OTHER, PROMPT


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as opened:
        yield opened


@pytest.mark.parametrize("name", SETS)
def test_tokens_are_those_of_peft(engine: Engine, name: str) -> None:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(hotswap.expected(*SETS[name], prompt=tokens)[-1].argmax()))
    assert tokens_of(list(ask(engine, name, max_tokens=6))) == tokens[len(PROMPT) :]


@pytest.mark.parametrize("name", SETS)
def test_logprobs_are_those_of_a_fresh_context(engine: Engine, name: str) -> None:
    assert_fresh(named(name), PROMPT, list(ask(engine, name)))


def test_requests_of_one_set_are_decoded_together(engine: Engine) -> None:
    prompts = [PROMPT, OTHER, PROMPT[:9], (*PROMPT[:30], 99, 98)]
    alone = [list(ask(engine, "a", prompt)) for prompt in prompts]
    before = engine.stats().decoded_tokens
    together = [list(generation) for generation in [ask(engine, "a", prompt) for prompt in prompts]]
    assert engine.stats().decoded_tokens > before
    for prompt, one, all_ in zip(prompts, alone, together, strict=True):
        assert tokens_of(one) == tokens_of(all_)
        assert_fresh({"a": 1.0}, prompt, all_)


def test_batches_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = llama_cpp.llama_decode
    all_asked = threading.Event()

    def counted(context: Any, batch: Any) -> int:
        assert all_asked.wait(60)
        sizes.append((batch.n_tokens, {batch.seq_id[i][0] for i in range(batch.n_tokens)}))
        return int(decode(context, batch))

    with open_engine() as engine:
        monkeypatch.setattr(llama_cpp, "llama_decode", counted)
        generations = [ask(engine, "a", (*PROMPT[:5], number), max_tokens=20) for number in range(4)]
        all_asked.set()
        assert all(len(tokens_of(list(generation))) == 20 for generation in generations)
    full = [size for size in sizes if size == (4, {0, 1, 2, 3})]
    assert len(full) >= 15
    assert len(sizes) <= 30


def test_a_long_prompt_joins_while_others_generate() -> None:
    with open_engine(n_batch=16) as engine:
        first = ask(engine, "a", max_tokens=40)
        next(first)
        second = ask(engine, "a", OTHER * 3)
        third = ask(engine, "b", OTHER * 3)
        assert_fresh({"a": 1.0}, OTHER * 3, list(second))
        assert_fresh({"b": 1.0}, OTHER * 3, list(third))
        first.cancel()


@pytest.mark.parametrize("n_sets", [2, 4])
def test_going_back_costs_no_prefill(n_sets: int) -> None:
    """There is a slot for each set, and every slot is used."""
    with open_engine(n_parallel=n_sets) as engine:
        for name in (*SETS,)[:n_sets] * 2:
            generation = ask(engine, name)
            list(generation)
        assert generation.usage.reused_tokens == len(PROMPT) - 1
        assert engine.stats().decoded_tokens == n_sets * (len(PROMPT) + 11) + n_sets * 12


def test_an_adapter_is_freed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last request that uses it ends between its removal and the call that frees it."""
    freed: list[Any] = []
    monkeypatch.setattr(adapter_loader, "free_lora", freed.append)
    with open_engine() as engine:
        loader, registry = engine._loader, engine._registry
        taken = registry.take(engine.adapter_set("a"))
        registered = registry.remove("a")
        loader.give_back(taken)
        loader.forget(registered)
        assert freed == [registered.pointer]


def test_a_shared_beginning_is_computed_once() -> None:
    with open_engine() as engine:
        generations = [ask(engine, "a", (*PROMPT, number)) for number in range(3)]
        pieces = [list(generation) for generation in generations]
        later = ask(engine, "a", (*PROMPT, 7))
        pieces.append(list(later))
        assert later.usage.reused_tokens == len(PROMPT)
        for number, part in zip((0, 1, 2, 7), pieces, strict=True):
            assert_fresh({"a": 1.0}, (*PROMPT, number), part)


def test_a_conversation_goes_on_from_its_cache(engine: Engine) -> None:
    first = tokens_of(list(ask(engine, "b", OTHER)))
    second = ask(engine, "b", [*OTHER, *first, 5, 6])
    assert_fresh({"b": 1.0}, [*OTHER, *first, 5, 6], list(second))
    assert second.usage.reused_tokens >= len(OTHER) + len(first) - 1


def test_sets_take_turns_in_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "SLICE_SECONDS", 0.005)
    with open_engine(n_parallel=1) as engine:
        generations = {name: ask(engine, name, max_tokens=60) for name in SETS}
        for name, generation in generations.items():
            pieces = list(generation)
            assert len(tokens_of(pieces)) == 60
            assert_fresh(named(name), PROMPT, pieces)
        stats = engine.stats()
        assert stats.swaps > len(SETS)
        assert stats.mixed_steps == 0
        assert len(stats.contexts) == 1


@pytest.mark.parametrize("kept", [True, False], ids=["saved", "dropped"])
def test_a_suspended_request_is_saved_or_computed_again(monkeypatch: pytest.MonkeyPatch, *, kept: bool) -> None:
    monkeypatch.setattr(scheduler_module, "SLICE_SECONDS", 0.0)
    with open_engine(n_parallel=1) as engine:
        if not kept:
            engine._scheduler.saved_bytes = 0
        generations = [ask(engine, name, max_tokens=10) for name in ("a", "b")]
        for name, generation in zip("ab", generations, strict=True):
            assert_fresh({name: 1.0}, PROMPT, list(generation))
        stats = engine.stats()
        decoded = len(PROMPT) * 2 + 9 * 2
        assert (stats.decoded_tokens == decoded) if kept else (stats.decoded_tokens > decoded)


def test_nobody_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "SLICE_SECONDS", 0.01)
    with open_engine(n_parallel=1, n_ctx=4096) as engine:
        endless = [ask(engine, name, max_tokens=4000, logprobs=None) for name in ("a", "b")]
        list(ask(engine, "c", max_tokens=30))
        assert all(generation.finish_reason is None for generation in endless)
        for generation in endless:
            next(generation)
            generation.cancel()


def test_a_full_context_makes_the_newest_wait() -> None:
    with open_engine(n_parallel=3) as engine:
        generations = [ask(engine, "a", (*PROMPT, number), max_tokens=200) for number in range(3)]
        for number, generation in enumerate(generations):
            pieces = list(generation)
            assert generation.finish_reason == "length"
            assert len(tokens_of(pieces)) == 200
            assert_fresh({"a": 1.0}, (*PROMPT, number), pieces)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_leaves_the_answers_of_a_fresh_context(seed: int) -> None:
    """Load, rescale, unload and load again under names that change hands, two requests at a time."""
    rng = random.Random(seed)
    kinds = adapters_of_every_kind()
    with Engine(builders.gguf_model("llama"), **OPTIONS, n_parallel=rng.choice([1, 2, 3])) as engine:
        loaded: dict[str, str] = {}  # names, and what is behind them
        for _ in range(60):
            action = rng.random()
            if action < 0.25 and len(loaded) < 3:
                name = rng.choice(sorted({"x", "y", "z"} - loaded.keys()))
                loaded[name] = rng.choice(sorted(kinds))
                engine.load(kinds[loaded[name]], name)
            elif action < 0.35 and loaded:
                name = rng.choice(sorted(loaded))
                engine.unload(name)
                del loaded[name]
            else:
                asked = []
                for _ in range(rng.choice([1, 1, 2])):
                    names = rng.sample(sorted(loaded), rng.randint(0, len(loaded)))
                    soft = [name for name in names if loaded[name].startswith("soft")]
                    names = [name for name in names if name not in soft[1:]]  # only one can be on
                    scales = {name: 1.0 if name in soft else rng.choice([1.0, 0.5, -0.75]) for name in names}
                    prompt = rng.choice([PROMPT, OTHER, PROMPT[:11], OTHER + PROMPT, ONCE, TWICE, ONCE[:-3]])
                    text = "+".join(f"{name}@{scale}" for name, scale in scales.items()) or "base"
                    asked.append((scales, prompt, ask(engine, text, prompt, max_tokens=3)))
                for scales, prompt, generation in asked:
                    merged: dict[str, float] = {}
                    for name, scale in scales.items():
                        merged[loaded[name]] = merged.get(loaded[name], 0) + scale
                    assert_fresh(merged, prompt, list(generation))


def test_removal_gives_the_base_back() -> None:
    """Bit for bit where the cache is as empty as before: other requests' cells change the order of sums."""

    def exact(engine: Engine) -> list[tuple[int, float]]:
        return [(entry.token, entry.logprob) for piece in ask(engine) for entry in piece.logprobs]

    with open_engine(n_parallel=1) as engine:
        before = exact(engine)
        list(ask(engine, "a+b"))
        assert exact(engine) == before
        list(ask(engine, "c"))  # now the base's cells are gone again
        engine.unload("a")
        engine.unload("b")
        assert exact(engine) == before


def test_embeddings_before_the_prompt() -> None:
    reader = gguf.GGUFReader(builders.gguf_model("llama"))
    table = next(tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight")
    with open_engine(n_batch=8) as engine:
        for name in ("base", "a"):
            generation = ask(engine, name, PROMPT[10:], prefix=table[list(PROMPT[:10])])
            assert_fresh(dict.fromkeys({"a"} & {name}, 1.0), PROMPT, list(generation))
            again = ask(engine, name, PROMPT[10:], prefix=table[list(PROMPT[:10])])
            list(again)
            assert again.usage.reused_tokens == len(PROMPT) - 1
            other = ask(engine, name, PROMPT[10:], prefix=table[list(OTHER[-10:])])
            assert_fresh(dict.fromkeys({"a"} & {name}, 1.0), (*OTHER[-10:], *PROMPT[10:]), list(other))
            assert other.usage.reused_tokens == 0


WINDOWED = ["gemma2", "gemma3"]  # 64 tokens
STATEFUL = ["mamba", "jamba", "qwen35"]


@pytest.mark.parametrize("arch", [*WINDOWED, *STATEFUL])
def test_caches_of_other_kinds(arch: str) -> None:
    """Sliding windows and recurrent states: going on, going back, beginning alike, side by side."""
    path = builders.gguf_model(arch) if arch in WINDOWED else zoo.gguf_model(arch)
    atol = 1e-3 if arch in WINDOWED else 1e-4  # llama.cpp looks GELU up in a table of 16-bit floats
    long = (OTHER + PROMPT)[:70]
    prompts = [long, (*long[:50], 60, 61), long[:20], (*long, 62)]
    with Engine(path, **OPTIONS, n_batch=16) as engine:
        for prompt in prompts:
            generation = ask(engine, prompt=prompt, max_tokens=5)
            tokens = tokens_of(assert_fresh_base(path, prompt, list(generation), atol))
            more = ask(engine, prompt=[*prompt, *tokens[:-1], 63], max_tokens=3)
            assert_fresh_base(path, [*prompt, *tokens[:-1], 63], list(more), atol)
            assert more.usage.reused_tokens == len(prompt) + len(tokens) - 1
        for prompt, generation in [(prompt, ask(engine, prompt=prompt)) for prompt in prompts]:
            assert_fresh_base(path, prompt, list(generation), atol)
