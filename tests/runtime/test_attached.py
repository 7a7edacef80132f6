"""Hot-swapping: llama.cpp with hot adapters against PEFT in torch, and everything that may happen in between."""

import gc
import itertools
import os
import random
import re
import tempfile
import threading
import time
from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from gguflora.errors import GgufError, GgufloraError, HotSwapError
from gguflora.runtime import adapter_files, attached, bindings
from support import builders, hotswap
from support.hotswap import (
    A,
    B,
    C,
    assert_answers,
    expected,
    gguf_lora,
    kill_python,
    last_logits,
    logits,
    open_llama,
    run_python,
    tied_lora,
)
from support.oracles.llama_cpp import llama_logits
from support.processes import open_files, resident_bytes

# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.75, -1.0])
def test_logits_are_those_of_peft(arch, scale):
    with closing(open_llama(arch)) as llm, attached.attach(llm) as adapters:
        adapters.load("a", gguf_lora(A, arch))
        adapters.apply(a=scale)
        assert_answers(llm, (A, scale), arch=arch)


def test_scales_differ_visibly():
    for one, other in itertools.pairwise([-1.0, 0.5, 1.0, 1.75]):
        assert np.abs(expected((A, one)) - expected((A, other))).max() > hotswap.VISIBLE


def test_scale_0_is_the_base_bit_for_bit(llm, adapters):
    base = logits(llm)
    adapters.apply(a=1.0)
    assert np.abs(logits(llm) - base).max() > hotswap.VISIBLE
    adapters.apply(a=0, b=-0.0)
    assert adapters.active == {}
    np.testing.assert_array_equal(logits(llm), base)


def test_a_to_b_to_a_to_none(llm, adapters):
    base = logits(llm)
    assert_answers(llm)
    adapters.apply(a=1.0)
    assert_answers(llm, (A, 1.0))
    with_a = logits(llm)
    adapters.apply(b=1.0)
    assert_answers(llm, (B, 1.0))
    adapters.apply({"a": 1.0})
    np.testing.assert_array_equal(logits(llm), with_a)
    adapters.apply()
    np.testing.assert_array_equal(logits(llm), base)


def test_several_adapters_at_once(llm, adapters):
    adapters.load("c", gguf_lora(C))
    adapters.apply({"a": 0.5}, b=-0.75, c=1)
    assert adapters.active == {"a": 0.5, "b": -0.75, "c": 1.0}
    assert_answers(llm, (A, 0.5), (B, -0.75), (C, 1.0))


def test_apply_is_the_complete_set(adapters):
    adapters.apply(a=1.0)
    adapters.apply(b=0.5)
    assert adapters.active == {"b": 0.5}


def test_peft_directory_is_converted_on_the_fly(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = builders.adapter("llama", A)
    before = sorted(directory.iterdir())
    with attached.attach(llm) as adapters:
        adapters.load("a", directory)
        adapters.apply(a=0.5)
        assert_answers(llm, (A, 0.5))
    assert list(tmp_path.iterdir()) == []
    assert sorted(directory.iterdir()) == before


def test_peft_directory_that_cannot_be_converted_leaves_nothing(adapters, tmp_path, monkeypatch):
    temporary, directory = tmp_path / "tmp", tmp_path / "adapter"
    temporary.mkdir()
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(GgufloraError, match=re.escape(str(directory))):
        adapters.load("c", directory)
    assert list(temporary.iterdir()) == []
    assert adapters.loaded == ["a", "b"]


def test_logits_without_logits_all_and_greedy_text(adapters, llm):
    adapters.apply(a=1.0)
    tokens = list(itertools.islice(llm.generate(list(hotswap.PROMPT), temp=0.0), 8))
    with closing(open_llama("llama")) as fresh, attached.attach(fresh) as others:
        others.load("a", gguf_lora(A))
        others.apply(a=1.0)
        assert list(itertools.islice(fresh.generate(list(hotswap.PROMPT), temp=0.0), 8)) == tokens
    assert tokens[0] == int(expected((A, 1.0))[-1].argmax())
    assert tokens[0] != int(expected()[-1].argmax())


def test_embeddings_follow_the_set():
    llm = open_llama(embedding=True, logits_all=False, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN)
    with attached.attach(llm) as adapters:
        adapters.load("a", gguf_lora(A))
        base = np.array(llm.embed("the answer"))
        adapters.apply(a=1.0)
        adapted = np.array(llm.embed("the answer"))
        adapters.apply()
        np.testing.assert_array_equal(llm.embed("the answer"), base)
        adapters.apply(a=1.0)
        np.testing.assert_array_equal(llm.embed("the answer"), adapted)
        assert np.abs(adapted - base).max() > 0.05 * np.abs(base).max()
    llm.close()


def test_speculative_decoding_across_a_swap():
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    def answer(llm):
        # n_tokens is left where speculation ended: what the next call may reuse is llama-cpp-python's affair
        return list(itertools.islice(llm.generate(list(hotswap.PROMPT) * 2, temp=0.0), 12))

    plain, drafting = open_llama(), open_llama(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    with attached.attach(plain) as ours, attached.attach(drafting) as theirs:
        for adapters in (ours, theirs):
            adapters.load("a", gguf_lora(A))
        for scales in ({"a": 1.0}, {}, {"a": -1.0}, {"a": 1.0}):
            ours.apply(scales)
            theirs.apply(scales)
            assert answer(drafting) == answer(plain)
    plain.close()
    drafting.close()


@pytest.mark.slow
def test_random_walk_is_never_stale(llm):
    """Whatever the order of changes and evaluations, the logits are those of the set in force."""
    chance = random.Random(5)
    adapters = attached.attach(llm)
    specs = {"a": A, "b": B}
    prompts = [hotswap.PROMPT, hotswap.OTHER, hotswap.PROMPT[:12]]
    scales = [0, 0.5, 1.0, -1.0]
    checked = set()
    for _ in range(100):
        name = chance.choice("ab")
        if name not in adapters.loaded:
            adapters.load(name, gguf_lora(specs[name]))
        elif chance.random() < 0.15:
            adapters.unload(name)
        elif chance.random() < 0.1:
            adapters.remove(name)
        else:
            adapters.apply({name: chance.choice(scales) for name in adapters.loaded})
        prompt = chance.choice(prompts)
        state = tuple((specs[name], scale) for name, scale in sorted(adapters.active.items()))
        checked.add(state)
        np.testing.assert_allclose(
            last_logits(llm, prompt), expected(*state, prompt=prompt)[-1], atol=hotswap.TOLERANCE, rtol=0
        )
    assert len(checked) > 8


# -- names, scales, states -------------------------------------------------------------------------


def test_remove_keeps_it_loaded(llm, adapters):
    adapters.apply(a=1.0, b=0.5)
    adapters.remove("a")
    assert adapters.active == {"b": 0.5}
    assert adapters.loaded == ["a", "b"]
    assert_answers(llm, (B, 0.5))
    adapters.remove("a")
    assert adapters.active == {"b": 0.5}


def test_unload_while_active(llm, adapters):
    base = logits(llm)
    adapters.apply(a=1.0)
    adapters.unload("a")
    assert adapters.active == {}
    assert adapters.loaded == ["b"]
    np.testing.assert_array_equal(logits(llm), base)


def test_a_name_may_be_used_again_after_unload(llm, adapters):
    adapters.apply(a=1.0)
    logits(llm)
    adapters.unload("a")
    adapters.load("a", gguf_lora(B))
    adapters.apply(a=1.0)
    assert_answers(llm, (B, 1.0))


def test_using_puts_the_set_back(llm, adapters):
    adapters.apply(a=1.0)
    with adapters.using(b=0.5) as same:
        assert same.active == {"b": 0.5}
        assert_answers(llm, (B, 0.5))
        with adapters.using():
            assert_answers(llm)
        assert_answers(llm, (B, 0.5))
    assert adapters.active == {"a": 1.0}
    assert_answers(llm, (A, 1.0))


def test_using_puts_the_set_back_after_an_exception(llm, adapters):
    adapters.apply(a=1.0)
    with pytest.raises(ZeroDivisionError), adapters.using({"b": 1.0}):
        logits(llm)
        raise ZeroDivisionError
    assert_answers(llm, (A, 1.0))


def test_using_a_wrong_set_changes_nothing(llm, adapters):
    adapters.apply(a=1.0)
    logits(llm)
    with pytest.raises(HotSwapError), adapters.using(b=float("nan")):
        pytest.fail("the block must not run")
    assert adapters.active == {"a": 1.0}
    assert llm.n_tokens == len(hotswap.PROMPT)


def test_unloading_and_closing_inside_using(llm, adapters):
    adapters.apply(a=1.0)
    with adapters.using(b=1.0):
        adapters.unload("a")
        adapters.load("a", gguf_lora(C))
    assert adapters.active == {}
    with adapters.using(b=1.0):
        adapters.close()
    assert_answers(llm)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ({"c": 1.0}, "no adapter named 'c' is loaded; loaded: 'a', 'b'"),
        ({"b": 1.0, "a": float("nan")}, "the scale of 'a' is nan"),
        ({"a": float("inf")}, "the scale of 'a' is inf"),
        ({"a": 1e39}, "32-bit float"),
        ({"a": 10**400}, "the scale of 'a'"),
        ({"a": "1"}, "the scale of 'a' is '1'"),
        ({"a": None}, "the scale of 'a' is None"),
        ({"a": True}, "the scale of 'a' is True"),
        ({"a": 1j}, "the scale of 'a' is 1j"),
        ({3: 1.0}, "no adapter named 3"),
        (["a"], "scales by name"),
        ("a", "scales by name"),
    ],
)
def test_a_failed_apply_leaves_the_set_in_force(llm, adapters, scales, said):
    adapters.apply(a=0.5)
    with_a = logits(llm)
    with pytest.raises(HotSwapError, match=re.escape(said)):
        adapters.apply(scales)
    assert adapters.active == {"a": 0.5}
    assert llm.n_tokens == len(hotswap.PROMPT)
    np.testing.assert_array_equal(logits(llm), with_a)


def test_a_scale_given_twice(adapters):
    with pytest.raises(HotSwapError, match="'a' is given twice"):
        adapters.apply({"a": 1.0}, a=0.5)


def test_numpy_scales_and_scales_that_vanish(adapters):
    adapters.apply(a=np.float32(0.5), b=np.int64(2))
    assert adapters.active == {"a": 0.5, "b": 2.0}
    adapters.apply(a=1e-60)  # 0 in llama.cpp's 32 bits
    assert adapters.active == {}


@pytest.mark.parametrize("name", ["", None, 3, b"a"])
def test_names_are_non_empty_strings(adapters, name):
    with pytest.raises(HotSwapError, match="non-empty string"):
        adapters.load(name, gguf_lora(A))


def test_loading_a_name_twice(adapters):
    with pytest.raises(HotSwapError, match="'a' is loaded already; unload it first"):
        adapters.load("a", gguf_lora(C))
    assert adapters.loaded == ["a", "b"]


@pytest.mark.parametrize("method", ["remove", "unload"])
@pytest.mark.parametrize("name", ["c", None, []])
def test_unknown_names_list_the_loaded_ones(adapters, method, name):
    with pytest.raises(HotSwapError, match="loaded: 'a', 'b'"):
        getattr(adapters, method)(name)


def test_repr_says_what_is_applied(adapters):
    adapters.apply(a=0.5)
    assert repr(adapters) == "<gguflora.Adapters active: a at 0.5; loaded: a, b>"
    adapters.close()
    assert repr(adapters) == "<gguflora.Adapters closed>"


# -- errors of files and of llama.cpp --------------------------------------------------------------


def test_missing_damaged_and_foreign_files(llm, adapters, tmp_path):
    adapters.apply(a=1.0)
    with_a = logits(llm)
    garbage, cut, whole = tmp_path / "garbage.gguf", tmp_path / "cut.gguf", gguf_lora(C).read_bytes()
    garbage.write_bytes(os.urandom(4096))
    cut.write_bytes(whole[:-100])
    for path, error in ((tmp_path / "none.gguf", HotSwapError), (garbage, GgufError), (cut, GgufError)):
        with pytest.raises(error, match=re.escape(str(path))):
            adapters.load("c", path)
    with pytest.raises(HotSwapError, match="not a LoRA adapter"):
        adapters.load("c", builders.gguf_model("llama"))
    with pytest.raises(HotSwapError, match=r"'qwen2'.*'llama'"):
        adapters.load("c", gguf_lora(A, "qwen2"))
    assert adapters.loaded == ["a", "b"]
    np.testing.assert_array_equal(logits(llm), with_a)


def test_llama_cpps_own_words_are_in_the_exception(adapters, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(adapter_files, "check_loadable", lambda path, base: None)  # so that it gets as far as llama.cpp
    path = hotswap.write_lora(tmp_path / "odd.gguf", {"blk.9.attn_q.weight.lora_a": np.ones((4, 96), np.float32)})
    with pytest.raises(HotSwapError, match=r"odd\.gguf.*blk\.9\.attn_q\.weight.*is missing one component"):
        adapters.load("c", path)
    assert capfd.readouterr().err == ""
    assert adapters.loaded == ["a", "b"]


def test_the_log_listener_is_put_back(llm, tmp_path):
    heard = []
    listener = llama_cpp.llama_log_callback(lambda level, text, data: heard.append((level, text)))
    llama_cpp.llama_log_set(listener, None)
    try:
        adapters = attached.attach(llm)
        adapters.load("a", gguf_lora(A))
        assert any(b"loaded 28 tensors" in text for _, text in heard), "the listener must hear what is no error"
        heard.clear()
        assert not llama_cpp.llama_adapter_lora_init(llm.model, str(tmp_path / "none").encode())
        assert any(b"failed to open" in text for _, text in heard)
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def test_a_listener_set_meanwhile_stays():
    """By another thread, say: the one before may be freed by then."""
    heard = []
    listener = llama_cpp.llama_log_callback(lambda level, text, data: heard.append(text))
    try:
        with bindings.captured_log():
            llama_cpp.llama_log_set(listener, None)
        assert not llama_cpp.llama_model_load_from_file(b"/none", llama_cpp.llama_model_default_params())
        assert heard
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def test_attach_wants_an_open_llama(llm):
    with pytest.raises(HotSwapError, match=r"needs a llama_cpp\.Llama, found str"):
        attached.attach("model.gguf")
    llm.close()
    with pytest.raises(HotSwapError, match="closed"):
        attached.attach(llm)


def test_attached_twice_it_is_the_same_set(llm, adapters):
    again = attached.attach(llm)
    again.apply(a=1.0)
    assert adapters.active == {"a": 1.0}
    adapters.close()
    with pytest.raises(HotSwapError):
        again.apply()


# -- closing ---------------------------------------------------------------------------------------

METHODS = {
    "load": ("c", "c.gguf"), "apply": (), "remove": ("a",), "unload": ("a",),
}  # fmt: skip


def assert_closed(adapters):
    assert adapters.active == {}
    assert adapters.loaded == []
    for method, arguments in METHODS.items():
        with pytest.raises(HotSwapError, match="closed"):
            getattr(adapters, method)(*arguments)
    with pytest.raises(HotSwapError, match="closed"), adapters.using():
        pytest.fail("the block must not run")
    adapters.close()


def test_close_gives_the_base_back(llm, adapters):
    base = logits(llm)
    adapters.apply(a=1.0, b=1.0)
    logits(llm)
    adapters.close()
    assert llm.n_tokens == 0
    assert type(llm) is llama_cpp.Llama
    np.testing.assert_array_equal(logits(llm), base)
    assert_closed(adapters)


def test_the_llama_is_closed_first(llm, adapters):
    adapters.apply(a=1.0)
    logits(llm)
    llm.close()
    assert_closed(adapters)
    llm.close()


def test_as_a_context_manager(llm):
    base = logits(llm)
    with pytest.raises(ZeroDivisionError), attached.attach(llm) as adapters:
        adapters.load("a", gguf_lora(A))
        adapters.apply(a=1.0)
        raise ZeroDivisionError
    assert_closed(adapters)
    np.testing.assert_array_equal(logits(llm), base)


def test_attach_again_after_close(llm, adapters):
    adapters.apply(a=1.0)
    adapters.close()
    with attached.attach(llm) as again:
        again.load("a", gguf_lora(B))
        again.apply(a=1.0)
        assert_answers(llm, (B, 1.0))


def test_dropping_the_llama_frees_it_at_once(monkeypatch):
    """No reference cycle: a model of gigabytes must not wait for the garbage collector."""
    freed = []
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_free", lambda model: (freed.append(model), free(model)))
    gc.disable()
    try:
        llm = open_llama()
        adapters = attached.attach(llm)
        adapters.load("a", gguf_lora(A))
        adapters.apply(a=1.0)
        logits(llm)
        del llm
        assert not freed
        del adapters
        assert len(freed) == 1
    finally:
        gc.enable()


OPEN = """
import sys
import llama_cpp
from gguflora import runtime
from gguflora.runtime import bindings
base, lora = sys.argv[1:3]
llm = llama_cpp.Llama(base, n_ctx=64, n_threads=1, verbose=False)
def attached():
    adapters = runtime.attach(llm)
    adapters.load("a", lora)
    adapters.apply(a=1.0)
    llm.eval([1, 2, 3])
    return adapters
"""


@pytest.mark.parametrize(
    "end",
    [
        "adapters = attached()",
        "attached()",
        "adapters = attached(); adapters.close(); llm.close()",
        "adapters = attached(); llm.close(); adapters.close()",
        "adapters = attached(); adapters.close()",
        "adapters = attached(); llm.close()",
        "adapters = attached(); del llm",
        "adapters = attached(); del adapters; del llm",
        "adapters = attached(); me = [llm, adapters]; me.append(me); llm.me = me; del llm, adapters",
        "adapters = attached(); tokens = llm.generate([1, 2], temp=0.0); next(tokens)",
        "adapters = attached(); llm._ctx.close(); adapters.close()",
        "adapters = attached(); llm._model.close(); adapters.close()",
    ],
)
def test_every_end_of_the_process_is_a_quiet_one(end):
    run_python(OPEN + end + "\nprint('end')", builders.gguf_model("llama"), gguf_lora(A))


def test_llama_cpp_aborts_on_a_tied_embedding(tmp_path):
    """Why there is a check before the load. When this fails, llama.cpp has learnt it, and the refusal can go."""
    code = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False, lora_path=sys.argv[2])
llm.eval([1, 2, 3])
"""
    kill_python(code, builders.gguf_model("gemma3"), tied_lora(tmp_path))


def test_the_process_survives_a_tied_embedding(tmp_path):
    with closing(open_llama("gemma3")) as llm, attached.attach(llm) as adapters:
        with pytest.raises(HotSwapError, match=r"no output\.weight.*merge the adapter"):
            adapters.load("tied", tied_lora(tmp_path))
        adapters.load("a", gguf_lora(A, "gemma3"))
        adapters.apply(a=1.0)
        assert_answers(llm, (A, 1.0), arch="gemma3")


# -- Llama(lora_path=...) --------------------------------------------------------------------------


def test_the_adapter_of_the_constructor_is_taken_over(tmp_path):
    path = tmp_path / "legal.v2.gguf"
    path.write_bytes(gguf_lora(A).read_bytes())
    llm = open_llama(lora_path=str(path), lora_scale=0.5)
    with_a = logits(llm)
    adapters = attached.attach(llm)
    assert adapters.loaded == ["legal.v2"]
    assert adapters.active == {"legal.v2": 0.5}
    assert llm.n_tokens == len(hotswap.PROMPT)  # still good
    adapters.load("b", gguf_lora(B))
    adapters.apply({"legal.v2": 1.0, "b": -0.5})
    assert_answers(llm, (A, 1.0), (B, -0.5))
    adapters.apply({"legal.v2": 0.5})
    np.testing.assert_array_equal(logits(llm), with_a)
    adapters.close()
    assert_answers(llm)
    again = attached.attach(llm)
    assert again.loaded == ["legal.v2"]
    assert again.active == {}
    again.unload("legal.v2")
    again.load("legal.v2", path)
    again.apply({"legal.v2": 1.0})
    assert_answers(llm, (A, 1.0))
    llm.close()


def test_the_adapter_of_the_constructor_may_be_off_or_gone(tmp_path):
    path = tmp_path / "gone.gguf"
    path.write_bytes(gguf_lora(A).read_bytes())
    llm = open_llama(lora_path=str(path), lora_scale=0.0)
    path.unlink()
    with attached.attach(llm) as adapters:
        assert adapters.active == {}
        assert_answers(llm)
        adapters.apply(gone=1.0)
        assert_answers(llm, (A, 1.0))
    llm.close()


# -- over time -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_cycles_leave_nothing_behind(llm):
    adapters, path, directory = attached.attach(llm), gguf_lora(A), builders.adapter("llama", B)

    def cycle(number):
        adapters.load("x", directory if number % 20 == 0 else path)
        adapters.apply(x=1.0)
        if number % 10 == 0:
            llm.eval([1, 2, 3])
        adapters.unload("x")

    for number in range(40):
        cycle(number)
    gc.collect()
    descriptors, memory = open_files(), resident_bytes()
    for number in range(200):
        cycle(number)
    gc.collect()
    assert open_files() == descriptors
    # an adapter is about 90 kB: 200 of them would be 18 MB
    assert resident_bytes() - memory < 5 << 20
    assert_answers(llm)


def test_a_swap_takes_about_a_millisecond(adapters):
    times = []
    for number in range(100):
        begin = time.perf_counter()
        adapters.apply({"ab"[number % 2]: 1.0})
        times.append(time.perf_counter() - begin)
    assert sorted(times)[50] < 0.005


def poisoned_logits(llm, adapters):
    """Base logits of a short prompt after a longer one under an adapter whose numbers overflow."""
    adapters.apply(a=1e30)
    assert np.isnan(logits(llm)).any()
    adapters.apply()
    return logits(llm, hotswap.PROMPT[:8])


def test_a_diverged_adapter_leaves_no_nan_behind(llm, adapters):
    base = logits(llm, hotswap.PROMPT[:8])
    np.testing.assert_array_equal(poisoned_logits(llm, adapters), base)


def test_without_the_wiping_it_would_leave_nan_behind(llm, adapters, monkeypatch):
    """The test above can fail. When this one does, llama.cpp masks NaN by itself."""
    monkeypatch.setattr(bindings, "_last_logits_hold_nan", lambda context, n_vocab: False)
    assert np.isnan(poisoned_logits(llm, adapters)).any()


def test_changes_from_many_threads(llm):
    adapters, failures = attached.attach(llm), []

    def work(number):
        try:
            for _ in range(10):
                adapters.load(f"n{number}", gguf_lora(A))
                adapters.apply({f"n{number}": 0.5})
                adapters.remove(f"n{number}")
                adapters.unload(f"n{number}")
        except Exception as error:
            failures.append(error)

    gguf_lora(A)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert adapters.loaded == []
    assert_answers(llm)


def test_importing_runtime_does_not_import_llama_cpp():
    code = "import sys, gguflora.runtime; print('llama_cpp' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_without_llama_cpp_python_it_says_what_to_install():
    code = """
import sys
sys.modules['llama_cpp'] = None
from gguflora import errors, runtime
try:
    runtime.attach(object())
except errors.MissingExtraError as error:
    print(error)
"""
    assert "pip install 'gguflora[runtime]'" in run_python(code)


def test_oracle_agrees_on_the_base():
    assert np.abs(llama_logits(builders.gguf_model("llama")) - expected()).max() < hotswap.TOLERANCE
