"""Tensors whose layout is not known: llama.cpp's converter changes more than their names, and no rule says how.

Source: every class of llama.cpp's ``conversion/*.py`` (llama-cpp-python 0.3.36) with its ``modify_tensors``;
tests/architectures/test_converter_classes.py walks their syntax trees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.names import canonical, is_transformers_attention, is_unpermuted, layer_and_module
from gguflora.architectures.orders import rotary_k, rotary_q
from gguflora.architectures.rules import KNOWN, PLAIN
from gguflora.architectures.vision import CLIP, doubt_about_vision
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING

RENAMED: Final = frozenset({
    "afmoe", "apertus", "bailingmoe2", "chatglm", "codeshell", "cogvlm", "cohere2moe", "dots1", "dream", "ernie4_5",
    "ernie4_5-moe", "eurobert", "exaone", "exaone-moe", "gemma4", "gemma4-assistant", "glm4moe", "grovemoe",
    "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "jais2", "jina-bert-v2", "laguna", "lfm2", "lfm2moe",
    "llada-moe", "maincoder", "maple", "mellum", "mimo2", "minicpm3", "minimax-01", "minimax-m2", "modern-bert",
    "mpt", "neo-bert", "nomic-bert", "orion", "paddleocr", "pangu-embedded", "phimoe", "plm", "qwen", "qwen2vl",
    "qwen3vl", "rnd1", "seed_oss", "smallthinker", "spark2_5", "starcoder", "t5encoder",
})  # fmt: skip
"""Architectures without a rule, whose tensors the converter only renames, drops, or stacks by expert."""

_BLOCK: Final = r"blk\.\d+\."
_QK: Final = (_BLOCK + r"attn_[qk]\..*", "reorders the rows of q and k")
_LATENT: Final = (_BLOCK + r"(attn_(kv|k|v)_b|ssm_a|ssm_conv1d.*)(\..*)?", "splits and transposes kv_b")
_EXPERTS: Final = (_BLOCK + r"ffn_(gate|up|down|gate_up)_exps\..*", "reshapes and transposes the stacked experts")
_NORMS: Final = (r".*norm\.weight", "adds a number to the norms")
_ALL: Final = ".*"
_TIME_MIXING: Final = (
    _BLOCK + r"(time_mix_.*|channel_mix_.*)",
    "transposes, scales and fuses the weights of time mixing",
)

CHANGED: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("arctic", "deci", "deepseek", "llada", "nanbeige", "xverse"), _QK),
    "bailingmoe": (
        _BLOCK + r"attn_(qkv|q|k|v)\..*|output\.weight",
        "splits and reorders q, k and v, and normalizes the output weight",
    ),
    **dict.fromkeys(("glm5-next", "kimi-k3"), _LATENT),
    "bailingmoe3": (_LATENT[0], "splits kv_b and stores exp(A_log)"),
    "dots3note": (
        _BLOCK + r"attn_((kv|k|v)_b|(q|kv)_a_norm)\..*",
        "splits kv_b and scales the norms of the latent queries and keys",
    ),
    **dict.fromkeys(("grok", "nomic-bert-moe"), _EXPERTS),
    "falcon-h1": (
        _BLOCK + r"(attn_(q|k|v|output)|ffn_(gate|down)|ssm_(in|out|norm))\..*|output\.weight|token_embd\.weight",
        "scales the weights by multipliers of config.json, which the GGUF file does not hold (merge with PEFT, and "
        "convert the merged model)",
    ),
    "bitnet": (_BLOCK + r"(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight", "rounds the weights to -1, 0 and 1"),
    "jais": (
        _BLOCK + r"(attn_(qkv|output)|ffn_(up|gate|down))\.weight|(token_embd|output)\.weight",
        "transposes the weights and scales the embeddings",
    ),
    "jina-bert-v3": (r"position_embd\.weight", "cuts the first positions"),
    "openelm": (_BLOCK + r"ffn_(gate|up)\.weight", "splits gate and up"),
    "refact": (_BLOCK + r"(attn_[kv]|ffn_(gate|up))\.weight", "splits k and v, and gate and up"),
    "plamo": (_BLOCK + r"attn_(q|output)\.weight", "shuffles q and the output projection"),
    **dict.fromkeys(("plamo2", "plamo3"), _NORMS),
    "muse-glimmer": (
        _BLOCK + r"(attn_[qk]\..*|.*norm\.weight)",
        "reorders the rows of q and k and adds 1 to the norms",
    ),
    "qwen4exp": (_ALL, "reorders value heads, splits the indexer and adds 1 to the norms"),
    "talkie": (_BLOCK + r"attn_[qk]\..*", "changes signs in q and k"),
    **dict.fromkeys(("arwkv7", "rwkv6", "rwkv6qwen2", "rwkv7"), _TIME_MIXING),
    **dict.fromkeys(("dflash", "eagle3"), (_ALL, "reorders q and k of some draft models")),
    "deepseek4": (_ALL, "repacks experts of MXFP4, the only ones that it takes, and has names of its own"),
    "graniteswitch": (_ALL, "splits its weights and holds adapters of its own"),
    **dict.fromkeys(("pockettts", "qwen3tts", "wavtokenizer-dec"), (_ALL, "folds weights of a speech model together")),
}
"""Architectures without a complete rule: pattern of the tensors that the converter changes, and what it does."""


UNCOVERED: Final[Mapping[str, tuple[str, str]]] = {
    "chameleon": (_BLOCK + r"attn_[qk]_norm\..*", "gives all heads the norm of the first one"),
}
"""Tensors of architectures with a rule that the rule does not cover: their pattern, and what the converter does."""


def doubt_about(base: BaseModel, weight: str, tensor: str) -> str | None:
    """Return why the layout of a Hugging Face weight in a tensor is not known, or None if it is.

    Args:
        base: the base model.
        weight: name of the Hugging Face weight.
        tensor: name of the GGUF tensor that holds it, or a part of it.
    """
    architecture = base.architecture
    if architecture == CLIP:
        return doubt_about_vision(base)
    if architecture in UNCOVERED and re.fullmatch(UNCOVERED[architecture][0], tensor):
        return f"llama.cpp's converter {UNCOVERED[architecture][1]}"
    if architecture in KNOWN:
        return _doubt_about_naming(base, canonical(weight), tensor)
    if architecture in CHANGED:
        pattern, what = CHANGED[architecture]
        return f"llama.cpp's converter {what}" if re.fullmatch(pattern, tensor) else None
    if architecture in RENAMED:
        return _doubt_about_naming(base, canonical(weight), tensor)
    return "gguflora has not checked what llama.cpp's converter does to this architecture"


def _doubt_about_naming(base: BaseModel, path: str, tensor: str) -> str | None:
    """Return a doubt that depends on the name that the weight came with, or on what else the base holds."""
    if base.architecture.startswith("qwen3") and "cls.output.weight" in base.shapes:
        head = {OUTPUT, TOKEN_EMBEDDING} if base.is_tied else {OUTPUT}
        if tensor in head:
            return "the classifier of a reranker holds rows of the output weight"
    _, module, _ = layer_and_module(tensor)
    rows = KNOWN.get(base.architecture, PLAIN).rows
    is_rotary = rows.get("attn_q") is rotary_q and rows.get("attn_k") is rotary_k
    if module == "attn_qkv" and is_rotary and not is_transformers_attention(path):
        return "the order of the rows of fused q, k and v depends on the program that fused them"
    if module not in {"attn_q", "attn_k"}:
        return None
    if is_unpermuted(path):
        known = is_rotary or base.architecture == "llama4"
        return None if known else "the rows of q and k have another order under these names than in transformers"
    if is_rotary and not is_transformers_attention(path):
        return "the order of the rows of q and k is not known under these names"
    return None


def unknown_warning(base: BaseModel) -> str | None:
    """Return a warning if gguflora has no rules for the base's architecture, else None."""
    architecture = base.architecture
    if architecture in KNOWN or (architecture == CLIP and doubt_about_vision(base) is None):
        return None
    matched = f"architecture {architecture} is not known to gguflora: tensors were matched by name and shape only"
    if architecture in RENAMED:
        return f"{matched} (checked: llama.cpp's converter only renames its tensors and stacks experts)"
    if base.trust_names:
        return f"{matched}, as trust_names asks; rows in another order would make the result wrong"
    return f"{matched} (checked: llama.cpp's converter does not change the tensors that the adapter changes)"
