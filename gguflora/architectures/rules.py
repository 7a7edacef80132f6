"""What llama.cpp's converter does to the tensors of each architecture beyond renaming them, a rule a line.

The facts come from llama.cpp's ``conversion/*.py``; tests/architectures/ runs it on a model of each architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gguflora.architectures.orders import (
    Order,
    qkv_by_kind,
    qkv_of_groups,
    qkv_or_values_by_turns,
    qkv_with_values_by_turns,
    rotary_k,
    rotary_q,
    values_by_turns,
)
from gguflora.architectures.splits import (
    ROTARY_QKV,
    Split,
    grouped_qkv,
    grouped_qkvz,
    latent_keys_and_values,
    one_below_the_other,
    shared_down,
    shared_gate_up,
)


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one architecture.

    Attributes:
        rows: orders of rows by GGUF tensor of a layer.
        columns: orders of columns.
        splits: weights in several tensors by Hugging Face module of a layer.
        plus_one: tensors that are stored as 1 + w.
        interleaved: whether gate and up alternate in a stack of experts.
        experts_transposed: whether Hugging Face keeps a stack of experts as (n_experts, n_in, n_out).
        cuts_vocabulary: whether rows of the token embedding without a token are left out.
        has_output: whether a model may have an output weight of its own.
        conv1d: layers whose weights Hugging Face keeps as (n_in, n_out), by the end of their names.
    """

    rows: Mapping[str, Order] = field(default_factory=dict)
    columns: Mapping[str, Order] = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)
    plus_one: re.Pattern[str] | None = None
    interleaved: bool = False
    experts_transposed: bool = False
    cuts_vocabulary: bool = False
    has_output: bool = True
    conv1d: re.Pattern[str] | None = None


PLAIN: Final = Rules()
_ROTARY: Final = {"attn_q": rotary_q, "attn_k": rotary_k}
_NORMS: Final = re.compile(r"norm\.weight$")
_NORMS_BUT_OF_STATES: Final = re.compile(r"(?<!ssm_)norm\.weight$")
_MLA: Final = {"self_attn.kv_b_proj": latent_keys_and_values}
_BY_TURNS: Final = Rules(
    rows={
        "attn_qkv": qkv_or_values_by_turns,
        "ssm_conv1d": qkv_with_values_by_turns,
        "attn_gate": values_by_turns,
        "ssm_alpha": values_by_turns,
        "ssm_beta": values_by_turns,
        "ssm_dt": values_by_turns,
    },
    columns={"ssm_out": values_by_turns},
    plus_one=_NORMS_BUT_OF_STATES,
)

KNOWN: Final[Mapping[str, Rules]] = {
    "llama": Rules(rows=_ROTARY),  # mistral and mixtral too
    "mistral3": Rules(rows=_ROTARY),
    "llama4": Rules(experts_transposed=True),
    "smollm3": Rules(rows=_ROTARY),
    "granite": Rules(
        rows=_ROTARY,
        splits={"shared_mlp.input_linear": shared_gate_up, "shared_mlp.output_linear": shared_down},
    ),
    "granitemoe": Rules(rows=_ROTARY, splits={"shared_mlp.input_linear": shared_gate_up}),
    "minicpm": Rules(rows=_ROTARY),
    "baichuan": Rules(splits={"self_attn.W_pack": one_below_the_other(ROTARY_QKV)}),
    "internlm2": Rules(splits={"attention.wqkv": grouped_qkv}),
    "qwen2": PLAIN,
    "qwen2moe": PLAIN,
    "qwen3": PLAIN,
    "qwen3moe": PLAIN,
    "qwen3next": Rules(splits={"linear_attn.in_proj_qkvz": grouped_qkvz}, plus_one=_NORMS_BUT_OF_STATES),
    "qwen35": _BY_TURNS,
    "qwen35moe": _BY_TURNS,
    "gemma": Rules(plus_one=_NORMS, has_output=False),
    "gemma2": Rules(plus_one=_NORMS, has_output=False),
    "gemma3": Rules(plus_one=_NORMS, cuts_vocabulary=True),
    "phi2": PLAIN,
    "phi3": PLAIN,
    "gpt2": Rules(conv1d=re.compile(r"\.c_\w+\.weight$")),
    "gptneox": Rules(rows={"attn_qkv": qkv_by_kind}),
    "bloom": Rules(rows={"attn_qkv": qkv_by_kind}),
    "falcon": Rules(rows={"attn_qkv": qkv_of_groups}),
    "starcoder2": PLAIN,
    "stablelm": PLAIN,
    "olmo": Rules(rows=_ROTARY),
    "olmo2": PLAIN,
    "olmoe": PLAIN,
    "command-r": Rules(has_output=False),
    "cohere2": Rules(has_output=False),
    "nemotron": Rules(plus_one=_NORMS),
    "glm4": PLAIN,
    "exaone4": PLAIN,
    "deepseek2": Rules(splits=_MLA),
    "gpt-oss": Rules(interleaved=True, experts_transposed=True),
    "mamba": PLAIN,
    "jamba": PLAIN,
    "bert": PLAIN,
    "t5": PLAIN,
}
"""The architectures gguflora knows."""
