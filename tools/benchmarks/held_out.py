"""Held-out answers of the small llama's adapters, and what a model of given weights makes of them, in torch.

Torch computes in float32 on dequantized weights. llama.cpp rounds the activations to 8 bits before every product with a
quantized weight, which makes the hot adapter and the merged weights differ by another 1e-4 to 5e-4 nats (the same text
in both, Q8_0 and Q4_K): more than a merge into five or more bits does, so it would hide what is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from safetensors.numpy import load_file

from gguflora import quants
from gguflora.files.gguf import GgufFile
from tools import demo_text, make_demo

Weights = Mapping[str, torch.Tensor]
TOGETHER = 16
"""Answers evaluated at once."""


@dataclass(frozen=True)
class Predictions:
    """Of every token of the answers: log-probabilities over the vocabulary, and the loss."""

    log_p: torch.Tensor
    loss: float

    def divergence_of(self, other: Predictions) -> float:
        """Mean KL divergence of the other from this, nats per token."""
        return float((self.log_p.exp() * (self.log_p - other.log_p)).sum(-1).mean())


class HeldOut:
    """The answers that one adapter was trained to give, to questions it has not seen."""

    def __init__(self, home: Path, adapter: str, samples: int) -> None:
        self._model = make_demo.read_base(home / "F32.gguf")
        self._model.eval()
        self._names = _gguf_names(self._model.config)
        mix = {"shout": make_demo.SHOUT_MIX, "verse": make_demo.VERSE_MIX}[adapter]
        chosen = Random(make_demo.SEED).sample(list(held_out_samples(mix)), samples)
        self._rows = _encode(chosen)

    def weights_of(self, path: Path) -> dict[str, torch.Tensor]:
        """The weights of a GGUF file under their Hugging Face names, in float32."""
        config = self._model.config
        n_heads = config.num_attention_heads
        heads = {"attn_q": n_heads, "attn_k": config.num_key_value_heads or n_heads}
        weights = {}
        with GgufFile(path) as file:
            for name, gguf_name in self._names.items():
                tensor = file.tensors[gguf_name]
                values = quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type).reshape(tensor.shape)
                kind = gguf_name.split(".")[-2]
                weights[name] = torch.from_numpy(_halves(values, heads[kind]) if kind in heads else values)
        return weights

    @torch.inference_mode()
    def predict(self, weights: Weights) -> Predictions:
        """What a model of these weights makes of the answers."""
        self._model.load_state_dict(dict(weights), strict=True, assign=True)
        log_p, losses = [], []
        for start in range(0, len(self._rows), TOGETHER):
            some = self._rows[start : start + TOGETHER]
            ids = torch.nn.utils.rnn.pad_sequence(
                [row for row, _ in some], batch_first=True
            )  # no token sees later ones
            logits = self._model(input_ids=ids, use_cache=False).logits
            for scores, (row, answer) in zip(logits, some, strict=True):
                log_p.append(torch.log_softmax(scores[answer - 1 : len(row) - 1].double(), -1))
                losses.append(-log_p[-1][torch.arange(len(row) - answer), row[answer:]])
        return Predictions(torch.cat(log_p), float(torch.cat(losses).mean()))


def add_adapter(weights: Weights, adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    """The weights with a LoRA applied, in float32: the hot adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factor = scale * config["lora_alpha"] / config["r"]
    lora, hot = load_file(adapter / "adapter_model.safetensors"), dict(weights)
    for name in lora:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a, b = (torch.from_numpy(lora[f"{module}.lora_{part}.weight"].astype(np.float32)) for part in "AB")
            target = f"{module.removeprefix('base_model.model.')}.weight"
            hot[target] = hot[target] + factor * (b @ a)
    return hot


def _gguf_names(config: Any) -> dict[str, str]:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    layer += ["mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    modules = [f"model.layers.{number}.{part}" for number in range(config.num_hidden_layers) for part in layer]
    modules += ["model.embed_tokens", "model.norm", "lm_head"]
    return {f"{module}.weight": f"{names.get_name(module)}.weight" for module in modules}


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's rotary order (pairs) to Hugging Face's (halves)."""
    n_out, n_in = weight.shape
    pairs = weight.reshape(heads, n_out // heads // 2, 2, n_in)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(n_out, n_in))


def held_out_samples(mix: Mapping[Any, float]) -> Iterator[tuple[str, str]]:
    """Prompts and answers that no training saw."""
    rng = Random(make_demo.SEED)
    for asked, told in mix:
        for question in demo_text.QUESTIONS:
            if demo_text.is_held_out(question, told):
                prompt = demo_text.prompt_for(question.text, rng.choice(asked.value))
                yield prompt, demo_text.answer_for(question, told, rng)


def _encode(chosen: list[tuple[str, str]]) -> list[tuple[torch.Tensor, int]]:
    """Tokens of each sample, and where its answer begins."""
    tokenizer, rows = make_demo.train_tokenizer(), []
    for prompt, answer in chosen:
        ids = tokenizer.encode(prompt).ids
        rows.append((torch.tensor([*ids, *tokenizer.encode(answer, add_special_tokens=False).ids, 1]), len(ids)))
    return sorted(rows, key=lambda row: len(row[0]))
