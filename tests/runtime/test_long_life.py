"""Attach and engine over a long life: nothing leaks, threads do not meet, bad input leaves everything answering."""

import ctypes
import gc
import itertools
import os
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gguflora.engine import Engine, Request, Sampling
from gguflora.errors import EngineClosedError, GgufError, GgufloraError, HotSwapError, RequestError
from gguflora.runtime import attached
from gguflora.runtime.llama_lock import LlamaLock
from support import builders, hotswap
from support.hotswap import PROMPT, A, B, expected, gguf_lora, logits, open_llama, tied_lora
from support.processes import open_files, resident_bytes

GREEDY = Sampling(temperature=0)


def assert_nothing_left(cycle) -> None:
    """1000 cycles after a warm-up: memory within 5 MB, no descriptor."""
    for number in range(100):
        cycle(number)
    collect()
    before, memory = open_files(), resident_bytes()
    for number in range(1000):
        cycle(number)
    collect()
    assert open_files() == before
    assert abs(resident_bytes() - memory) < 5 << 20  # an adapter is about 90 kB: 1000 of them would be 90 MB


def collect() -> None:
    """Also gives back to the system what earlier tests have freed, which would else go at any moment."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def soft_prompt(folder: Path) -> Path:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(builders.hf_model("llama"))
    peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.slow
def test_1000_cycles_of_attach(tmp_path):
    soft, lora = soft_prompt(tmp_path / "soft"), gguf_lora(A)
    with closing(open_llama()) as llm, attached.attach(llm) as adapters:
        base = logits(llm)

        def cycle(number):
            adapters.load("x", soft if number % 10 == 5 else lora)
            adapters.apply(x=1.0)
            if number % 20 == 0:
                llm.eval([1, 2, 3])
            adapters.unload("x")

        assert_nothing_left(cycle)
        np.testing.assert_array_equal(logits(llm), base)


@pytest.mark.slow
def test_1000_cycles_of_the_engine(tmp_path):
    soft, lora = soft_prompt(tmp_path / "soft"), gguf_lora(A)
    with Engine(builders.gguf_model("llama"), n_ctx=256, threads=1) as engine:

        def cycle(number):
            engine.load(soft if number % 10 == 5 else lora, "x")
            if number % 20 == 0:
                engine.submit(Request(list(PROMPT), engine.adapter_set("x"), max_tokens=2, sampling=GREEDY)).text()
            engine.unload("x")

        assert_nothing_left(cycle)
        assert engine.adapters() == ()


# -- threads ---------------------------------------------------------------------------------------


def in_threads(count, work) -> None:
    failures = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_threads_that_share_a_llama_take_turns():
    """Each thread's greedy tokens are those it gets alone."""
    prompts = [list(PROMPT), list(hotswap.OTHER), list(PROMPT[:7]), [60, 61, 62]]

    def answer(prompt):
        return list(itertools.islice(llm.generate(prompt, temp=0.0), 8))

    with closing(open_llama()) as llm, attached.attach(llm) as adapters:
        adapters.load("a", gguf_lora(A))
        adapters.apply(a=1.0)
        alone = [answer(prompt) for prompt in prompts]

        def work(number):
            for _ in range(3):
                assert answer(prompts[number]) == alone[number]

        in_threads(len(prompts), work)


def test_threads_with_completions_and_evaluations():
    with closing(open_llama()) as llm, attached.attach(llm):
        wanted = logits(llm)[-1]

        def work(number):
            for _ in range(3):
                if number % 2:
                    llm.create_completion(list(PROMPT), max_tokens=4, temperature=0.0, logit_bias={64: 1000.0})
                else:
                    token = next(llm.generate(list(PROMPT), temp=0.0))
                    assert token == wanted.argmax()

        in_threads(4, work)


def test_different_llamas_do_not_wait_for_each_other():
    with closing(open_llama()) as one, closing(open_llama()) as other, attached.attach(one), attached.attach(other):
        paused = one.generate(list(PROMPT), temp=0.0)
        next(paused)

        def work(_):
            np.testing.assert_allclose(logits(other), expected(), atol=hotswap.TOLERANCE)

        in_threads(1, work)
        next(paused)


def test_a_generation_that_another_call_has_ended():
    with closing(open_llama()) as llm, attached.attach(llm):
        tokens = llm.generate(list(PROMPT), temp=0.0)
        next(tokens)
        next(llm.generate(list(hotswap.OTHER), temp=0.0))
        with pytest.raises(HotSwapError, match="another call to this Llama"):
            next(tokens)


def test_a_thread_that_ended_without_ending_its_generation():
    with closing(open_llama()) as llm, attached.attach(llm):
        kept = []

        def leave(_):
            kept.append(llm.generate(list(PROMPT), temp=0.0))
            next(kept[0])

        in_threads(1, leave)
        next(llm.generate(list(PROMPT), temp=0.0))
        with pytest.raises(HotSwapError):
            next(kept[0])


def test_a_turn_passes_items_and_what_is_sent():
    def steps():
        sent = yield 1
        yield sent * 2

    tokens = LlamaLock().generate(steps())
    assert next(tokens) == 1
    assert tokens.send(21) == 42
    with pytest.raises(StopIteration):
        next(tokens)


def test_use_after_close():
    with Engine(builders.gguf_model("llama"), adapters={"a": gguf_lora(A)}, n_ctx=256) as engine:
        adapters = engine.adapter_set("a")
    for use in (
        lambda: engine.submit(Request(list(PROMPT), adapters)),
        lambda: engine.load(gguf_lora(B), "b"),
        lambda: engine.unload("a"),
        engine.stats,
    ):
        with pytest.raises(EngineClosedError):
            use()
    engine.close()


# -- bad input -------------------------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, tuple[Path, type[GgufloraError]]]:
    garbage, cut = folder / "garbage.gguf", folder / "cut.gguf"
    garbage.write_bytes(b"GGUF" + os.urandom(4096))
    cut.write_bytes(gguf_lora(A).read_bytes()[:-100])
    a, b = np.full((4, 96), 0.1, np.float32), np.full((128, 4), 0.1, np.float32)
    name = "blk.0.attn_q.weight"
    written = {
        "shapes": {f"{name}.lora_a": a[:, :64].copy(), f"{name}.lora_b": b},
        "ignored": {f"{name}.lora_a": a, f"{name}.lora_b": b, "blk.0.attn_norm.weight": np.ones(96, np.float32)},
        "unknown": {"blk.9.attn_q.weight.lora_a": a, "blk.9.attn_q.weight.lora_b": b},
        "NaN": {f"{name}.lora_a": np.full_like(a, np.nan), f"{name}.lora_b": b},
    }
    files = {key: (hotswap.write_lora(folder / f"{key}.gguf", each), HotSwapError) for key, each in written.items()}
    return files | {
        "wrong base": (gguf_lora(A, "qwen2"), HotSwapError),
        "a model": (builders.gguf_model("llama"), HotSwapError),
        "garbage": (garbage, GgufError),
        "cut": (cut, GgufError),
        "missing": (folder / "none.gguf", HotSwapError),
        "tied": (tied_lora(folder), HotSwapError),
    }


def test_bad_input_leaves_attach_answering(tmp_path):
    with closing(open_llama(n_ctx=256)) as llm, attached.attach(llm) as adapters:
        adapters.load("a", gguf_lora(A))
        adapters.apply(a=1.0)
        wanted = logits(llm)
        for path, error in bad_files(tmp_path).values():
            with pytest.raises(error):
                adapters.load("bad", path)
            np.testing.assert_array_equal(logits(llm), wanted)
        for scales in ({"a": float("nan")}, {"a": float("inf")}, {"nobody": 1.0}):
            with pytest.raises(HotSwapError):
                adapters.apply(scales)
        with pytest.raises(HotSwapError, match="do not fit into the context"):
            llm.eval([60] * 300)
        with pytest.raises(ValueError, match="exceed context window"):
            llm.create_completion([60] * 300)
        np.testing.assert_array_equal(logits(llm), wanted)


def test_bad_input_leaves_the_engine_answering(tmp_path):
    with Engine(builders.gguf_model("llama"), adapters={"a": gguf_lora(A)}, n_ctx=256, kv_type="F32") as engine:

        def answer():
            generation = engine.submit(Request(list(PROMPT), engine.adapter_set("a"), max_tokens=4, sampling=GREEDY))
            return [token for piece in generation for token in piece.tokens]

        wanted = answer()
        assert wanted[0] == expected((A, 1.0))[-1].argmax()
        for path, error in bad_files(tmp_path).values():
            with pytest.raises(error):
                engine.load(path, "bad")
            assert answer() == wanted
        for name in ("nobody", "a@nan", "a@inf", "a@1e99", "a+a", "a@", "@1", ""):
            with pytest.raises(RequestError):
                engine.adapter_set(name)
        for tokens in ([60] * 300, [], [10**6], [-1]):
            with pytest.raises(RequestError):
                engine.submit(Request(tokens, engine.adapter_set("a")))
        assert answer() == wanted
