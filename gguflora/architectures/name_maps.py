"""gguf's map from Hugging Face names to GGUF names, for architectures that the released gguf package has no map of too.

llama.cpp's converter comes with a newer gguf than the package index; such an architecture borrows the map of one that
is named alike, and adds the names that are its own.
Source: llama.cpp's ``gguf-py/gguf/tensor_mapping.py`` and ``constants.py``; tests/architectures/ compares each with
what the converter writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

_INDEXER: Final = {
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
}
_SINKS: Final = {"self_attn.sinks": "attn_sinks"}
_HYPER_CONNECTIONS: Final = {
    f"{owner}_hc.{name}": f"hc_{owner}_{name}.weight" for owner in ("attn", "ffn") for name in ("fn", "base", "scale")
}
"""Parameters of hyper-connections in transformers 5, whose names have no ``.weight``."""
_HY_V4_CHECKPOINT: Final = {
    f"hc_{owner}_layer.hc_pre.hc_{name}": f"hc_{tensor}_{name}.weight"
    for owner, tensor in (("attn", "attn"), ("mlp", "ffn"))
    for name in ("fn", "base", "scale")
}
_MINIMAX_INDEXER: Final = {
    f"self_attn.{owner}{part}": f"indexer.{part}"
    for owner in ("indexer.", "index_")
    for part in ("q_proj", "k_proj", "q_norm", "k_norm")
}

_BORROWED: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "deepseek32": ("glm-dsa", {}),
    "granite_swa": ("granitehybrid", {**_SINKS, "shared_mlp.input_linear": "ffn_up_shexp"}),
    "hrm_text": ("llama", {"self_attn.gate_proj": "attn_gate", "attn.o_proj": "attn_output"}),
    "hy_v4": (
        "deepseek2",
        {
            **dict.fromkeys(("self_attn.gate_proj", "self_attn.linear_gate"), "attn_gate"),
            **_SINKS,
            "self_attn.learnable_sink_param": "attn_sinks.weight",
            **_INDEXER,
            **_HYPER_CONNECTIONS,
            **_HY_V4_CHECKPOINT,
        },
    ),
    "minimax-m3": ("step35", _MINIMAX_INDEXER),
}
"""By architecture: the one whose map it borrows, and GGUF names by Hugging Face name of a module in a layer."""

_OUTSIDE_LAYERS: Final[Mapping[str, Mapping[str, str]]] = {
    "hrm_text": {"model.z_L_init": "hrm.z_l_init"},
    "hy_v4": {
        **{f"model.hc_head.hc_{name}": f"output_hc_{name}.weight" for name in ("fn", "base", "scale")},
        **{f"model.hc_head.hc_head_{name}": f"output_hc_{name}.weight" for name in ("fn", "base", "scale")},
    },
}
"""GGUF names by Hugging Face name, of weights that lie in no layer."""


def has_names(architecture: str) -> bool:
    """Whether the names of an architecture's tensors are known."""
    import gguf  # noqa: PLC0415  (slow to import)

    return architecture in _BORROWED or architecture in gguf.MODEL_ARCH_NAMES.values()


@lru_cache(maxsize=4)
def tensor_names(architecture: str, n_layers: int) -> Any:  # noqa: ANN401  (gguf.TensorNameMap)
    """Return the map of names of an architecture: a ``gguf.TensorNameMap``."""
    import gguf  # noqa: PLC0415  (slow to import)

    known = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture in known:
        return gguf.get_tensor_name_map(known[architecture], n_layers)
    lender, own = _BORROWED[architecture]
    names = gguf.get_tensor_name_map(known[lender], n_layers)
    own_names = {
        **{
            f"model.layers.{n}.{module}": f"blk.{n}.{tensor}" for n in range(n_layers) for module, tensor in own.items()
        },
        **_OUTSIDE_LAYERS.get(architecture, {}),
    }
    kind = next(iter(names.mapping.values()))[0]
    names.mapping.update({name: (kind, tensor) for name, tensor in own_names.items()})
    return names
