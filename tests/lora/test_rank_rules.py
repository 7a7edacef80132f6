"""Ranks that `gguflora.resize` chooses by singular values and by a loss, against numpy and llama.cpp."""

import json
import math

import llama_cpp
import numpy as np
import peft
import pytest

import gguflora
from gguflora.errors import AdapterError, FormatError
from support import builders
from support.adapters import deltas_by_peft
from support.builders import Adapter, Trained
from support.cli import run

SPEC = Adapter(rank=8)


def by_ratio(values, ratio):
    return max(1, sum(value > values[0] / ratio for value in values))


def by_norm(values, share):
    """The lowest rank whose Frobenius norm is that share of the whole."""
    return next(rank for rank in range(1, len(values) + 1) if math.hypot(*values[:rank]) >= share * math.hypot(*values))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"sv_ratio": 1.5}, lambda values: by_ratio(values, 1.5)),
        ({"sv_ratio": 3}, lambda values: by_ratio(values, 3)),
        ({"sv_ratio": 1}, lambda values: 1),
        ({"sv_fro": 0.6}, lambda values: by_norm(values, 0.6)),
        ({"sv_fro": 0.95}, lambda values: by_norm(values, 0.95)),
    ],
)
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_dynamic_methods_of_kohya(options, wanted, form, tmp_path):
    adapter = builders.adapter("llama", SPEC)
    base = builders.gguf_model("llama")
    source = adapter if form == "peft" else gguflora.convert(adapter, base, tmp_path / "one.gguf").output
    report = gguflora.resize(source, tmp_path / "out", base=base, **options)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    found = deltas_by_peft(tmp_path / "out")
    ranks = []
    for name, delta in deltas_by_peft(adapter).items():
        u, values, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        rank = wanted(values[:8].tolist())
        ranks.append(config["rank_pattern"].get(name, config["r"]))
        assert ranks[-1] == rank, name
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        np.testing.assert_allclose(found[name], best, atol=1e-5 * np.abs(delta).max())
    assert report.ranks == (min(ranks), max(ranks))
    assert report.losses == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sv_ratio": 0.5}, "sv_ratio is 0.5, expected a number from 1"),
        ({"sv_ratio": math.nan}, "sv_ratio is nan"),
        ({"sv_fro": 0.0}, "sv_fro is 0.0, expected a share"),
        ({"sv_fro": 1.1}, "sv_fro is 1.1"),
        ({"sv_fro": 0.5, "sv_ratio": 2}, "sv_ratio and sv_fro, expected only one"),
        ({"rank": 2, "text": "text"}, "a text has no use with rank"),
        ({"max_loss": 0.1}, "give it with --text"),
        ({"max_loss": -0.1, "text": "text"}, "max_loss is -0.1"),
        ({"max_loss": 0.1, "text": "text"}, "the base as a GGUF file"),
    ],
)
def test_impossible_rules(options, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        gguflora.resize(builders.adapter("llama", SPEC), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


def mean_loss(tokens, logits):
    rows = logits[: len(tokens) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), tokens[1:]]))


@pytest.fixture(scope="module")
def strong():
    """An adapter that a tiny model's predictions feel."""
    return builders.adapter("llama", Adapter(rank=8, alpha=32))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_the_rank_that_loses_no_more_than_asked(suffix, strong, text, tmp_path):
    """The losses are those of llama-cpp-python's `Llama` with the adapters, and no lower rank that was tried fits."""
    base, out = builders.gguf_model("llama"), tmp_path / f"out{suffix}"
    whole = gguflora.resize(strong, out, max_loss=0, text=text, base=base, threads=1).losses
    span = max(loss - whole["whole"] for name, loss in whole.items() if name not in {"base", "whole"})
    report = gguflora.resize(strong, out, max_loss=span / 2, text=[text], base=base, threads=1, force=True)
    tried = {int(name): loss for name, loss in report.losses.items() if name.isdecimal()}
    (rank,) = set(report.ranks)
    assert tried[rank] - report.losses["whole"] <= span / 2
    assert all(loss - report.losses["whole"] > span / 2 for other, loss in tried.items() if other < rank)
    assert rank < 8
    for name, adapter in {"base": None, "whole": strong, str(rank): out}.items():
        is_file = adapter is None or adapter.suffix == ".gguf"
        lora = adapter if is_file else as_gguf(adapter, tmp_path / f"{name}.gguf")
        tokens, logits = text_logits(base, lora)
        assert report.losses[name] == pytest.approx(mean_loss(tokens, logits), abs=2e-3), name


def as_gguf(adapter, out):
    return gguflora.convert(adapter, builders.gguf_model("llama"), out).output


def text_logits(base, lora):
    return logits_of(base, lora, tokens_of(base, TEXT))


def tokens_of(base, text):
    model = llama_cpp.Llama(str(base), vocab_only=True, verbose=False)
    return model.tokenize(text.encode(), special=False)


def logits_of(base, lora, tokens):
    path = None if lora is None else str(lora)
    model = llama_cpp.Llama(str(base), n_ctx=128, logits_all=True, verbose=False, lora_path=path)
    model.eval(tokens)
    found = np.array(model.scores[: len(tokens)])
    model.close()
    return tokens, found


def test_losses_of_long_texts_are_those_of_their_windows(strong, tmp_path):
    base, long = builders.gguf_model("llama"), tmp_path / "long.txt"
    long.write_text(TEXT * 5)
    report = gguflora.resize(strong, tmp_path / "out", max_loss=9, text=long, base=base, threads=1)
    assert report.ranks == (1, 1)
    assert report.losses.keys() == {"base", "whole", "1", "2", "4"}
    tokens = tokens_of(base, TEXT * 5)  # the model's texts have no token for their beginning
    windows = [tokens[start : start + 128] for start in range(0, len(tokens), 128)]
    losses = [mean_loss(*logits_of(base, None, window)) for window in windows]
    wanted = np.average(losses, weights=[len(window) - 1 for window in windows])
    assert report.losses["base"] == pytest.approx(wanted, abs=2e-3)


def test_a_change_of_any_rank_is_measured_on_its_base(text, tmp_path):
    adapter = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"use_dora": True}))
    base = builders.gguf_model("llama")
    report = gguflora.resize(adapter, tmp_path / "out.gguf", max_loss=1e-4, text=text, base=base, threads=1)
    assert report.losses[str(report.ranks[1])] - report.losses["whole"] <= 1e-4
    assert report.losses["whole"] != report.losses["base"]


def test_what_no_loss_can_be_measured_of(strong, text, tmp_path):
    base = builders.gguf_model("llama")
    saved = builders.trained_adapter("llama", Trained(peft.LoraConfig, ("q_proj",), {"modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match="holds whole weights"):
        gguflora.resize(saved, tmp_path / "out", max_loss=0.1, text=text, base=base)
    for content, problem in (("", "is empty"), ("Hi", "fewer than 32 tokens")):
        text.write_text(content)
        with pytest.raises(FormatError, match=problem):
            gguflora.resize(strong, tmp_path / "out", max_loss=0.1, text=text, base=base)
    with pytest.raises(FormatError, match="cannot be read"):
        gguflora.resize(strong, tmp_path / "out", max_loss=0.1, text=tmp_path / "no.txt", base=base)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_command_line(strong, text, tmp_path):
    base = builders.gguf_model("llama")
    options = ("--max-loss", 9, "--text", text, "--base", base, "--threads", 1)
    told = run("resize", strong, *options, "-o", tmp_path / "out")
    assert told.returncode == 0, told.stderr
    assert "loss with the base alone: " in told.stdout
    assert "loss with rank 1: " in told.stdout
    result = run("resize", strong, "--sv-ratio", 2, "-o", tmp_path / "two", "--json")
    assert json.loads(result.stdout)["ranks"][0] < 8
    both = run("resize", strong, "--sv-ratio", 2, "--sv-fro", 0.9, "-o", tmp_path / "three")
    assert both.returncode == 2
    assert "give one of --rank" in both.stderr
