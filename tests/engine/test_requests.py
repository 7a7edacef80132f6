"""What the engine refuses, ends early, and survives."""

import contextlib
import ctypes
import gc
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gguflora.runtime.adapter_files as loading_module
from gguflora.diagnostics import demo
from gguflora.engine import Engine, Piece, Request, Sampling
from gguflora.engine.answer_text import AnswerText
from gguflora.errors import (
    AdapterNameError,
    EngineClosedError,
    EngineError,
    GenerationError,
    GgufloraError,
    HotSwapError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
)
from support import builders, hotswap
from support.engines import OPTIONS, ask, assert_fresh, files, open_engine, tokens_of
from support.hotswap import OTHER, PROMPT, A, B
from support.processes import open_files, resident_bytes

NO_END = Sampling(temperature=0, logit_bias={257: -100.0})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as opened:
        yield opened


def still_answers(engine: Engine) -> None:
    assert_fresh({"b": 1.0}, OTHER, list(ask(engine, "b", OTHER, max_tokens=4)))


# Names and scales


def test_sets_are_canonical(engine: Engine) -> None:
    assert engine.adapter_set("base") == engine.adapter_set([]) == engine.adapter_set("a@0") == ()
    assert engine.adapter_set(engine.model_name) == ()
    assert engine.adapter_set("b+a@0.5") == engine.adapter_set([("a", 0.5), ("b", 1)]) == (("a", 0.5), ("b", 1.0))
    assert engine.adapter_set(" a@-2 + b ") == (("a", -2.0), ("b", 1.0))


@pytest.mark.parametrize(
    ("wanted", "error"),
    [("nobody", AdapterNameError), ("", AdapterNameError), ("a+", AdapterNameError), ("a@x", RequestError),
     ("a@", RequestError), ("a@nan", RequestError), ("a@inf", RequestError), ("a@1e39", RequestError),
     ("a+a", RequestError), ([("a", math.nan)], RequestError), ([("a", "1")], RequestError),
     ([("nobody", 1.0)], AdapterNameError), ([("a", True)], RequestError), ([("a", 10**400)], RequestError)],
)  # fmt: skip
def test_bad_sets_are_refused(engine: Engine, wanted: Any, error: type[EngineError]) -> None:
    with pytest.raises(error):
        engine.adapter_set(wanted)


@pytest.mark.parametrize("name", ["base", "", "a@b", "a+b", "two words", "a"])
def test_bad_names_are_refused(engine: Engine, name: str) -> None:
    with pytest.raises(AdapterNameError):
        engine.load(files()["c"], name)


def test_an_adapter_describes_itself(engine: Engine) -> None:
    first, *_ = engine.adapters()
    assert (first.id, first.name, first.method, first.scale) == (0, "a", "LORA", 1.0)
    assert first.size == files()["a"].stat().st_size
    assert first.sha256 == loading_module.sha256_of(files()["a"])


def test_default_scale_and_numbers_of_adapters() -> None:
    with Engine(builders.gguf_model("llama"), **OPTIONS) as engine:
        loaded = [engine.load(files()[name], scale=0.5) for name in "ab"]
        assert [adapter.id for adapter in loaded] == [0, 1]
        assert loaded[0].name == files()["a"].stem
        assert engine.adapter_set(loaded[0].name) == ((loaded[0].name, 0.5),)
        engine.unload(loaded[0].name)
        assert engine.load(files()["c"], "c").id == 2, "a client may still know the first one's"
        assert [adapter.name for adapter in engine.adapters()] == [loaded[1].name, "c"]


# Requests


@pytest.mark.parametrize(
    "options",
    [{"temperature": math.nan}, {"temperature": -1}, {"temperature": math.inf}, {"top_p": 1.5}, {"top_k": -1},
     {"min_p": "0"}, {"repeat_penalty": 0}, {"frequency_penalty": math.inf}, {"presence_penalty": math.nan},
     {"logit_bias": {288: 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {0: math.nan}}, {"seed": 1.5},
     {"top_k": 2**40}],
)  # fmt: skip
def test_bad_sampling_is_refused(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ask(engine, sampling=Sampling(**options))


@pytest.mark.parametrize(
    "options",
    [{"prompt": []}, {"prompt": [288]}, {"prompt": [-1]}, {"prompt": [1.5]}, {"max_tokens": -1}, {"logprobs": 101},
     {"timeout": math.nan}, {"stop": ("",)}, {"stop": "text"}, {"prefix": np.ones((2, 3))},
     {"prefix": np.full((2, 96), np.nan)}, {"prefix": np.ones((0, 96))}],
)  # fmt: skip
def test_bad_requests_are_refused(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ask(engine, **options)


def test_a_prompt_must_fit(engine: Engine) -> None:
    with pytest.raises(PromptTooLongError):
        ask(engine, prompt=[1] * 256)
    with pytest.raises(PromptTooLongError):
        ask(engine, prompt=[1] * 250, prefix=np.ones((6, 96)))
    generation = ask(engine, prompt=[1] * 255, max_tokens=9)
    assert len(tokens_of(list(generation))) == 1
    assert generation.finish_reason == "length"


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=100.0, top_p=0.0, top_k=0, min_p=1.0), Sampling(temperature=1e-30), Sampling(top_p=0.0),
     Sampling(logit_bias=dict.fromkeys(range(288), -math.inf)), Sampling(logit_bias={5: math.inf}),
     Sampling(repeat_penalty=1000.0, frequency_penalty=1000.0, presence_penalty=-1000.0), Sampling(seed=2**32 - 1),
     Sampling(seed=-1), Sampling(temperature=1e-4, logit_bias={5: 3e38})],
)  # fmt: skip
def test_extreme_sampling_works(engine: Engine, sampling: Sampling) -> None:
    assert len(tokens_of(list(ask(engine, sampling=sampling, max_tokens=3)))) == 3


def test_sampling_follows_its_parameters(engine: Engine) -> None:
    def drawn(**options: Any) -> list[int]:
        return tokens_of(list(ask(engine, sampling=Sampling(temperature=1.5, **options), max_tokens=20)))

    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert drawn(seed=1, **plain) == drawn(seed=1, **plain) != drawn(seed=2, **plain)
    assert drawn(**plain) != drawn(**plain)
    assert drawn(seed=3, top_k=1) == tokens_of(list(ask(engine, max_tokens=20)))
    assert drawn(seed=3, logit_bias={77: math.inf}) == [77] * 20
    banned = {token: -100.0 for token in range(288) if token not in (70, 71, 72)}
    assert set(drawn(logit_bias=banned, **plain)) <= {70, 71, 72}
    assert len(set(drawn(logit_bias={77: 50.0}, frequency_penalty=60.0, **plain))) > 1


def test_sampled_frequencies_are_the_models(engine: Engine) -> None:
    top = next(ask(engine, max_tokens=1)).logprobs[0].top
    open_ended = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    generations = [
        ask(engine, sampling=Sampling(seed=seed, **open_ended), max_tokens=1, logprobs=None) for seed in range(40)
    ]
    drawn = [tokens_of(list(generation)) for generation in generations]
    for seed in range(40, 600):
        drawn.append(tokens_of(list(ask(engine, sampling=Sampling(seed=seed, **open_ended), max_tokens=1))))
    for token, _, logprob in top[:3]:
        expected, found = math.exp(logprob) * 600, drawn.count([token])
        assert abs(found - expected) < 5 * math.sqrt(expected)


# Ends


def test_a_stop_text_ends_the_answer(engine: Engine) -> None:
    whole = "".join(piece.text for piece in ask(engine, max_tokens=40))
    stop = whole[8:11]
    generation = ask(engine, max_tokens=40, stop=("never to be seen", stop))
    text = "".join(piece.text for piece in generation)
    assert text == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"
    still_answers(engine)


def test_an_end_token_ends_the_answer() -> None:
    with Engine(demo.BASE, **OPTIONS) as engine:
        generation = ask(engine, prompt=engine.tokenize(demo.PROMPT), max_tokens=100, logprobs=None)
        text = generation.text()
        assert text.endswith("forest.")
        assert generation.finish_reason == "stop"
        assert generation.usage.completion_tokens < 100


def test_nothing_may_be_generated(engine: Engine) -> None:
    generation = ask(engine, max_tokens=0)
    assert list(generation) == []
    assert (generation.finish_reason, generation.usage.completion_tokens) == ("length", 0)


def test_cancelling(engine: Engine) -> None:
    generation = ask(engine, max_tokens=200)
    next(generation)
    generation.cancel()
    rest = list(generation)
    assert generation.finish_reason == "cancelled"
    assert 0 < generation.usage.completion_tokens < 200
    assert generation.usage.completion_tokens >= len(tokens_of(rest))
    still_answers(engine)


def test_a_dropped_generation_is_cancelled() -> None:
    with open_engine(n_ctx=4096) as engine:
        generation = ask(engine, max_tokens=4000, logprobs=None)
        next(generation)
        del generation
        gc.collect()
        deadline = time.monotonic() + 10
        while engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().requests == {"cancelled": 1}


def test_time_outs(engine: Engine) -> None:
    generation = ask(engine, max_tokens=200, timeout=0.01)
    list(generation)
    assert generation.finish_reason == "timeout"
    assert generation.timings.decode < 5
    never = ask(engine, timeout=0.0)
    assert list(never) == []
    assert (never.finish_reason, never.usage.completion_tokens) == ("timeout", 0)
    still_answers(engine)


def test_a_full_queue_refuses() -> None:
    with open_engine(n_parallel=1, queue_size=2, n_ctx=4096) as engine:
        running = ask(engine, max_tokens=4000, logprobs=None)
        next(running)
        waiting = [ask(engine, max_tokens=3) for _ in range(2)]
        assert engine.stats().queued == 2
        with pytest.raises(QueueFullError):
            ask(engine)
        running.cancel()
        assert all(len(tokens_of(list(generation))) == 3 for generation in waiting)
        assert engine.stats().queued == 0
        still_answers(engine)


def test_timings_add_up(engine: Engine) -> None:
    started = time.monotonic()
    generation = ask(engine, max_tokens=50)
    list(generation)
    took, timings = time.monotonic() - started, generation.timings
    assert min(timings.queue, timings.prefill, timings.decode) >= 0
    assert timings.queue + timings.prefill + timings.decode <= took
    assert timings.ttft == pytest.approx(timings.queue + timings.prefill)


# Failures


def test_a_failing_decode_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(n_ctx=4096) as engine:
        other = ask(engine, "b", OTHER, max_tokens=300, logprobs=5, sampling=NO_END)
        next(other)
        decode, broken = llama_cpp.llama_decode, []

        def fails_twice(context: Any, batch: Any) -> int:
            """With both requests in one batch, and when they are tried one by one with the new one."""
            if batch.n_tokens > 1 and len(broken) < 2:
                broken.append(batch.n_tokens)
                return -3
            return int(decode(context, batch))

        monkeypatch.setattr(llama_cpp, "llama_decode", fails_twice)
        failed = ask(engine, "a")
        with pytest.raises(GenerationError, match="could not decode"):
            list(failed)
        assert failed.finish_reason == "error"
        assert_fresh({"a": 1.0}, PROMPT, list(ask(engine, "a")))
        assert len(tokens_of(list(other))) == 299
        assert broken == [len(PROMPT) + 1, len(PROMPT)]
        assert engine.stats().requests == {"error": 1, "length": 2}


def test_an_exception_in_the_thread_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine() as engine:
        monkeypatch.setattr("gguflora.engine.job.token_logprob", lambda *_: 1 / 0)
        with pytest.raises(GenerationError, match="division"):
            list(ask(engine, "a"))
        monkeypatch.undo()
        still_answers(engine)


def test_infinite_logits_fail_their_request_only() -> None:
    with open_engine() as engine:
        for _ in range(2):
            with pytest.raises(GenerationError, match="not finite"):
                list(ask(engine, "a@3e38"))
            still_answers(engine)


def test_a_context_that_cannot_be_made_fails_the_engine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(EngineError, match="could not make a context"):
        patched.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
        open_engine()
    with open_engine() as engine:
        still_answers(engine)


def bad_adapters(folder: Path) -> dict[str, Path]:
    garbage = folder / "garbage.gguf"
    garbage.write_bytes(os.urandom(4096))
    cut = folder / "cut.gguf"
    cut.write_bytes(files()["a"].read_bytes()[:-100])
    ones = np.ones((4, 96), np.float32)
    shape = {"blk.0.attn_q.weight.lora_a": np.ones((4, 95), np.float32), "blk.0.attn_q.weight.lora_b": ones.T.copy()}
    vector = {"blk.0.attn_norm.weight.lora_a": ones[:1], "blk.0.attn_norm.weight.lora_b": ones[:1]}
    return {
        "nothing": folder / "nothing.gguf",
        "garbage": garbage,
        "cut": cut,
        "a model": builders.gguf_model("llama"),
        "another base": hotswap.gguf_lora(A, "qwen3"),
        "a shape": hotswap.write_lora(folder / "shape.gguf", shape),
        "an ignored tensor": hotswap.write_lora(folder / "vector.gguf", vector),
        "an empty folder": folder,
    }


def test_bad_adapters_are_refused(engine: Engine, tmp_path: Path) -> None:
    before = engine.adapters()
    for name, path in bad_adapters(tmp_path).items():
        with pytest.raises(GgufloraError):
            engine.load(path, name.replace(" ", "-"))
    assert engine.adapters() == before
    still_answers(engine)


def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    part = {"token_embd.weight.lora_a": np.ones((288, 4), np.float32),
            "token_embd.weight.lora_b": np.ones((96, 4), np.float32)}  # fmt: skip
    file = hotswap.write_lora(tmp_path / "tied.gguf", part, general__architecture="gemma2")
    with Engine(builders.gguf_model("gemma2"), **OPTIONS) as engine:
        with pytest.raises(HotSwapError, match="token embedding"):
            engine.load(file)
        assert len(tokens_of(list(ask(engine)))) == 12


def test_bad_bases_are_refused(tmp_path: Path) -> None:
    bad = bad_adapters(tmp_path)
    for name in ("nothing", "garbage", "cut"):
        with pytest.raises((GgufloraError, OSError)):
            Engine(bad[name])
    with pytest.raises(GgufloraError):
        Engine(files()["a"])


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 0}, {"n_parallel": 0}, {"max_contexts": 0}, {"queue_size": -1}, {"n_batch": 0}, {"threads": 0},
     {"kv_type": "Q4_K"}, {"max_kv_bytes": 1000}, {"n_ctx": 1.5}],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        Engine(builders.gguf_model("llama"), **options)


# Life time


def test_kv_bytes_are_counted_and_bounded() -> None:
    n_cells, n_kv_heads, head_dim, n_layers = 256, 2, 32, 2
    one = n_cells * n_kv_heads * head_dim * n_layers * 2 * 4  # keys and values of 4 bytes
    with open_engine(max_contexts=5, max_kv_bytes=one) as engine:
        list(ask(engine, "c"))
        assert [context.adapters for context in engine.stats().contexts] == [(("c", 1.0),)]
        for name in ("a", "b", "base"):
            list(ask(engine, name))
        stats = engine.stats()
        assert [context.kv_bytes for context in stats.contexts] == [one]
        assert stats.kv_bytes == one
        assert stats.contexts[0].adapters is None
    with pytest.raises(EngineError, match="lower n_ctx"):
        open_engine(max_kv_bytes=one - 1)


def test_an_unloaded_adapter_serves_its_last_requests() -> None:
    with open_engine(n_ctx=4096) as engine:
        running = ask(engine, "a", max_tokens=100, sampling=NO_END)
        next(running)
        engine.unload("a")
        with pytest.raises(AdapterNameError):
            engine.adapter_set("a")
        with pytest.raises(AdapterNameError):
            engine.unload("a")
        engine.load(files()["b"], "a")
        assert_fresh({"b": 1.0}, PROMPT, list(ask(engine, "a")))
        pieces = list(running)
        assert len(tokens_of(pieces)) >= 98
        assert all(generation != 0 for generation in generations_in_force(engine))


def generations_in_force(engine: Engine) -> set[int]:
    context = engine._scheduler.context
    identities = [slot.identity for slot in context.slots] + [context._applied.identity if context._applied else None]
    return {load_id for identity in identities for _, load_id, _ in identity or ()}


def test_opening_and_closing_leaves_nothing() -> None:
    def cycle(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            with open_engine() as engine:
                list(ask(engine, "a", max_tokens=1, logprobs=None))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but scattered is no leak
        return resident_bytes(), open_files(), threading.active_count()

    memory, *others = cycle(5)
    grown = []
    for _ in range(3):  # what other tests left behind may grow once; a leak grows in every round
        before, (memory, *left) = memory, cycle(20)
        assert left == others
        grown.append(memory - before)
    assert min(grown) < 1e6, grown


def test_closing_ends_everything() -> None:
    engine = open_engine(n_ctx=4096, n_parallel=1)
    generations = [ask(engine, name, max_tokens=4000, logprobs=None) for name in ("a", "a", "b", "base")]
    next(generations[0])
    engine.close()
    engine.close()
    for generation in generations:
        list(generation)
        assert generation.finish_reason == "cancelled"
    calls = [
        lambda: engine.submit(Request([1])), lambda: engine.load(files()["a"], "y"), lambda: engine.unload("a"),
        lambda: engine.tokenize("x"), lambda: engine.detokenize([1]), lambda: engine.render_chat([]), engine.stats,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(EngineClosedError):
            call()


def test_closing_frees_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    engine = open_engine()
    for name in ("a", "b"):
        list(ask(engine, name, max_tokens=1))
    for function in ("llama_free", "llama_adapter_lora_free", "llama_model_free"):
        original = getattr(llama_cpp, function)
        monkeypatch.setattr(llama_cpp, function, recorded(freed, function, original))
    engine.close()
    # the context that serves and the one that looks for factors; the stack and three adapters
    assert freed == ["llama_free"] * 2 + ["llama_adapter_lora_free"] * 4 + ["llama_model_free"]


def recorded(into: list[str], name: str, function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        into.append(name)
        return function(*arguments, **options)

    return call


def test_python_may_end_with_requests_under_way() -> None:
    code = (
        "import sys; from gguflora.engine import *\n"
        "engine = Engine(sys.argv[1], n_ctx=4096, threads=1)\n"
        "generation = engine.submit(Request([1, 2, 3], max_tokens=4000))\n"
        "next(generation)\n"
        "print('so far')"
    )
    assert hotswap.run_python(code, demo.BASE) == "so far\n"


def test_threads_may_do_everything_at_once() -> None:
    failures: list[BaseException] = []
    with open_engine(queue_size=100) as engine:

        def asks(name: str, scales: dict[str, float]) -> None:
            for _ in range(6):
                assert_fresh(scales, PROMPT, list(ask(engine, name, max_tokens=5)))

        def reloads() -> None:
            for _ in range(20):
                engine.load(files()["c"], "mine")
                with contextlib.suppress(AdapterNameError):
                    list(ask(engine, "mine", max_tokens=2))
                engine.unload("mine")
                engine.stats()

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(*arguments)
            except BaseException as error:
                failures.append(error)

        jobs = [(asks, "a", {"a": 1.0}), (asks, "b@-0.5", {"b": -0.5}), (asks, "base", {}), (reloads,)]
        threads = [threading.Thread(target=guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failures


# Directories


def test_a_peft_directory_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    conversions = []
    monkeypatch.setattr(loading_module, "convert", recorded(conversions, "convert", loading_module.convert))
    folder = builders.adapter("llama", B)
    with Engine(builders.gguf_model("llama"), **OPTIONS) as engine:
        loaded = engine.load(folder, "once")
        engine.load(folder, "twice")
        assert loaded.method == "LORA"
        pieces = list(ask(engine, "twice", OTHER, max_tokens=4))
        wanted = hotswap.expected((B, 1.0), prompt=OTHER)[-1].astype(np.float64)
        entry = pieces[0].logprobs[0]
        assert entry.token == wanted.argmax()
        normalizer = np.log(np.exp(wanted).sum())
        assert entry.logprob == pytest.approx(wanted.max() - normalizer, abs=1e-4)
    assert conversions == ["convert"]
    assert len(list(tmp_path.rglob("*.gguf"))) == 1


# Text


@given(
    text=st.text(alphabet="abé日😀\n", max_size=30),
    stops=st.lists(st.text(alphabet="abé日😀", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=60),
)
def test_answer_text(text: str, stops: Sequence[str], cuts: Sequence[int]) -> None:
    """However the bytes are cut into tokens, the pieces are whole characters up to the first stop text."""
    answer, data, pieces = AnswerText(stops), text.encode(), []
    for number, cut in enumerate(cuts):
        if not answer.stopped and (data or number == 0):
            pieces.append(answer.push(number, data[:cut]))
            data = data[cut:]
    left = text.encode()[: len(text.encode()) - len(data)].decode(errors="ignore")
    pieces.append(answer.finish())
    given_out = "".join(piece.text for piece in pieces).replace("�", "")
    first = min((at for stop in stops if (at := left.find(stop)) >= 0), default=None)
    if first is None:
        assert given_out == left
        assert [token for piece in pieces for token in piece.tokens] == list(range(len(pieces) - 1))
    else:
        assert answer.stopped
        assert left.startswith(given_out)
        assert not any(stop in given_out for stop in stops)


def test_pieces_are_whole_characters() -> None:
    answer = AnswerText(())
    parts = [answer.push(number, bytes([byte])) for number, byte in enumerate("a日".encode())]
    assert parts == [Piece("a", (0,)), Piece(""), Piece(""), Piece("日", (1, 2, 3))]


def test_broken_bytes_become_replacement_characters() -> None:
    answer = AnswerText(())
    assert answer.push(1, b"\xff\xe6").text == "�"
    assert answer.push(2, b"\x97").text == ""
    assert answer.finish() == Piece("", (1, 2))  # nothing stands for a character that the answer was cut in


def test_a_chat_without_a_template(engine: Engine) -> None:
    tokens = engine.render_chat([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}])
    assert engine.detokenize(tokens) == b"Be.\n\nUser: Hi\nAssistant:"
    with pytest.raises(RequestError):
        engine.render_chat([])
    with pytest.raises(RequestError):
        engine.render_chat([1])


def test_tokens_and_text(engine: Engine) -> None:
    for text in ("", "the other one", "日本 😀", "a\0b", "<s>"):
        tokens = engine.tokenize(text, add_bos=False, special=False)
        assert engine.detokenize(tokens).decode() == text
    assert len(engine.tokenize("<s>", add_bos=False)) == 1
