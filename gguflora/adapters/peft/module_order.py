"""The order in which a Hugging Face model registers its modules.

TINYLORA, which numbers the adapted modules, depends on it, but safetensors files are sorted differently. One order
serves all architectures but hybrids of state-space layers, which are refused: no other two modules have opposite
orders in two architectures of transformers.
"""

from __future__ import annotations

import re
from typing import Final

from gguflora.adapters.peft.config import PeftConfig
from gguflora.errors import UnsupportedAdapterError

_BLOCK: Final = re.compile(r"(?:.*\.)?(?:layers?|h|blocks?)\.(?P<block>\d+)\.(?P<path>.+)")
_OF_T5: Final = re.compile(
    r"(?P<side>encoder|decoder)\.block\.(?P<block>\d+)\.layer\.(?P<part>\d+)\.\w+\.(?P<leaf>\w+)"
)
_LEAVES_OF_T5: Final = ("q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo")
_PARTS: Final = (
    ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "mixer"),
    ("mlp", "feed_forward", "block_sparse_moe", "intermediate"),
    ("output", "shared_mlp"),
)
_WITHIN: Final = ("experts", "shared_expert", "shared_experts", "shared_expert_gate")
_LEAVES: Final = (
    *("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("query_key_value", "query", "key", "value", "c_attn"),
    *(
        "in_proj_qkvz",
        "in_proj_ba",
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
        "o_proj",
        "qkv_proj",
    ),
    *("router", "gate", "gate_proj", "gate_up_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "input_linear"),
    *("fc2", "dense_4h_to_h", "w2", "w3", "down_proj", "output_linear", "c_proj", "dense", "shared_expert_gate"),
)
_EMBEDDINGS: Final = (
    *("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings"),
    *("wpe", "position_embeddings", "token_type_embeddings"),
)
_HEADS: Final = ("lm_head", "embed_out", "score")
_POOLER: Final = "pooler.dense"


def in_order(config: PeftConfig, modules: list[str]) -> list[str]:
    """Return modules in the order in which the model registers them.

    Raises:
        UnsupportedAdapterError: if the position of a module is not known.
    """
    hybrid = next((module for module in modules if ".mamba." in module), None)
    others = any(".shared_mlp." in module or ".feed_forward." in module for module in modules)
    if hybrid and others and not any(module.endswith(".mamba.x_proj") for module in modules):  # Jamba's are in order
        raise _unknown_order(config, hybrid)
    return sorted(modules, key=lambda module: _sort_key(config, module))


def _sort_key(config: PeftConfig, module: str) -> tuple[int, ...]:
    found, leaf = _BLOCK.fullmatch(module), module.rpartition(".")[2]
    if found is None and leaf in _EMBEDDINGS:
        return 0, _EMBEDDINGS.index(leaf)
    if found is None and (leaf in _HEADS or module.endswith(_POOLER)):
        return 2, _HEADS.index(leaf) if leaf in _HEADS else 0
    if (of_t5 := _OF_T5.search(module)) and of_t5["leaf"] in _LEAVES_OF_T5:
        side, number = ("encoder", "decoder").index(of_t5["side"]), _LEAVES_OF_T5.index(of_t5["leaf"])
        return 1, side, int(of_t5["block"]), int(of_t5["part"]), number
    if found is not None and leaf in _LEAVES:
        steps = found["path"].split(".")
        part = next((number for number, names in enumerate(_PARTS) if steps[0] in names), None)
        if part is not None:
            within = max((_WITHIN.index(step) + 1 for step in steps if step in _WITHIN), default=0)
            expert = next((int(step) for step in steps if step.isdecimal()), 0)
            return 1, int(found["block"]), part, within, expert, _LEAVES.index(leaf)
    raise _unknown_order(config, module)


def _unknown_order(config: PeftConfig, module: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{config.path.parent}: {config.peft_type} depends on the order of the model's modules; that of "
        f"{module!r} is not known; merge it with PEFT"
    )
