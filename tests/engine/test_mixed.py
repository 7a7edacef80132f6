"""Requests of different adapter sets in one batch: each gets the answer it gets alone."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import gguflora
from gguflora.engine import Engine, Generation, Request, Sampling
from gguflora.engine.context import Context, ContextOptions
from gguflora.engine.model import Model
from gguflora.engine.registry import AdapterPhase
from gguflora.engine.slots import Chunk
from gguflora.errors import AdapterNameError, DivergedError, GenerationError
from gguflora.runtime import adapter_stack, mixed_adapters
from gguflora.runtime.bindings import free_lora, load_lora
from gguflora.runtime.concatenated_adapters import ConcatenatedAdapters, ScaledLora
from gguflora.runtime.graph_hook import GraphFaultError, GraphHook
from gguflora.runtime.mixed_adapters import MixedAdapters
from support import builders, hotswap, real_models, zoo
from support.engines import (
    OPTIONS,
    SETS,
    adapters_of_every_kind,
    ask,
    assert_fresh,
    files,
    named,
    open_engine,
    tokens_of,
)
from support.hotswap import OTHER, PROMPT

NO_END = Sampling(temperature=0, logit_bias={257: -1e6})


def together(engine: Engine, *asked: tuple[str, Sequence[int], dict[str, Any]]) -> list[Generation]:
    """Requests that the engine sees all at once."""
    return engine._scheduler.call(
        lambda: [ask(engine, adapters, prompt, **options) for adapters, prompt, options in asked]
    )


# Contexts: the same batch under one adapter alone


@contextmanager
def opened(base: Path, architecture: str, loras: Sequence[Path], kv_type: str) -> Iterator[Any]:
    """A function that makes contexts, what is mixed in them, and each LoRA as a phase."""
    model = Model(base, verbose=False)
    pointers = [load_lora(model.pointer, lora) for lora in loras]
    concatenated = ConcatenatedAdapters(model.pointer, architecture, lambda path: path)
    mixed = MixedAdapters(model.pointer, architecture, can_rewind=True)
    assert all(mixed.add(pointer, lora) for pointer, lora in zip(pointers, loras, strict=True))
    phases = [
        AdapterPhase(frozenset({(lora.name, number, 1.0)}), (ScaledLora(pointer, lora, lora.name, 1.0),))
        for number, (pointer, lora) in enumerate(zip(pointers, loras, strict=True))
    ]
    options = ContextOptions(256, len(loras), 64, 1, kv_type)
    try:
        yield lambda: Context(model, options, concatenated, mixed), phases
    finally:
        mixed.close()
        concatenated.free()
        for pointer in pointers:
            free_lora(pointer)
        model.free()


def run(context: Context, phases: Sequence[AdapterPhase], *, mixed: bool) -> list[list[np.ndarray]]:
    """Steps of prompts and single tokens side by side; logits of each that has them, by sequence."""
    rng = np.random.default_rng(7)
    tokens = [rng.integers(10, 200, 30).tolist() for _ in phases]
    slots = [context.take([*each, 0], frozenset({("", number, 1.0)})) for number, each in enumerate(tokens)]
    # how many tokens of each sequence a step has: prompts in parts, a late one, then one token each
    steps = [[9, 1, 0, 5], [1, 7, 0, 1], [1, 1, 12, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    found: list[list[np.ndarray]] = [[] for _ in phases]
    for step, counts in enumerate(steps):
        chunks, owners = [], []
        for number, count in enumerate(counts[: len(phases)]):
            start = len(slots[number].held)
            part = tokens[number][start : start + count]
            wants = count == 1 or step > 0
            if part:
                chunks.append(Chunk(slots[number], part, part, phases[number], wants))
                owners += [number] * wants
        indices = [index for each in context.decode(chunks, mixed=mixed) for index in each]
        for owner, index in zip(owners, indices, strict=True):
            found[owner].append(context.logits(index).copy())
    context.free()
    return found


def assert_each_is_as_alone(base: Path, architecture: str, loras: Sequence[Path], kv_type: str) -> None:
    with opened(base, architecture, loras, kv_type) as (make, phases):
        found = run(make(), phases, mixed=True)
        plain = run(make(), [AdapterPhase(frozenset(), ())] * len(phases), mixed=True)
        for number, phase in enumerate(phases):
            same_stack = run(make(), [phase] * len(phases), mixed=True)
            by_llama_cpp = run(make(), [phase] * len(phases), mixed=False)
            assert len(found[number]) == len(same_stack[number]) >= 3
            for mixed, alone, own, base_ in zip(
                found[number], same_stack[number], by_llama_cpp[number], plain[number], strict=True
            ):
                np.testing.assert_array_equal(mixed, alone)
                # llama.cpp sums the ranks of one adapter in another order than those of a stack on some processors
                np.testing.assert_allclose(mixed, own, atol=2e-2 * np.abs(own).max(), rtol=0)
                assert np.abs(mixed - base_).max() > 10 * np.abs(mixed - own).max()


@cache
def random_lora(base: Path, seed: int, rank: int, folder: Path) -> Path:
    """A LoRA of 16-bit factors on all linear layers of a llama."""
    import gguf

    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in gguf.GGUFReader(base).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            n_in, n_out = map(int, tensor.shape)
            a = rng.normal(size=(rank, n_in)) / np.sqrt(n_in)
            b = 0.05 * rng.normal(size=(n_out, rank)) / 4
            name = tensor.name
            tensors |= {f"{name}.lora_a": a.astype(np.float16), f"{name}.lora_b": b.astype(np.float16)}
    return hotswap.write_lora(folder / f"{seed}-{rank}.gguf", tensors, adapter__lora__alpha=np.float32(0))


@pytest.mark.parametrize("kv_type", ["F32", "F16"])
def test_a_mixed_batch_is_bit_for_bit_the_batch_under_one_adapter(kv_type: str) -> None:
    base = builders.gguf_model("llama")
    folder = builders.workspace()
    loras = [random_lora(base, seed, rank, folder) for seed, rank in enumerate([16, 3, 40, 16])]
    assert_each_is_as_alone(base, "llama", loras, kv_type)


@pytest.mark.slow
def test_a_real_model_mixes_prompts_and_decode_steps(tmp_path: Path) -> None:
    base = real_models.model("smollm2")
    loras = [random_lora(base, seed, 16, tmp_path) for seed in range(4)]
    assert_each_is_as_alone(base, "llama", loras, "F16")


# The engine


def test_every_set_is_as_alone() -> None:
    with open_engine() as engine:
        prompts = [PROMPT, OTHER, PROMPT[:9], OTHER[:5]]
        asked = [(name, prompt, {"max_tokens": 30}) for name, prompt in zip(SETS, prompts, strict=True)]
        for (name, prompt, _), generation in zip(asked, together(engine, *asked), strict=True):
            assert_fresh(named(name), prompt, list(generation))
        assert engine.stats().mixed_steps >= 29
        assert engine.stats().swaps == 0


def test_clients_on_four_adapters_share_their_steps() -> None:
    names = ["a", "b", "c", "d"]
    with open_engine_with(files() | {"d": files()["a"]}, n_ctx=2048) as engine:
        for number in range(4):  # each round is asked before any of it is decoded, however fast the machine is
            prompt = (*OTHER[: 5 + number], number) if number else PROMPT
            asked = ((name, prompt, {"max_tokens": 60, "sampling": NO_END}) for name in names)
            assert [len(tokens_of(list(generation))) for generation in together(engine, *asked)] == [60] * 4
        stats = engine.stats()
    assert stats.mixed_steps >= 0.95 * (stats.mixed_steps + stats.single_steps)
    assert stats.mixed_steps + stats.single_steps < 2 * 240


def open_engine_with(adapters: dict[str, Path], **options: Any) -> Engine:
    return Engine(builders.gguf_model("llama"), adapters=adapters, **OPTIONS | options)


def odd_adapters() -> dict[str, Path]:
    """Ranks that fill no bay, or several; only some tensors; the token embedding; 16-bit factors."""
    specs = {
        "rank 3": builders.Adapter(rank=3, seed=11),
        "rank 17 of q": builders.Adapter(targets=("q_proj",), rank=17, seed=12),
        "rank 33 of mlp": builders.Adapter(targets=builders.MLP, rank=33, seed=13),
        "embedding": builders.Adapter(targets=("embed_tokens", "v_proj"), rank=5, seed=14),
        "head": builders.Adapter(targets=("lm_head", "o_proj"), rank=2, seed=15),
    }
    made = {}
    for name, spec in specs.items():
        folder = builders.adapter("llama", spec)
        file = folder.with_suffix(".gguf")
        gguflora.convert(folder, builders.gguf_model("llama"), file, force=True)
        made[name.replace(" ", "-")] = file
    return made | {"half": random_lora(builders.gguf_model("llama"), 3, 8, builders.workspace())}


def test_odd_adapters_are_mixed() -> None:
    adapters = odd_adapters()
    with open_engine_with(adapters, n_parallel=8, n_ctx=1024) as engine:
        options = {"max_tokens": 10, "logprobs": 100, "sampling": NO_END}
        alone = {name: logprobs(ask(engine, name, **options)) for name in [*adapters, "base"]}
        assert engine.stats().mixed_steps == 0
        distinct = {tuple(sorted(each[0].items())) for each in alone.values()}
        assert len(distinct) == len(alone)  # every adapter acts
        mixed = together(engine, *((name, PROMPT, options) for name in alone))
        for name, generation in zip(alone, mixed, strict=True):
            for found, wanted in zip(logprobs(generation), alone[name], strict=True):
                assert found.keys() == wanted.keys()
                atol = 5e-3 if name == "half" else 1e-5
                np.testing.assert_allclose(list(found.values()), [wanted[t] for t in found], atol=atol, rtol=0)
        assert engine.stats().mixed_steps >= 9


def test_loras_on_experts_are_mixed() -> None:
    import gguf

    base = zoo.gguf_model("qwen3moe")
    loras = {}
    for seed in range(2):
        rng, tensors = np.random.default_rng(seed), {}
        for tensor in gguf.GGUFReader(base).tensors:
            if "_exps." in tensor.name:
                n_in, n_out, n_experts = map(int, tensor.shape)
                tensors[f"{tensor.name}.lora_a"] = rng.normal(size=(n_experts, 3, n_in)).astype(np.float32) * 0.3
                tensors[f"{tensor.name}.lora_b"] = rng.normal(size=(n_experts, n_out, 3)).astype(np.float32) * 0.3
        file = builders.workspace() / f"experts-{seed}.gguf"
        loras[f"e{seed}"] = hotswap.write_lora(file, tensors, general__architecture="qwen3moe")
    with Engine(base, adapters=loras, **OPTIONS) as engine:
        options = {"max_tokens": 8, "logprobs": 100, "sampling": Sampling(temperature=0)}
        alone = {name: logprobs(ask(engine, name, **options)) for name in [*loras, "e0@0.5+e1", "base"]}
        assert len({tuple(sorted(each[0].items())) for each in alone.values()}) == len(alone)
        generations = together(engine, *((name, PROMPT, options) for name in alone))
        for name, generation in zip(alone, generations, strict=True):
            for found, wanted in zip(logprobs(generation), alone[name], strict=True):
                np.testing.assert_allclose(list(found.values()), [wanted[t] for t in found], atol=1e-4, rtol=0)
        assert engine.stats().mixed_steps > 0


def logprobs(generation: Generation) -> list[dict[int, float]]:
    """Of every generated token: the most likely ones in its place."""
    return [
        dict(sorted((token, logprob) for token, _, logprob in entry.top))
        for piece in generation
        for entry in piece.logprobs
    ]


@hypothesis.settings(deadline=None, max_examples=20, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.data())
def test_any_interleaving_gives_each_the_answer_it_gets_alone(data: st.DataObject) -> None:
    """Loads, unloads, scales, prompts and cancels, several requests at a time."""
    kinds = adapters_of_every_kind()
    with Engine(builders.gguf_model("llama"), **OPTIONS | {"n_ctx": 1024}, n_batch=16) as engine:
        loaded: dict[str, str] = {}
        running: list[tuple[dict[str, float], Sequence[int], Generation]] = []
        for _ in range(data.draw(st.integers(6, 14))):
            action = data.draw(st.sampled_from(["load", "load", "ask", "ask", "ask", "unload", "cancel", "wait"]))
            if action == "load" and len(loaded) < 4:
                name = data.draw(st.sampled_from(sorted({"w", "x", "y", "z"} - loaded.keys())))
                loaded[name] = data.draw(st.sampled_from(sorted(kinds)))
                engine.load(kinds[loaded[name]], name)
            elif action == "unload" and loaded:
                name = data.draw(st.sampled_from(sorted(loaded)))
                engine.unload(name)
                del loaded[name]
            elif action == "cancel" and running:
                running.pop(data.draw(st.integers(0, len(running) - 1)))[2].cancel()
            elif action == "wait" and running:
                _check(*running.pop(0))
            elif action == "ask":
                running.append(_ask_something(engine, data, loaded))
        for each in running:
            _check(*each)


def _ask_something(
    engine: Engine, data: st.DataObject, loaded: dict[str, str]
) -> tuple[dict[str, float], Sequence[int], Generation]:
    names = data.draw(st.lists(st.sampled_from(sorted(loaded)), unique=True, max_size=3)) if loaded else []
    soft = [name for name in names if loaded[name].startswith("soft")]
    names = [name for name in names if name not in soft[1:]]  # only one can be on
    scales = {name: 1.0 if name in soft else data.draw(st.sampled_from([1.0, 0.5, -0.75])) for name in names}
    prompt = data.draw(st.sampled_from([PROMPT, OTHER, PROMPT[:11], (*OTHER, *PROMPT)]))
    text = "+".join(f"{name}@{scale}" for name, scale in scales.items()) or "base"
    generation = ask(engine, text, prompt, max_tokens=data.draw(st.integers(1, 12)))
    merged: dict[str, float] = {}
    for name, scale in scales.items():
        merged[loaded[name]] = merged.get(loaded[name], 0) + scale
    return merged, prompt, generation


def _check(scales: dict[str, float], prompt: Sequence[int], generation: Generation) -> None:
    assert_fresh(scales, prompt, list(generation))


def test_numbers_that_are_not_finite_stay_in_their_request() -> None:
    with open_engine() as engine:
        for _ in range(3):
            options = {"max_tokens": 25, "sampling": NO_END}
            bad, *good = together(
                engine, ("a@3e38", OTHER, options), ("b", PROMPT, options), ("base", OTHER, options), ("c", PROMPT, {})
            )
            with pytest.raises(DivergedError):
                list(bad)
            for scales, prompt, generation in zip(
                ({"b": 1.0}, {}, {"c": 1.0}), (PROMPT, OTHER, PROMPT), good, strict=True
            ):
                assert_fresh(scales, prompt, list(generation))
        assert engine.stats().mixed_steps > 30


@pytest.mark.parametrize("kv_type", ["F16", "Q8_0"])
def test_nor_do_they_with_flash_attention(kv_type: str) -> None:
    """Long prompts in one batch with the bad one, so that llama.cpp computes tiles of many tokens."""
    with open_engine(kv_type=kv_type, n_ctx=1024) as engine:
        long = (*OTHER, *PROMPT, *OTHER)
        wanted = tokens_of(list(ask(engine, "b", long, max_tokens=5)))
        for _ in range(2):
            bad, good = together(engine, ("a@3e38", (1, *long), {}), ("b", (*long, 5), {"max_tokens": 20}))
            with pytest.raises(GenerationError):
                list(bad)
            assert len(tokens_of(list(good))) > 0
            assert tokens_of(list(ask(engine, "b", long, max_tokens=5))) == wanted


def test_generate_many_is_one_prompt_under_many_sets() -> None:
    with open_engine(queue_size=2, n_ctx=1024) as engine:
        sets = [*SETS, "b", "c@0.5", "a"]
        generations = engine.generate_many([(PROMPT, name) for name in sets], NO_END, max_tokens=8)
        answers = [tokens_of(list(generation)) for generation in generations]
        assert [generation.usage.completion_tokens for generation in generations] == [8] * len(sets)
        assert answers == [tokens_of(list(ask(engine, name, max_tokens=8, sampling=NO_END))) for name in sets]
        assert engine.stats().mixed_steps > 7
        (by_text,) = engine.generate_many([("the", "a")], NO_END, max_tokens=2)
        assert by_text.text()
        assert engine.generate_many([]) == []
        with pytest.raises(AdapterNameError, match="nobody"):
            engine.generate_many([(PROMPT, "a"), (PROMPT, "nobody")])


# Where it is impossible


def test_without_a_hook_sets_take_turns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mixed_adapters, "unavailable", lambda: "the field 'ne' of a ggml tensor was found nowhere")
    with caplog.at_level(logging.WARNING), open_engine() as engine:
        generations = together(engine, *((name, PROMPT, {"max_tokens": 20}) for name in SETS))
        for name, generation in zip(SETS, generations, strict=True):
            assert_fresh(named(name), PROMPT, list(generation))
        assert engine.stats().mixed_steps == 0
    assert [record.message for record in caplog.records] == [
        "requests of different adapters take turns: the field 'ne' of a ggml tensor was found nowhere"
    ]


def test_a_graph_that_is_not_as_expected_ends_mixing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end, calls = GraphHook.end, []

    def fails(hook: GraphHook) -> Any:
        report = end(hook)
        calls.append(report)
        if report.n_masked and len(calls) > 8:
            raise GraphFaultError("another graph")
        return report

    with caplog.at_level(logging.WARNING), open_engine() as engine:
        monkeypatch.setattr(GraphHook, "end", fails)
        generations = together(engine, *((name, PROMPT, {"max_tokens": 20}) for name in SETS))
        for name, generation in zip(SETS, generations, strict=True):
            assert_fresh(named(name), PROMPT, list(generation))
        assert 0 < engine.stats().mixed_steps <= 8
    assert [record.message for record in caplog.records] == [
        "requests of different adapters take turns from now on: another graph"
    ]


def test_more_sets_than_bays_take_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_adapters, "MAX_BAYS", 2)
    monkeypatch.setattr("gguflora.engine.batch_planner.MAX_BAYS", 2)
    with open_engine() as engine:
        generations = together(engine, *((name, PROMPT, {"max_tokens": 20}) for name in SETS))
        for name, generation in zip(SETS, generations, strict=True):
            assert_fresh(named(name), PROMPT, list(generation))
        assert {stack.n_bays for stack in engine._mixed._stacks.values()} <= {1, 2}


def test_a_stack_grows_and_shrinks_and_adapters_take_the_bays_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_adapters, "_PATIENCE", 3)
    copies = []
    copy = adapter_stack.AdapterStack._copy
    monkeypatch.setattr(adapter_stack.AdapterStack, "_copy", lambda *each: (copies.append(each), copy(*each)))
    with open_engine(n_ctx=1024) as engine:
        for names in (["a", "b", "c", "base"], ["a", "b"], ["c", "b"], ["base", "a"], ["a", "b", "c", "base"]):
            generations = together(engine, *((name, PROMPT, {"max_tokens": 12}) for name in names))
            for name, generation in zip(names, generations, strict=True):
                assert_fresh({} if name == "base" else {name: 1.0}, PROMPT, list(generation))
        assert {stack.n_bays for stack in engine._mixed._stacks.values()} >= {2, 4}
        assert len(copies) >= 6


def test_a_cancelled_request_leaves_the_others_alone() -> None:
    with open_engine(n_ctx=1024) as engine:
        gone, kept = together(engine, ("a", PROMPT, {"max_tokens": 200}), ("b", OTHER, {"max_tokens": 40}))
        next(gone)
        gone.cancel()
        engine.unload("a")
        assert_fresh({"b": 1.0}, OTHER, list(kept))


def test_threads_and_reloads() -> None:
    failures: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    with open_engine(n_ctx=1024, queue_size=100) as engine:

        def asks(name: str) -> None:
            for _ in range(5):
                assert_fresh({name: 1.0}, PROMPT, list(ask(engine, name, max_tokens=6)))

        def reloads() -> None:
            for number in range(10):
                engine.load(files()["c"], f"more{number}")
                with suppress(AdapterNameError):
                    list(engine.submit(Request([1, 2, 3], engine.adapter_set(f"more{number}"), max_tokens=2)))
                engine.unload(f"more{number}")

        threads = [
            threading.Thread(target=guarded, args=(work,)) for work in (lambda: asks("a"), lambda: asks("b"), reloads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
