"""`gguflora compare` against torch and PEFT: the same divergences and perplexities on float weights."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import safetensors.numpy
import torch

import gguflora
from gguflora.diagnostics.divergence import kl_divergence
from gguflora.diagnostics.general_text import BUILT_IN_TEXT
from gguflora.diagnostics.side_by_side import Tally, summed_up
from gguflora.errors import ArchitectureError, FormatError, HotSwapError, MismatchError, UsageError
from support import builders, hotswap

DEMO = Path(gguflora.__file__).parent / "diagnostics" / "demo_files"
N_CTX = 24
TEXT = "the cat and the other animals are in the garden under another tree, thinner than ever"
WEAK = builders.Adapter(seed=1, alpha=1)


def compare_on_one_thread(*arguments, **options):
    """On one thread: llama.cpp's threads spin, which takes minutes where other tests run at the same time."""
    return gguflora.compare(*arguments, **options, threads=1)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The small F32 llama with the adapter merged in; F32 rounds next to nothing."""
    path = tmp_path_factory.mktemp("compare") / "merged.gguf"
    gguflora.merge(builders.gguf_model("llama"), builders.adapter("llama", WEAK), path)
    return path


def windows():
    tokens = builders._tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    return [tokens[start : start + N_CTX] for start in range(0, len(tokens), N_CTX)]


def expected(scale):
    """Log-probabilities by PEFT at every position but the last of its window, and the loss."""
    log_p, loss = [], []
    for window in windows():
        logits = hotswap.expected((hotswap.A, scale), prompt=window) if scale else hotswap.expected(prompt=window)
        rows = torch.log_softmax(torch.tensor(logits[:-1], dtype=torch.float64), -1).numpy()
        log_p.append(rows)
        loss += [-row[target] for row, target in zip(rows, window[1:], strict=True)]
    return np.concatenate(log_p), np.mean(loss)


def test_divergences_and_perplexities_are_those_of_peft(tmp_path, text):
    merged = tmp_path / "merged.gguf"
    adapter, base = builders.adapter("llama", hotswap.A), builders.gguf_model("llama")
    gguflora.merge(base, [(adapter, 0.5)], merged)
    report = compare_on_one_thread(base, merged, adapter, text=text, n_ctx=N_CTX)
    (hot, hot_loss), (plain, base_loss), (half, half_loss) = expected(1.0), expected(0), expected(0.5)
    assert report.positions == len(hot) > 2 * N_CTX
    assert report.perplexities == pytest.approx(
        {"hot": np.exp(hot_loss), "base": np.exp(base_loss), "merged": np.exp(half_loss)}, rel=2e-3
    )
    for name, other in (("base", plain), ("merged", half)):
        kl = (np.exp(hot) * (hot - other)).sum(-1)
        divergence = report.divergences[name]
        assert divergence.kl == pytest.approx(kl.mean(), rel=5e-3)
        assert divergence.error == pytest.approx(kl.std() / len(kl) ** 0.5, rel=5e-3)
        assert divergence.top_agreement == pytest.approx((hot.argmax(-1) == other.argmax(-1)).mean(), abs=0.02)
    assert report.divergences["base"].kl > 2 * report.divergences["merged"].kl > 0.01


def test_a_merge_into_floats_is_the_hot_adapter(merged, text):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", WEAK)
    report = compare_on_one_thread(base, merged, [adapter], text=text, n_ctx=N_CTX, naive=True)
    for name in ("merged", "naive"):
        assert abs(report.divergences[name].kl) < 1e-6 < 1e-3 < report.divergences["base"].kl
        assert report.divergences[name].top_agreement == 1
        assert report.perplexities[name] == pytest.approx(report.perplexities["hot"], rel=1e-4)
    assert all(speed.prompt > 0 < speed.generation for speed in report.speeds.values())
    assert report.speeds.keys() == {"hot", "merged"}


def test_several_adapters_a_gguf_lora_and_the_built_in_text(tmp_path):
    base, merged = DEMO / "base.gguf", tmp_path / "merged.gguf"
    verse = tmp_path / "verse.gguf"
    gguflora.convert(DEMO / "verse", base, verse)
    adapters = [DEMO / "shout", (verse, 0.5)]
    gguflora.merge(base, adapters, merged)
    report = compare_on_one_thread(base, merged, adapters)
    assert report.text == "built-in text"
    assert report.positions > 500
    assert report.divergences["merged"].kl < 1e-2 * report.divergences["base"].kl
    other = compare_on_one_thread(base, merged, DEMO / "shout")
    assert other.divergences["merged"].kl > 10 * report.divergences["merged"].kl
    assert len(BUILT_IN_TEXT.split()) > 200


def test_a_window_begins_as_a_text_does(tmp_path, text):
    """The demo's model begins every text with a token of its own, as llama_cpp.Llama's tokenizer does."""
    merged = tmp_path / "merged.gguf"
    gguflora.merge(DEMO / "base.gguf", DEMO / "shout", merged)
    report = compare_on_one_thread(DEMO / "base.gguf", merged, DEMO / "shout", text=text)
    llm = llama_cpp.Llama(str(merged), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    tokens = llm.tokenize(TEXT.encode())
    llm.eval(tokens)
    log_p = torch.log_softmax(torch.tensor(llm.scores[: len(tokens) - 1], dtype=torch.float64), -1)
    llm.close()
    loss = -log_p[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean()
    assert report.positions == len(tokens) - 1
    assert report.perplexities["merged"] == pytest.approx(float(loss.exp()), rel=1e-2)


def test_text_longer_than_the_training_context_is_cut(merged, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 20)
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", WEAK)
    report = compare_on_one_thread(base, merged, adapter, text=text, n_ctx=4096)
    assert report.n_ctx == 128


def test_an_adapter_that_cannot_be_hot_is_refused(merged, text):
    dora = builders.adapter("llama", builders.Adapter(options=(("use_dora", True),)))
    with pytest.raises(HotSwapError, match=r"cannot be applied at run time.*convert --rank N"):
        compare_on_one_thread(builders.gguf_model("llama"), merged, dora, text=text)


def test_another_vocabulary_is_refused(text):
    adapter = builders.adapter("llama", WEAK)
    with pytest.raises(MismatchError, match=r"vocabulary of 1024 tokens, but .* has 288"):
        compare_on_one_thread(builders.gguf_model("llama"), DEMO / "base.gguf", adapter, text=text)


def test_no_text_no_model_no_context(merged, tmp_path):
    base, adapter, empty = builders.gguf_model("llama"), builders.adapter("llama", WEAK), tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(FormatError, match="has 0 tokens"):
        compare_on_one_thread(base, merged, adapter, text=empty)
    with pytest.raises(FormatError, match="not a GGUF file"):
        compare_on_one_thread(base, empty, adapter)
    with pytest.raises(UsageError, match="expected at least 16"):
        compare_on_one_thread(base, merged, adapter, n_ctx=2)


def test_shares_and_ratios_on_two_texts_are_those_of_peft(tmp_path, text):
    """Merges into floats of the adapter at three scales, on a text where it helps and on others."""
    adapter, base = builders.adapter("llama", hotswap.A), builders.gguf_model("llama")
    files = [tmp_path / "half.gguf", tmp_path / "most.gguf"]
    for file, scale in zip(files, (0.5, 0.8), strict=True):
        gguflora.merge(base, [(adapter, scale)], file)
    other = tmp_path / "other.txt"
    other.write_text("under the cat there are other animals, thinner than a tree")
    report = compare_on_one_thread(base, files, adapter, text=[text, other], n_ctx=N_CTX)
    assert [each.text for each in report.texts] == [str(text), str(other), "built-in text"]
    assert report.files == {"half.gguf": files[0], "most.gguf": files[1]}
    first = report.texts[0]
    assert (report.divergences, report.perplexities) == (first.divergences, first.perplexities)
    (hot, hot_loss), (_, base_loss), (_, half_loss) = expected(1.0), expected(0), expected(0.5)
    assert first.perplexity_ratios["half.gguf"].value == pytest.approx(np.exp(half_loss - hot_loss), rel=2e-3)
    assert first.perplexity_ratios["base"].value == pytest.approx(np.exp(base_loss - hot_loss), rel=2e-3)
    assert len(hot) == first.positions
    assert first.divergences["most.gguf"].kl < first.divergences["half.gguf"].kl < first.divergences["base"].kl
    assert bool(first.kept) == (base_loss - hot_loss > 0.2)


def test_what_is_kept_of_a_gain():
    """A model that halves every token's gain keeps half; where the adapter hurts there is nothing to keep."""
    random = np.random.default_rng(0)
    targets, tallies = random.integers(0, 8, 400).tolist(), {name: Tally() for name in ("base", "hot", "merged")}
    gains = random.uniform(0.1, 0.5, 400)

    def log_p(gain):
        rows = np.log(np.full((400, 8), 0.5 / 7))
        rows[np.arange(400), targets] = np.log(0.5) + gain
        return rows

    for name, share in {"base": 0.0, "hot": 1.0, "merged": 0.5}.items():
        tallies[name].add(log_p(gains), log_p(share * gains), targets)
    found = summed_up("text", tallies)
    assert found.kept.keys() == {"merged"}
    assert found.kept["merged"].value == pytest.approx(0.5)
    assert found.kept["merged"].error == pytest.approx(0, abs=1e-9)
    assert found.perplexity_ratios["merged"].value == pytest.approx(np.exp(0.5 * gains.mean()))
    assert found.perplexity_ratios["merged"].error == pytest.approx(np.exp(0.5 * gains.mean()) * 0.5 * gains.std() / 20)
    assert summed_up("text", tallies | {"base": tallies["hot"], "hot": tallies["base"]}).kept == {}


def test_all_makes_its_own_merges(tmp_path, text, monkeypatch):
    weak = builders.Adapter(seed=1, alpha=0.05)
    base, adapter = builders.gguf_model("llama", "wide", "Q4_0"), builders.adapter("llama", weak, "wide")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / "own.txt"
    own.write_text(TEXT * 60)
    report = compare_on_one_thread(base, [], adapter, text=text, all=True, calibration_text=own, n_ctx=N_CTX)
    assert (report.merged, report.files, report.speeds, report.warnings) == (None, {}, {}, ())
    assert [*report.texts[-1].perplexities] == ["base", "hot", "nearest", "adaptive", "calibrated"]
    kl = {name: found.kl for name, found in report.texts[-1].divergences.items()}
    assert 0 < kl["calibrated"] < 0.5 * kl["adaptive"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.txt", "text.txt"]
    assert json.dumps(report.to_dict())
    floats = compare_on_one_thread(builders.gguf_model("llama"), [], builders.adapter("llama", WEAK), all=True)
    assert [*floats.divergences] == ["base", "nearest", "adaptive"]
    assert "no calibrated merge to compare" in floats.warnings[0]


def test_a_text_is_not_calibrated_and_evaluated_on(merged, text):
    base, adapter = builders.gguf_model("llama"), builders.adapter("llama", WEAK)
    with pytest.raises(UsageError, match="both calibrated and evaluated on"):
        compare_on_one_thread(base, merged, adapter, text=text, calibration_text=text, all=True)
    with pytest.raises(UsageError, match="needs --all"):
        compare_on_one_thread(base, merged, adapter, calibration_text=text)


def test_kl_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    assert kl_divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32) + 7) == pytest.approx(by_hand)


def test_command_line(merged, text):
    adapter = builders.adapter("llama", WEAK)
    command = [sys.executable, "-P", "-m", "gguflora", "compare", builders.gguf_model("llama"), merged]
    command += ["--lora-scaled", f"{adapter}:0.5", "--text", text, "--n-ctx", str(N_CTX), "--threads", "1"]
    shown = subprocess.run([*map(str, command), "--naive"], capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    rows = ["base", "hot", "merged", "naive"]
    first = [line.split()[0] for line in shown.stdout.splitlines()[5:] if line.strip()]
    assert [name for name in first if name in rows] == [*rows, *rows]
    assert shown.stdout.splitlines()[1].endswith("tokens of built-in text, in windows of up to 24")
    report = json.loads(subprocess.run([*map(str, command), "--json"], capture_output=True, check=True).stdout)
    assert report["adapters"] == [[str(adapter), 0.5]]
    assert report["divergences"]["merged"]["kl"] > 1e-4
    wrong = subprocess.run(list(map(str, command[:7])), capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_the_language_part_of_a_multimodal_adapter(text, merged, tmp_path):
    adapter = shutil.copytree(builders.adapter("llama", WEAK), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = safetensors.numpy.load_file(path)
    added = {
        f"base_model.model.model.visual.blocks.0.attn.qkv.lora_{side}.weight": next(
            value for key, value in weights.items() if f"lora_{side}" in key
        )
        for side in "AB"
    }
    safetensors.numpy.save_file(weights | added, path)
    base = builders.gguf_model("llama")
    with pytest.raises(ArchitectureError, match="--text-only"):
        compare_on_one_thread(base, merged, adapter, text=text, n_ctx=N_CTX)
    report = compare_on_one_thread(base, merged, adapter, text=text, n_ctx=N_CTX, text_only=True, naive=True)
    plain = compare_on_one_thread(base, merged, builders.adapter("llama", WEAK), text=text, n_ctx=N_CTX, naive=True)
    assert report.perplexities == plain.perplexities
