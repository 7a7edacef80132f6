"""SmolLM2 and Gemma 3 by every command: equal to PEFT in torch on the dequantized model, and to llama.cpp.

transformers reads the GGUF files, so that rows, norms and tied weights are what another program says they are. Where
logits are compared, llama.cpp runs the same weights in F32, because it rounds activations for quantized ones.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import peft
import pytest
import torch

import gguflora
from gguflora.engine import Engine
from support import real_models, serving
from support.asserts import assert_close, assert_same_changes
from support.oracles.gguf_files import lora_changes, read_metadata, read_tensors
from support.oracles.llama_cpp import quiet_llama_cpp
from support.real_models import in_torch

TEXT = (
    "The capital of France is Paris. It's 2024, and 3 + 4 = 7.\n\n  def add(x, y):\n\treturn x + y  # naïve 日本語 🙂"
)
PROMPT = "The capital of France is"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.real
LONG_ON_GEMMA = pytest.mark.parametrize(
    "trained", ["smollm2", pytest.param("gemma3", marks=pytest.mark.full)], indirect=True
)


@dataclass(frozen=True)
class Trained:
    """A model with a random LoRA.

    Attributes:
        base: the GGUF file as it comes.
        exact: the same weights in F32.
        adapter: the adapter as PEFT saves it.
        model: PEFT's model on the dequantized weights.
        folder: for files of the tests.
    """

    base: Path
    exact: Path
    adapter: Path
    model: Any
    folder: Path

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text by transformers."""
        return list(real_models.tokenizer(self.base)(text).input_ids)

    def logits(self, tokens: list[int], *, adapted: bool) -> np.ndarray:
        """Logits of tokens by PEFT in torch."""
        with torch.no_grad(), contextlib.nullcontext() if adapted else self.model.disable_adapter():
            return self.model(torch.tensor([tokens])).logits[0].numpy()

    def log_probabilities(self, tokens: list[int], *, adapted: bool) -> np.ndarray:
        """Log probabilities of what follows each token, in float64."""
        logits = self.logits(tokens, adapted=adapted).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base, folder = real_models.model(request.param), tmp_path_factory.mktemp("real")
    gguflora.quantize(base, folder / "exact.gguf", "F32")
    torch.manual_seed(0)
    model = peft.get_peft_model(in_torch(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "adapter")
    return Trained(base, folder / "exact.gguf", folder / "adapter", model, folder)


@pytest.fixture(scope="module")
def merged(trained: Trained) -> Path:
    """The adapter merged in; the changed tensors are F32, so that nothing is rounded."""
    gguflora.merge(trained.base, trained.adapter, trained.folder / "merged.gguf", outtype="f32")
    return trained.folder / "merged.gguf"


@pytest.fixture
def llm(trained: Trained) -> Iterator[llama_cpp.Llama]:
    options: dict[str, Any] = {"n_ctx": 128, "n_threads": 2, "logits_all": True, "verbose": False}
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    with quiet_llama_cpp(), contextlib.closing(llama_cpp.Llama(str(trained.exact), **options, **kinds)) as opened:
        yield opened


def evaluated(llm: llama_cpp.Llama, tokens: list[int]) -> np.ndarray:
    llm.reset()
    llm.eval(tokens)
    return llm.scores[: len(tokens)].copy()


@pytest.mark.slow
def test_merge_equals_peft(trained, merged):
    """Every weight of the merged file, as transformers reads it, is that of PEFT's merge."""
    found, layers = in_torch(merged).state_dict(), 0
    for name, module in trained.model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            weight = module.get_base_layer().weight.detach() + module.get_delta_weight("default").detach()
            torch.testing.assert_close(found[f"{name}.weight"], weight, rtol=1e-5, atol=1e-6)
            layers += 1
    assert layers == len(TARGETS) * trained.model.config.num_hidden_layers
    for name, before in trained.model.base_model.model.state_dict().items():
        if not any(target in name for target in TARGETS):
            torch.testing.assert_close(found[name], before, rtol=0, atol=0)


@LONG_ON_GEMMA
@pytest.mark.slow
def test_convert_equals_the_merge(trained, merged, tmp_path):
    gguflora.convert(trained.adapter, trained.base, tmp_path / "lora.gguf")
    factors, before, after = (
        lora_changes(tmp_path / "lora.gguf"), read_tensors(trained.base), read_tensors(merged),
    )  # fmt: skip
    assert_same_changes(factors, {name: after[name].astype(np.float64) - before[name] for name in factors}, 1e-4)


def test_attach_equals_peft(trained, llm):
    tokens = trained.tokens_of(PROMPT)
    base, adapted = (trained.logits(tokens, adapted=adapted) for adapted in (False, True))
    assert np.abs(adapted - base).max() > 0.5
    assert_close(evaluated(llm, tokens), base, 1e-3, "base")
    with gguflora.attach(llm) as adapters:
        adapters.load("a", trained.adapter)
        adapters.apply(a=1)
        assert_close(evaluated(llm, tokens), adapted, 1e-3, "adapted")
        adapters.apply()
        assert_close(evaluated(llm, tokens), base, 1e-3, "base again")


def test_serve_answers_as_peft(trained):
    """Greedy answers of the server are those of torch: with the adapter, and without it."""
    adapters = {"a": trained.adapter}
    with serving.serving(base=trained.exact, adapters=adapters, n_ctx=128, threads=2, kv_type="F32") as client:
        for name, adapted in (("a", True), ("base", False)):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=body).raise_for_status().json()
            with contextlib.nullcontext() if adapted else trained.model.disable_adapter():
                tokens = torch.tensor([trained.tokens_of(PROMPT)])
                wanted = trained.model.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :]
            text = client.engine.detokenize(wanted.tolist()).decode()
            assert answer["choices"][0]["text"] == text


@LONG_ON_GEMMA
@pytest.mark.slow
def test_compare_measures_what_torch_measures(trained, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    merged = tmp_path / "merged.gguf"
    gguflora.merge(trained.exact, trained.adapter, merged)
    report = gguflora.compare(trained.exact, merged, trained.adapter, text=tmp_path / "text.txt", n_ctx=256)
    assert report.positions == len(trained.tokens_of(TEXT)) - 1
    tokens = trained.tokens_of(TEXT)
    hot, base = (trained.log_probabilities(tokens, adapted=adapted) for adapted in (True, False))
    for name, expected in (("hot", hot), ("base", base)):
        loss = -expected[np.arange(len(tokens) - 1), tokens[1:]].mean()
        assert report.perplexities[name] == pytest.approx(np.exp(loss), rel=1e-3)
    divergence = (np.exp(hot) * (hot - base)).sum(axis=1)[:-1].mean()
    assert report.divergences["base"].kl == pytest.approx(divergence, rel=1e-2)
    assert report.divergences["merged"].kl < 1e-3 * divergence


def test_inspect_equals_torch(trained):
    report = gguflora.inspect(trained.adapter, trained.base)
    assert report.problems == 0
    assert len(report.changes) == len(TARGETS) * trained.model.config.num_hidden_layers
    assert {change.rank for change in report.changes} == {4}
    layers = [module for module in trained.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    with torch.no_grad():
        relative = [layer.get_delta_weight("default").norm() / layer.get_base_layer().weight.norm() for layer in layers]
    np.testing.assert_allclose(sorted(change.relative for change in report.changes), sorted(relative), rtol=1e-4)


def test_tokens_are_those_of_transformers(trained):
    tokenizer = real_models.tokenizer(trained.base)
    with Engine(trained.base, n_ctx=64, threads=1) as engine:
        for text in (TEXT, PROMPT, " leading", "trailing ", "\n\n\n", "a" * 50, "ﬁ ﷺ é"):
            assert engine.tokenize(text) == tokenizer(text).input_ids


def test_chat_template_is_that_of_transformers(trained):
    tokenizer = real_models.tokenizer(trained.base)
    if tokenizer.chat_template is None:
        assert "tokenizer.chat_template" not in read_metadata(trained.base)
        return
    with Engine(trained.base, n_ctx=64, threads=1) as engine:
        wanted = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        assert engine.render_chat(MESSAGES) == tokenizer(wanted, add_special_tokens=False).input_ids
