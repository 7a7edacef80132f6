"""Map names of Hugging Face weights to names of GGUF tensors, by gguf's ``TensorNameMap``."""

from __future__ import annotations

import difflib
import re
from typing import Final

from gguflora.architectures.base_model import BaseModel
from gguflora.architectures.name_maps import has_names, tensor_names
from gguflora.errors import ArchitectureError

# what multimodal models, sentence encoders and reward models call the language model inside them
_INNER: Final = re.compile(
    r"(?:^|(?<=\.))(?:\d+\.auto_model|auto_model|language_model|text_model|language|llm|thinker|pretrained_model)\."
)
_NESTED: Final = re.compile(r"^(?:model\.){2,}")
_FOREIGN: Final = re.compile(
    r"(?:^|\.)(?:visual|vision|vision_\w+|visual_\w+|img_\w+|image_\w+|vit|vit_\w+|siglip|vpm|resampler|perceiver\w*|aligner|connector|"
    r"vqmodel|multi_modal_projector|mm_projector|multimodal_projector|embed_vision|embed_audio|audio|audio_\w+|speech_\w+|"
    r"talker|token2wav|code2wav|mlp1)\."
)
_UNKNOWN_OWNER: Final = re.compile(r"^\w+\.(?=(?:\w+\.)*?(?:model|layers|transformer|h|backbone|gpt_neox|lm_head)\.)")
_OUTER: Final = re.compile(r"^(?:bert|roberta|distilbert)\.")

_RENAMED: Final = {
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",  # GraniteMoE in transformers 5
    "mlp.router.linear.weight": "mlp.router.weight",  # unsloth's gpt-oss
    "mlp.router.linear.bias": "mlp.router.bias",
    **{f"{owner}.dt_bias": f"{owner}.dt_proj.bias" for owner in ("linear_attn", "mamba", "mixer", "self_attn")},
    "forget_gate.dt_bias": "dt_proj.bias",  # Kimi Linear and GLM-5-Next in transformers 5
    **{f"forget_gate.{name}.weight": f"{name}.weight" for name in ("f_a_proj", "f_b_proj")},
    "moe.router_bias": "moe.router_bias.bias",  # Step-3.5
    "altup.correct_output_scale": "altup.correct_output_scale.weight",  # Gemma 3n
    "self_attn.sinks": "self_attn.sinks.weight",
    "e_score_correction_bias": "e_score_correction.bias",
    "encoder.embed_tokens.weight": "shared.weight",  # T5 has one embedding under three names
    "decoder.embed_tokens.weight": "shared.weight",
}
"""Last parts of names in transformers that differ from those in the name map."""

CLASSIFIER: Final = "cls.output"
"""The tensor that holds a classification head, without ``.weight`` or ``.bias``."""

_PREFIXES: Final = ("", "model.", "transformer.", "gpt_neox.", "backbone.")
_SUFFIXES: Final = (".weight", ".bias")
_HEADS: Final = {"score", "classifier"}
"""Modules that turn the pooled hidden state into labels."""

_IN_LAYER: Final = re.compile(r"(?:.*\.)?(?:layers|layer|h|blocks|block|blk)\.(\d+)\.(.+)")

_UNPERMUTED: Final = re.compile(
    r"(?:.*\.)?layers\.\d+\.(?:attention\.w[qk]|attn\.[qk]_proj|self_attn\.[qk]_proj_no_perm)(?:\.weight|\.bias)?"
)
_TRANSFORMERS: Final = re.compile(r"(?:.*\.)?\d+\.(?:self_attn|mixer)\.(?:[qkv]|qkv)_proj(?:\.weight|\.bias)?")


def canonical(weight: str) -> str:
    """Return the name that the name map has for a weight, without the prefixes of multimodal and encoder models."""
    path = _OUTER.sub("", _NESTED.sub("model.", _INNER.sub("", weight)))
    for suffix, mapped in _RENAMED.items():
        if path == suffix or path.endswith(f".{suffix}"):
            return path[: -len(suffix)] + mapped
    return path


def is_foreign(weight: str) -> bool:
    """Whether a weight belongs to a part beside the language model, such as a vision tower, by its name."""
    return _FOREIGN.search(weight) is not None


def vision_part(weight: str) -> str:
    """Return the name of a weight of another part from the component that names the part, such as ``vision_tower.``."""
    match = _FOREIGN.search(weight)
    return weight if match is None else weight[match.start() :].removeprefix(".")


def without_owner(path: str) -> str | None:
    """Return a name without its first component, if the rest may name a weight of a language model; else None."""
    match = _UNKNOWN_OWNER.match(path)
    return path[match.end() :] if match else None


def layer_and_module(name: str) -> tuple[int, str, str]:
    """Split the name of a weight or tensor into layer (-1 if none), module, and ``.weight``, ``.bias`` or nothing."""
    match = _IN_LAYER.fullmatch(name)
    layer, path = (int(match[1]), match[2]) if match else (-1, name)
    kind = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), "")
    return layer, path.removesuffix(kind), kind


def is_unpermuted(path: str) -> bool:
    """Whether a name of q or k is one of Meta's, Mistral's or torchtune's own, which keep rotated rows adjacent.

    transformers' converters of these models permute the rows of q and k and rename them; llama.cpp's undoes that.
    """
    return _UNPERMUTED.fullmatch(path) is not None


def is_transformers_attention(path: str) -> bool:
    """Whether a name of q, k or v is one of transformers, which rotates row i with row i + head_dim / 2."""
    return _TRANSFORMERS.fullmatch(path) is not None


def tensor_of(base: BaseModel, path: str) -> str | None:
    """Return the GGUF tensor of a weight, or None if there is none with the same values.

    Args:
        base: the base model.
        path: canonical name of the weight.
    """
    if path.endswith("A_log"):  # stored as -exp(A_log)
        return None
    _, module, kind = layer_and_module(path)
    if module in _HEADS and f"{CLASSIFIER}{kind}" in base.shapes:
        return f"{CLASSIFIER}{kind}"
    names = tensor_names(base.architecture, base.n_layers)
    # names in models without a head (AutoModel) lack the first part, such as "model."
    bare = [path.removeprefix(prefix) for prefix in _PREFIXES if path.startswith(prefix)]
    for candidate in (path, *bare, *(prefix + name for name in (path, *bare) for prefix in _PREFIXES)):
        name: str | None = names.get_name(candidate, _SUFFIXES)
        if name and (name.endswith(_SUFFIXES) or name in base.shapes):
            return name
    return None


def is_classifier(weight: str) -> bool:
    """Whether a weight belongs to a classification head, by its name."""
    return layer_and_module(canonical(weight))[1].rpartition(".")[2] in _HEADS


def nearest_names(base: BaseModel, weight: str) -> list[str]:
    """Return the Hugging Face names of the base's weights that are most like a name, the nearest first; at most two."""
    path = canonical(weight)
    kind = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), ".weight")
    known = tensor_names(base.architecture, base.n_layers).mapping
    held = [name for name, (_, tensor) in known.items() if f"{tensor}{kind}" in base.shapes]
    return [f"{name}{kind}" for name in difflib.get_close_matches(path.removesuffix(kind), held, 2, 0.7)]


def check_named(base: BaseModel) -> None:
    """Raise ``ArchitectureError`` if gguf has no names for the tensors of the base's architecture."""
    if not has_names(base.architecture):
        raise ArchitectureError(
            f"{base.path}: architecture {base.architecture!r} is not supported: neither gguflora nor the installed "
            "gguf package knows the names of its tensors; a newer gguf may"
        )
