"""Soft prompts of PEFT in llama.cpp, held against PEFT in torch: logits, reuse, and what must be refused."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import gguflora
from gguflora.cli.app import app
from gguflora.engine import Engine, Generation, Request, Sampling
from gguflora.engine.chat import Chat
from gguflora.errors import (
    AdapterError,
    AdapterNameError,
    GgufloraError,
    HotSwapError,
    MismatchError,
    PromptTooLongError,
    RequestError,
    UnsupportedAdapterError,
)
from gguflora.runtime import attached, bindings, guarded_llama
from gguflora.runtime.kv_cache import fill_state
from gguflora.server.app import create_app
from gguflora.server.settings import Settings
from support import builders, hotswap, zoo
from support.alora import HEAD, ONCE, alora_gguf
from support.hotswap import A, gguf_lora, last_logits
from support.oracles.llama_cpp import quiet_llama_cpp
from support.oracles.peft import peft_model
from support.soft_prompts import (
    METHODS,
    N_VIRTUAL,
    PROMPT,
    TASK,
    expected,
    gguf_of,
    read_by_peft,
    torch_logits,
    torch_model,
    trained,
)

EMBEDDED = (
    "qwen3", "gemma", "gpt2", "granite", "falcon", "bloom", "olmo", "cohere2", "starcoder2", "gptneox", "mixtral",
    "llama4", "qwen35", "mamba", "jamba", "deepseek2", "gptoss",
)  # fmt: skip
"""Architectures whose graphs treat embeddings each in their own way: scales, positions, recurrent states."""

WITH_KEYS = ("qwen3", "gemma", "gpt2", "granite", "bloom", "olmo", "cohere2", "llama4", "exaone4", "glm4", "stablelm")
"""Architectures with another order of keys, caches with windows, or no rotary embedding."""


def open_llama(arch: str, **options: Any) -> llama_cpp.Llama:
    settings = {
        "n_ctx": 128, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2, "logits_all": True, "verbose": False,
        "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32,
    }  # fmt: skip
    with quiet_llama_cpp():
        return llama_cpp.Llama(str(gguf_of(arch)), **settings | options)


def logits(llm: llama_cpp.Llama, prompt: list[int] = PROMPT) -> np.ndarray:
    llm.reset()
    llm.eval(prompt)
    return llm.scores[: len(prompt)].copy()


INEXACT = {"gptoss": 0.05}
"""Architectures on which llama.cpp and torch differ by more than elsewhere, with and without a soft prompt."""


def assert_is_pefts(arch: str, method: str, tolerance: float = 5e-3, **options: Any) -> None:
    folder, wanted, base = trained(arch, method)
    assert np.abs(wanted - base).max() > 0.5
    with closing(open_llama(arch, **options)) as llm, attached.attach(llm) as adapters:
        without = logits(llm)
        adapters.load("soft", folder, task=TASK.get(method))
        adapters.apply(soft=1)
        np.testing.assert_allclose(logits(llm), wanted, atol=tolerance, rtol=0)
        adapters.apply()
        np.testing.assert_array_equal(logits(llm), without)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_peft(arch, method):
    assert_is_pefts(arch, method)


@pytest.mark.parametrize("arch", ["qwen2", "phi3", *EMBEDDED])
def test_virtual_tokens_on_every_kind_of_architecture(arch):
    assert_is_pefts(arch, "PROMPT_TUNING", INEXACT.get(arch, 5e-3))


@pytest.mark.parametrize("arch", ["qwen2", "phi3", *WITH_KEYS])
def test_keys_and_values_on_every_kind_of_architecture(arch):
    assert_is_pefts(arch, "PREFIX_TUNING")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
@pytest.mark.parametrize("flash_attn", [False, True])  # without it the values lie transposed
def test_keys_and_values_in_other_caches(kind, flash_attn):
    assert_is_pefts("llama", "PREFIX_TUNING", 0.05, type_k=int(kind), type_v=int(kind), flash_attn=flash_attn)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_prompts_and_soft_prompts_of_several_batches(method):
    assert_is_pefts("llama", method, n_batch=4)


def test_each_task_has_a_prompt_of_its_own():
    folder, _, _ = trained("llama", "MULTITASK_PROMPT_TUNING")
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        for task in range(3):
            adapters.load(f"t{task}", folder, task=task)
            adapters.apply({f"t{task}": 1.0})
            np.testing.assert_allclose(logits(llm), expected("llama", folder, task), atol=1e-3)
        for task in (None, 3, -1):
            with pytest.raises(AdapterError, match="tasks 0 to 2"):
                adapters.load("other", folder, task=task)


def test_greedy_text_is_pefts():
    folder, _, _ = trained("llama", "PROMPT_TUNING")
    model = read_by_peft("llama", folder)
    wanted = list(PROMPT)
    for _ in range(12):
        wanted.append(int(torch_logits(model, wanted)[-1].argmax()))
    with closing(open_llama("llama", logits_all=False)) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.apply(soft=1)
        tokens = llm.generate(list(PROMPT), temp=0.0)
        assert [next(tokens) for _ in range(12)] == wanted[len(PROMPT) :]


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_nothing_is_stale(arch, method):
    """Whatever was evaluated before: the soft prompt and what it shares with another prompt are reused, no more."""
    soft, _, _ = trained(arch, method)
    other, _, _ = trained(arch, method, seed=1)
    prompts = [PROMPT, [*PROMPT[:20], 70, 71], PROMPT[:5], PROMPT]
    with closing(open_llama(arch)) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", soft)
        adapters.load("other", other)
        for name, folder in (("soft", soft), (None, None), ("other", other), ("soft", soft)):
            adapters.apply({name: 1.0} if name else {})
            for prompt in prompts:
                wanted = expected(arch, folder, None, prompt) if folder else torch_logits(torch_model(arch), prompt)
                np.testing.assert_allclose(last_logits(llm, prompt), wanted[-1], atol=5e-3)


def test_the_soft_prompt_is_decoded_once(monkeypatch):
    folder, _, _ = trained("llama", "PROMPT_TUNING")
    decoded = []
    put = bindings.put_prefix
    for module in (bindings, guarded_llama):
        monkeypatch.setattr(module, "put_prefix", lambda *args: (decoded.append(args), put(*args)))
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.apply(soft=1)
        first = logits(llm)
        for _ in range(3):
            np.testing.assert_array_equal(logits(llm), first)
        assert len(decoded) == 1
        adapters.apply()
        logits(llm)
        adapters.apply(soft=1)
        np.testing.assert_array_equal(logits(llm), first)
        assert len(decoded) == 2


def test_a_window_that_has_moved_past_the_soft_prompt():
    """gemma3's window is 64 tokens here, and a small cache forgets what has left it."""
    folder, wanted, _ = trained("gemma3", "PROMPT_TUNING")
    with closing(open_llama("gemma3", swa_full=False, n_batch=16)) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.apply(soft=1)
        long = [50 + n % 40 for n in range(100)]
        np.testing.assert_allclose(logits(llm, long), expected("gemma3", folder, None, long), atol=5e-3)
        np.testing.assert_allclose(logits(llm), wanted, atol=5e-3)


def test_states_and_caches_know_the_soft_prompt():
    soft, wanted, _ = trained("llama", "PROMPT_TUNING")
    other, _, _ = trained("llama", "PROMPT_TUNING", seed=1)
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", soft)
        adapters.load("other", other)
        adapters.apply(soft=1)
        logits(llm, PROMPT[:-1])
        state = llm.save_state()
        adapters.apply(other=1)
        with pytest.raises(HotSwapError, match="an adapter set other than"):
            llm.load_state(state)
        adapters.apply(soft=1)
        llm.load_state(state)
        llm.eval(PROMPT[-1:])
        np.testing.assert_allclose(llm.scores[len(PROMPT) - 1], wanted[-1], atol=1e-3)


def test_with_a_lora_beside_it():
    """PEFT applies one or the other; together they are the soft prompt in front of the changed model."""
    folder, _, _ = trained("llama", "PROMPT_TUNING")
    merged = peft_model(builders.hf_model("llama"), builders.adapter("llama", A)).merge_and_unload()
    wanted = torch_logits(peft.PeftModel.from_pretrained(merged, folder))
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.load("a", gguf_lora(A))
        adapters.apply(soft=1, a=1)
        np.testing.assert_allclose(logits(llm), wanted, atol=5e-3)


def test_an_activated_lora_does_not_compute_it():
    """Before its invocation tokens the model is the one that the soft prompt was trained on."""

    folder, _, _ = trained("llama", "PROMPT_TUNING")
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.load("alora", alora_gguf())
        for prompt, n_equal in ((PROMPT, len(PROMPT)), (list(ONCE), len(HEAD))):
            wanted = expected("llama", folder, None, prompt)
            adapters.apply(soft=1, alora=1)
            found = logits(llm, prompt)
            np.testing.assert_allclose(found[:n_equal], wanted[:n_equal], atol=5e-3)
            assert n_equal == len(prompt) or np.abs(found[n_equal:] - wanted[n_equal:]).max() > 0.3
            adapters.apply()


def test_a_soft_prompt_is_on_or_off():
    soft, _, _ = trained("llama", "PROMPT_TUNING")
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", soft)
        adapters.load("more", soft)
        with pytest.raises(HotSwapError, match=r"on \(1\) or off \(0\); found the scale 0\.5"):
            adapters.apply(soft=0.5)
        with pytest.raises(HotSwapError, match="only one soft prompt"):
            adapters.apply(soft=1, more=1)
        assert adapters.active == {}
        adapters.apply(soft=1, more=0)
        assert adapters.active == {"soft": 1.0}


def test_it_takes_room_in_the_context():
    folder, _, _ = trained("llama", "PROMPT_TUNING")
    with closing(open_llama("llama", n_ctx=256, n_batch=256)) as llm, attached.attach(llm) as adapters:
        size = llm.n_ctx()
        adapters.load("soft", folder)
        adapters.apply(soft=1)
        with pytest.raises(ValueError, match="exceed context window"):
            llm.create_completion([60] * (size - N_VIRTUAL), max_tokens=1)
        with pytest.raises(HotSwapError, match=rf"{size + 1} tokens \(7 of them virtual\) do not fit"):
            llm.eval([60] * (size - N_VIRTUAL + 1))
        llm.reset()
        llm.eval([60] * (size - N_VIRTUAL))
        adapters.apply()
        llm.eval([60] * size)


def test_one_that_is_longer_than_the_context(tmp_path):
    folder = edited(tmp_path, values=np.zeros((256, 96), np.float32), num_virtual_tokens=256)
    refusal = pytest.raises(HotSwapError, match="256 tokens does not fit into the context of 256")
    with closing(open_llama("llama", n_ctx=256)) as llm, attached.attach(llm) as adapters, refusal:
        adapters.load("long", folder)


def test_texts_cannot_be_embedded_with_it():
    folder, _, _ = trained("llama", "PROMPT_TUNING")
    with closing(open_llama("llama", embedding=True, logits_all=False)) as llm, attached.attach(llm) as adapters:
        adapters.load("soft", folder)
        adapters.apply(soft=1)
        with pytest.raises(HotSwapError, match="soft prompt"):
            llm.embed("a")
        adapters.apply()
        llm.embed("a")


# -- the engine ------------------------------------------------------------------------------------


def assert_engine_answers(engine: Engine, name: str, prompt: list[int], wanted: np.ndarray) -> Generation:
    """The log probabilities of the first token are those of PEFT's logits."""
    request = Request(prompt, engine.adapter_set(name), max_tokens=1, sampling=Sampling(temperature=0), logprobs=100)
    generation = engine.submit(request)
    (piece, *_) = list(generation)
    logprobs = torch.log_softmax(torch.tensor(wanted, dtype=torch.float64), 0)
    for token, _, logprob in piece.logprobs[0].top:
        assert logprob == pytest.approx(float(logprobs[token]), abs=5e-3)
    return generation


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen35"])
def test_the_engine_answers_as_peft(arch):
    methods = ["PROMPT_TUNING"] if arch == "qwen35" else ["PROMPT_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"]
    with Engine(gguf_of(arch), n_ctx=256, threads=1, kv_type="F32", n_batch=8) as engine:
        for method in methods:
            loaded = engine.load(trained(arch, method)[0], method, task=TASK.get(method))
            assert loaded.method == method
        for method in [*methods, "base", *methods]:
            for prompt in (PROMPT, [*PROMPT[:20], 70, 71], PROMPT):
                wanted = (
                    torch_logits(torch_model(arch), prompt) if method == "base"
                    else expected(arch, trained(arch, method)[0], TASK.get(method), prompt)
                )  # fmt: skip
                answer = assert_engine_answers(engine, method, prompt, wanted[-1])
        assert answer.usage.prompt_tokens == len(PROMPT) + N_VIRTUAL
        assert answer.usage.reused_tokens >= N_VIRTUAL or arch == "qwen35"


def test_the_engine_decodes_requests_with_soft_prompts_together():
    prompts = [PROMPT, PROMPT[:9], [*PROMPT[:20], 70], [77, 78]]
    with Engine(gguf_of("llama"), n_ctx=512, threads=1, kv_type="F32", n_parallel=4) as engine:
        for method in ("PROMPT_TUNING", "PREFIX_TUNING"):
            folder, _, _ = trained("llama", method)
            engine.load(folder, method)
            adapters = engine.adapter_set(method)
            request = [Request(prompt, adapters, max_tokens=5, sampling=Sampling(temperature=0)) for prompt in prompts]
            generations = [engine.submit(each) for each in request]
            for prompt, generation in zip(prompts, generations, strict=True):
                tokens = [token for piece in generation for token in piece.tokens]
                for number, token in enumerate(tokens):
                    assert token == expected("llama", folder, None, [*prompt, *tokens[:number]])[-1].argmax()


def test_tasks_by_name():
    """Of the engine's, the command line's and the server's adapters."""
    folder, _, _ = trained("llama", "MULTITASK_PROMPT_TUNING")
    tasks = {"first": 0, "third": 2}
    options = {"adapters": dict.fromkeys(tasks, folder), "n_ctx": 128, "threads": 1, "kv_type": "F32"}
    with Engine(gguf_of("llama"), tasks=tasks, **options) as engine:
        for name, task in tasks.items():
            assert_engine_answers(engine, name, PROMPT, expected("llama", folder, task)[-1])
        server = create_app(engine, gguf_of("llama"), Settings(allow_load=folder.parent))
        client = TestClient(server, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
        body = {"lora_name": "second", "lora_path": folder.name}
        refused = client.post("/v1/load_lora_adapter", json=body)
        assert (refused.status_code, "tasks 0 to 2" in refused.text) == (400, True)
        assert client.post("/v1/load_lora_adapter", json=body | {"task": 1}).status_code == 200
        assert_engine_answers(engine, "second", PROMPT, expected("llama", folder, 1)[-1])
        again = client.post("/v1/load_lora_adapter", json=body | {"task": 0, "load_inplace": True})
        assert again.status_code == 200
        assert_engine_answers(engine, "second", PROMPT, expected("llama", folder, 0)[-1])
        said: list[str] = []
        chat = Chat(engine, write=said.append, tell=said.append, show=print, raw=True, max_tokens=1)
        for line in (f"/load mine:1 {folder}", f"/load mine:x {folder}", f"/load mine:7 {folder}"):
            chat.handle(line)
        assert_engine_answers(engine, "mine", PROMPT, expected("llama", folder, 1)[-1])
        assert ["error: " in text for text in said] == [False, True, True]
    with pytest.raises(AdapterNameError, match="'nobody'"):
        Engine(gguf_of("llama"), tasks={"nobody": 0}, **options)
    base, named = str(gguf_of("llama")), ["--lora", f"t={folder}"]
    for tasks_given, code in ((["--task", "t=2"], 0), ([], 1), (["--task", "t=x"], 2), (["--task", "u=1"], 1)):
        command = ["run", base, *named, *tasks_given, "-p", "x", "--raw", "--max-tokens", "1"]
        assert CliRunner().invoke(app, command).exit_code == code, command


def test_the_engine_refuses_what_attach_refuses(tmp_path):
    soft, _, _ = trained("llama", "PROMPT_TUNING")
    with Engine(gguf_of("llama"), n_ctx=64, threads=1, kv_type="Q8_0") as engine:
        engine.load(soft, "soft")
        engine.load(soft, "more")
        for name, said in (("soft@0.5", r"on \(1\) or off \(0\)"), ("soft+more", "only one soft prompt")):
            with pytest.raises(RequestError, match=said):
                engine.submit(Request(PROMPT, engine.adapter_set(name)))
        with pytest.raises(UnsupportedAdapterError, match=r"quantized.*type_k"):
            engine.load(trained("llama", "PREFIX_TUNING")[0], "prefix")
        with pytest.raises(AdapterError, match="tasks 0 to 2"):
            engine.load(trained("llama", "MULTITASK_PROMPT_TUNING")[0], "tasks")
        with pytest.raises(MismatchError):
            engine.load(edited(tmp_path, values=np.zeros((7, 64), np.float32)), "narrow")
        with pytest.raises(PromptTooLongError):
            engine.submit(Request([60] * (64 - N_VIRTUAL), engine.adapter_set("soft")))
        assert len(engine.submit(Request([60] * 8, engine.adapter_set("soft"), max_tokens=2)).text()) >= 0


# -- what is refused -------------------------------------------------------------------------------


def edited(folder: Path, values: np.ndarray | None = None, method: str = "PROMPT_TUNING", **fields: Any) -> Path:
    """A copy of a soft prompt with other numbers or fields."""
    source, _, _ = trained("llama", method)
    config = json.loads((source / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(source / "adapter_model.safetensors")
    if values is not None:
        tensors["prompt_embeddings"] = values
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


BAD = {
    "width": ({"values": np.zeros((7, 64), np.float32)}, MismatchError, "64 numbers, but embeddings of .* have 96"),
    "rows": ({"values": np.zeros((6, 96), np.float32)}, AdapterError, "expected 7 rows"),
    "dimensions": ({"values": np.zeros((7, 8, 12), np.float32)}, AdapterError, "expected floats of 2 dimensions"),
    "integers": ({"values": np.zeros((7, 96), np.int32)}, AdapterError, "expected floats"),
    "NaN": ({"values": np.full((7, 96), np.nan, np.float32)}, AdapterError, "NaN or infinity"),
    "seq2seq": ({"task_type": "SEQ_2_SEQ_LM"}, UnsupportedAdapterError, "only decoders"),
    "submodules": ({"num_transformer_submodules": 2}, UnsupportedAdapterError, "only decoders"),
    "number": ({"num_virtual_tokens": "many"}, AdapterError, "expected a whole number"),
    "layers": ({"method": "PREFIX_TUNING", "values": np.zeros((7, 130), np.float32)}, MismatchError, "2 layers"),
    "kv": (
        {"method": "PREFIX_TUNING", "values": np.zeros((7, 512), np.float32)}, UnsupportedAdapterError,
        "rows of 256 bytes, expected 128 numbers",
    ),
    "tensors": ({"peft_type": "MULTITASK_PROMPT_TUNING"}, AdapterError, "expected .*prefix_task_cols"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_ones_are_refused(case, tmp_path):
    changes, error, said = BAD[case]
    folder = edited(tmp_path, **changes)
    with closing(open_llama("llama")) as llm, attached.attach(llm) as adapters:
        base = logits(llm)
        with pytest.raises(error, match=said):
            adapters.load("soft", folder)
            adapters.apply(soft=1)
            logits(llm)
        adapters.apply()
        np.testing.assert_array_equal(logits(llm), base)


@pytest.mark.parametrize(("arch", "method"), [("glm4", "PROMPT_TUNING"), ("falcon", "PREFIX_TUNING")])
def test_architectures_that_cannot_are_refused(arch, method):
    folder, _, _ = trained(arch, method)
    refusal = pytest.raises(UnsupportedAdapterError, match=f"{method} cannot be run on .*: {arch} ")
    with closing(open_llama(arch)) as llm, attached.attach(llm) as adapters, refusal:
        adapters.load("soft", folder)


def test_llama_cpp_aborts_on_embeddings_of_glm4(tmp_path):
    """Why it is refused."""
    code = """
import sys, llama_cpp, numpy as np
from gguflora.runtime import bindings
from gguflora.placement.prefix import Prefix
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
bindings.put_prefix(llm.ctx, Prefix("", 3, np.zeros((3, 64), np.float32)))
"""
    hotswap.kill_python(code, zoo.gguf_model("glm4"))


def test_caches_that_cannot_be_written_are_refused_before_anything_is_asked(tmp_path):
    recurrent = edited(tmp_path, method="PREFIX_TUNING", values=np.zeros((7, 256), np.float32))
    quantized = {"type_k": llama_cpp.GGML_TYPE_Q8_0, "type_v": llama_cpp.GGML_TYPE_Q8_0, "flash_attn": True}
    for arch, options, folder, said in (
        ("mamba", {}, recurrent, "recurrent"),
        ("llama", quantized, trained("llama", "PREFIX_TUNING")[0], r"quantized.*type_k"),
    ):
        with closing(open_llama(arch, **options)) as llm, attached.attach(llm) as adapters:
            base = logits(llm)
            adapters.load("soft", folder)
            with pytest.raises(UnsupportedAdapterError, match=said):
                adapters.apply(soft=1)
            assert adapters.active == {}
            np.testing.assert_array_equal(logits(llm), base)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_states_that_are_not_as_expected(cut):
    """A llama.cpp with another layout must end in an error, never in garbage in the cache."""
    prefix = gguflora.placement.prefix.read_prefix(
        trained("llama", "PREFIX_TUNING")[0], gguflora.architectures.base_model.read_base(builders.gguf_model("llama"))
    )
    state = np.random.default_rng(cut).bytes(4 * cut)
    with pytest.raises(UnsupportedAdapterError, match="attention cache"):
        fill_state(state, prefix, [[[0, 1]], [[0], [1]]])


@pytest.mark.parametrize("method", METHODS)
def test_convert_and_merge_name_the_way(method, tmp_path):
    folder, _, _ = trained("llama", method)
    for action in (gguflora.convert, gguflora.merge):
        with pytest.raises(GgufloraError, match=r"gguflora\.attach, gguflora run or gguflora serve"):
            action(*((folder, builders.gguf_model("llama")) if action is gguflora.convert else (
                builders.gguf_model("llama"), folder)), tmp_path / "out.gguf")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_inspect_describes_it(method):
    folder, _, _ = trained("llama", method)
    report = gguflora.inspect(folder, builders.gguf_model("llama"))
    assert (report.method, report.warnings) == (method.removesuffix("_LSTM").removesuffix("_PROJECTED"), ())
    assert report.virtual_tokens == (5 if method == "CPT" else N_VIRTUAL)
    assert gguflora.inspect(folder).to_dict()["virtual_tokens"] == report.virtual_tokens
    other = gguflora.inspect(folder, zoo.gguf_model("t5"))
    assert any("not a decoder" in text for text in other.warnings)
    said = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert f"{report.virtual_tokens} virtual tokens in front of the prompt" in " ".join(said.split())
