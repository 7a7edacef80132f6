"""An engine on a small model, and what a context that never saw anything else says of its answers."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from gguflora.engine import Engine, Generation, Piece, Request, Sampling
from gguflora.runtime import attached as runtime
from gguflora.runtime.bindings import free_lora, load_lora, set_loras
from support import builders, hotswap
from support.alora import alora_gguf
from support.hotswap import PROMPT, A, B, C
from support.oracles.llama_cpp import quiet_llama_cpp
from support.soft_prompts import trained

GREEDY = Sampling(temperature=0)
OPTIONS: dict[str, Any] = {"n_ctx": 256, "threads": 1, "kv_type": "F32"}
SETS: dict[str, list[tuple[builders.Adapter, float]]] = {
    "base": [], "a": [(A, 1.0)], "b@-0.5": [(B, -0.5)], "a@0.5+c": [(A, 0.5), (C, 1.0)],
}  # fmt: skip
SPECS = {"a": A, "b": B, "c": C}


def files() -> dict[str, Path]:
    return {name: hotswap.gguf_lora(spec) for name, spec in SPECS.items()}


@cache
def adapters_of_every_kind() -> dict[str, Path]:
    """LoRAs, an activated one, a soft prompt of embeddings, one of keys and values."""
    soft = {name: trained("llama", name)[0] for name in ("PROMPT_TUNING", "PREFIX_TUNING")}
    return {**files(), "alora": alora_gguf(), "soft tokens": soft["PROMPT_TUNING"], "soft keys": soft["PREFIX_TUNING"]}


def open_engine(**options: Any) -> Engine:
    return Engine(builders.gguf_model("llama"), adapters=files(), **OPTIONS | options)


def ask(engine: Engine, adapters: str = "base", prompt: Sequence[int] = PROMPT, **options: Any) -> Generation:
    options = {"max_tokens": 12, "sampling": GREEDY, "logprobs": 100} | options
    return engine.submit(Request(list(prompt), engine.adapter_set(adapters), **options))


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def assert_fresh(adapters: dict[str, float], prompt: Sequence[int], pieces: Sequence[Piece]) -> None:
    """The log probabilities of all generated tokens are those of a context that never saw anything else."""
    entries = [entry for piece in pieces for entry in piece.logprobs]
    tokens = [entry.token for entry in entries]
    wanted = fresh_logprobs(tuple(sorted(adapters.items())), tuple(prompt) + tuple(tokens))[len(prompt) - 1 : -1]
    for entry, row in zip(entries, wanted, strict=True):
        np.testing.assert_allclose(
            [logprob for _, _, logprob in entry.top], row[[token for token, _, _ in entry.top]], atol=1e-5, rtol=0
        )
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)


@cache
def fresh_logprobs(adapters: tuple[tuple[str, float], ...], tokens: tuple[int, ...]) -> np.ndarray:
    llm = hotswap.open_llama(n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1)
    if all(name in SPECS for name, _ in adapters):
        loras = [(load_lora(llm.model, files()[name]), scale) for name, scale in adapters]
        set_loras(llm.ctx, loras)
        logits = hotswap.logits(llm, tokens).astype(np.float64)
        set_loras(llm.ctx, [])
        for pointer, _ in loras:
            free_lora(pointer)
    else:  # what llama.cpp does not do by itself: by attach, which is held against PEFT elsewhere
        with runtime.attach(llm) as attached:
            for name, _ in adapters:
                attached.load(name, adapters_of_every_kind()[name])
            attached.apply(dict(adapters))
            logits = hotswap.logits(llm, tokens).astype(np.float64)
    llm.close()
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def named(text: str) -> dict[str, float]:
    return {spec: scale for name, scale in SETS[text] for spec, other in SPECS.items() if other == name}


def assert_fresh_base(path: Path, prompt: Sequence[int], pieces: Sequence[Piece], atol: float) -> Sequence[Piece]:
    """The same of a base in any file, by a Llama of its own."""
    entries = [entry for piece in pieces for entry in piece.logprobs]
    f32 = llama_cpp.GGML_TYPE_F32
    with quiet_llama_cpp():
        llm = llama_cpp.Llama(
            str(path), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, logits_all=True, type_k=f32, type_v=f32,
            verbose=False,
        )  # fmt: skip
    logits = hotswap.logits(llm, [*prompt, *(entry.token for entry in entries)])[len(prompt) - 1 : -1]
    llm.close()
    for entry, row in zip(entries, logits.astype(np.float64), strict=True):
        wanted = row - row.max() - np.log(np.exp(row - row.max()).sum())
        found = np.array([logprob for _, _, logprob in entry.top])
        np.testing.assert_allclose(found, wanted[[token for token, _, _ in entry.top]], atol=atol, rtol=0)
    return pieces
