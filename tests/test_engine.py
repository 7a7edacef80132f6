"""The engine answers with exactly the adapters asked for, whatever it did before."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import builders
import hotswap
import numpy as np
import pytest
from hotswap import PROMPT, A, B, C

from gguflora.engine import Engine, Generation, Piece, Request, Sampling

GREEDY = Sampling(temperature=0)
OPTIONS: dict[str, Any] = {"n_ctx": 256, "threads": 1, "kv_type": "F32"}


def files() -> dict[str, Path]:
    return {"a": hotswap.gguf_lora(A), "b": hotswap.gguf_lora(B), "c": hotswap.gguf_lora(C)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(builders.gguf_model("llama"), adapters=files(), **OPTIONS) as opened:
        yield opened


def ask(engine: Engine, adapters: str = "base", prompt: Sequence[int] = PROMPT, **options: Any) -> Generation:
    options = {"max_tokens": 12, "sampling": GREEDY, "logprobs": 0} | options
    return engine.submit(Request(list(prompt), engine.adapter_set(adapters), **options))


def finish(generation: Generation) -> list[Piece]:
    return list(generation)


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def logprobs_of(pieces: list[Piece]) -> np.ndarray:
    return np.array([entry.logprob for piece in pieces for entry in piece.logprobs])


def greedy_by_peft(adapters: Sequence[tuple[builders.Adapter, float]], prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(hotswap.expected(*adapters, prompt=tokens)[-1].argmax()))
    return tokens[len(prompt) :]


SETS: dict[str, list[tuple[builders.Adapter, float]]] = {
    "base": [], "a": [(A, 1.0)], "b@-0.5": [(B, -0.5)], "a@0.5+c": [(A, 0.5), (C, 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_tokens_are_those_of_peft(engine: Engine, name: str) -> None:
    pieces = finish(ask(engine, name, max_tokens=6))
    assert tokens_of(pieces) == greedy_by_peft(SETS[name], PROMPT, 6)


@pytest.mark.parametrize("name", SETS)
def test_first_logprobs_are_those_of_peft(engine: Engine, name: str) -> None:
    logits = hotswap.expected(*SETS[name])[-1].astype(np.float64)
    wanted = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    pieces = finish(ask(engine, name, max_tokens=1, logprobs=20))
    top = pieces[0].logprobs[0].top
    assert [token for token, _, _ in top[:3]] == list(np.argsort(-wanted)[:3])
    np.testing.assert_allclose([logprob for _, _, logprob in top], np.sort(wanted)[::-1][:20], atol=hotswap.TOLERANCE)
