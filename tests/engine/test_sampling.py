"""llama.cpp's samplers: where a parameter has a limit with a known answer, the engine gives that answer."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gguflora
from gguflora.engine import Engine, Grammar, Sampling
from gguflora.errors import MissingExtraError, RequestError
from support.engines import GREEDY, OPTIONS, ask, open_engine

DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"
HOT = Sampling(temperature=5, top_p=1, top_k=0, min_p=0, seed=7)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as opened:
        yield opened


@pytest.fixture(scope="module")
def demo_engine() -> Iterator[Engine]:
    with Engine(DEMO / "base.gguf", **OPTIONS) as opened:
        yield opened


def tokens(engine: Engine, sampling: Sampling, **options: Any) -> list[int]:
    generation = ask(engine, sampling=sampling, logprobs=None, **options)
    return [token for piece in generation for token in piece.tokens]


@pytest.mark.parametrize(
    "limits",
    [
        {"top_n_sigma": 1e-6},
        {"typical_p": 1e-9, "top_k": 1},
        {"mirostat": 1, "mirostat_tau": 0.0, "temperature": 1e-3},
        {"mirostat": 2, "mirostat_tau": 0.0},
        {"dynatemp_range": 5.0, "dynatemp_exponent": 0.0, "top_k": 1},
    ],
    ids=str,
)
def test_the_narrowest_filter_leaves_the_likeliest_token(engine: Engine, limits: dict[str, Any]) -> None:
    assert tokens(engine, HOT) != tokens(engine, GREEDY)
    assert tokens(engine, replace(HOT, **limits)) == tokens(engine, GREEDY)


def test_xtc_removes_the_likeliest_token(engine: Engine) -> None:
    """With two candidates above the threshold, XTC keeps the less likely one (llama-sampler.cpp, `xtc`)."""
    generation = ask(engine, sampling=replace(HOT, top_k=2, xtc_probability=1.0, xtc_threshold=0.0), logprobs=2)
    entries = [entry for piece in generation for entry in piece.logprobs]
    assert entries
    assert all(entry.token == entry.top[1][0] for entry in entries)


def test_dry_breaks_a_repetition(engine: Engine) -> None:
    prompt = [5, 6, 7, 8] * 8
    free = tokens(engine, replace(GREEDY, logit_bias=dict.fromkeys((5, 6, 7, 8), 50.0)), prompt=prompt)
    dry = replace(GREEDY, dry_multiplier=100.0, logit_bias=dict.fromkeys((5, 6, 7, 8), 50.0))
    text = prompt + tokens(engine, dry, prompt=prompt)
    assert set(free) <= {5, 6, 7, 8}
    pairs = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
    assert all(run not in pairs[: len(prompt) - 3] for run in pairs[len(prompt) :])


def test_stop_tokens_and_the_least_length(engine: Engine) -> None:
    answer = tokens(engine, GREEDY)
    end = answer[4]
    first = answer.index(end)
    assert tokens(engine, replace(GREEDY, stop_token_ids=(end,))) == answer[:first]
    longer = tokens(engine, replace(GREEDY, stop_token_ids=(end,), min_tokens=first + 2))
    assert len(longer) >= first + 2
    assert end not in longer[: first + 2]


@pytest.mark.parametrize("seed", [None, -1, 2**32 - 1])
def test_these_seeds_are_random(engine: Engine, seed: int | None) -> None:
    assert len({tuple(tokens(engine, replace(HOT, seed=seed))) for _ in range(3)}) > 1


def test_other_seeds_repeat(engine: Engine) -> None:
    assert tokens(engine, HOT) == tokens(engine, HOT)


@pytest.mark.parametrize(("rules", "texts"), [('root ::= "yes" | "no"', {"yes", "no"}), ('root ::= "日本"', {"日本"})])
def test_a_grammar_holds(demo_engine: Engine, rules: str, texts: set[str]) -> None:
    for seed in range(4):
        sampling = replace(HOT, seed=seed, grammar=Grammar(rules))
        generation = ask(demo_engine, sampling=sampling, prompt=demo_engine.tokenize("Is it so?"), logprobs=None)
        assert "".join(piece.text for piece in generation) in texts


def test_a_grammar_without_its_package_names_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llguidance", "llguidance.llamacpp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"llguidance: pip install 'gguflora\[server\]'"):
        tokens(engine, replace(GREEDY, grammar=Grammar('start: "x"', kind="llguidance")))


@pytest.mark.parametrize("rules", ["root ::= (", "nothing", "root ::= missing", "\0", "root ::= " + "(" * 100_000])
def test_an_unreadable_grammar_is_refused(engine: Engine, rules: str) -> None:
    with pytest.raises(RequestError, match="grammar"):
        tokens(engine, replace(GREEDY, grammar=Grammar(rules)))
    assert tokens(engine, GREEDY)


@pytest.mark.parametrize(
    "wrong",
    [{"typical_p": 1.5}, {"mirostat": 3}, {"xtc_threshold": -1.0}, {"dry_base": float("nan")}, {"min_tokens": -1},
     {"stop_token_ids": (10**9,)}, {"dry_sequence_breakers": ("",)}, {"repeat_last_n": -2}],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        tokens(engine, replace(GREEDY, **wrong))
