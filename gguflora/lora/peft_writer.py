"""Write a LoRA as PEFT's ``save_pretrained`` does: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora._version import __version__
from gguflora.adapters.deltas import LowRank, fold
from gguflora.adapters.peft.config import FILE_NAME
from gguflora.adapters.peft.keys import PREFIX
from gguflora.errors import UnsupportedAdapterError
from gguflora.files.safetensors import Array, as_float32
from gguflora.lora.factored import FactoredAdapter, Pairs, is_embedding
from gguflora.lora.gguf_writer import exact_type

WEIGHTS: Final = "adapter_model.safetensors"
_PARAMETER: Final = re.compile(r"(?P<owner>.+\.experts)\.(?P<parameter>gate_up_proj|down_proj)\.(?P<expert>\d+)")
_ORDER: Final[tuple[str, ...]] = ("gate_up_proj", "down_proj")
_DTYPES: Final = {"F32": np.float32, "F16": np.float16}


def peft_tensors(adapter: FactoredAdapter) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors and the configuration of a PEFT directory.

    Args:
        adapter: by the names of a Hugging Face model's weights.

    Raises:
        UnsupportedAdapterError: if PEFT has no place for a change.
    """
    modules, parameters = _split(adapter.pairs)
    odd = [name for name in modules if not name.endswith(".weight")]
    if odd:
        raise UnsupportedAdapterError(f"{adapter.path}: PEFT's LoRA has no place for a change of {odd[0]!r}")
    tensors: dict[str, Array] = {}
    for name, delta in modules.items():
        tensors |= _of_module(name, delta)
    forms = {name.removesuffix(".weight"): (delta.rank, _alpha(delta)) for name, delta in modules.items()}
    for owner, found in parameters.items():
        stacks = {name: _even(list(found[name])) for name in _ORDER if name in found}
        tensors |= _of_owner(owner, stacks)
        forms |= {f"{owner}.{name}": (stack[0].rank, _alpha(stack[0])) for name, stack in stacks.items()}
    targets = [name.removesuffix(".weight") for name in modules]
    return tensors, _config(adapter, forms, targets, [name for name in forms if name not in targets])


def _split(pairs: Pairs) -> tuple[dict[str, LowRank], dict[str, dict[str, list[LowRank]]]]:
    """Changes of modules; and those of experts, in their order, by owner and parameter."""
    modules: dict[str, LowRank] = {}
    found: dict[tuple[str, str], dict[int, LowRank]] = {}
    for name, delta in pairs.items():
        match = _PARAMETER.fullmatch(name)
        if match is None:
            modules[name] = delta
        else:
            found.setdefault((match["owner"], match["parameter"]), {})[int(match["expert"])] = delta
    owners: dict[str, dict[str, list[LowRank]]] = {}
    for (owner, parameter), experts in found.items():
        if sorted(experts) != list(range(len(experts))):
            raise UnsupportedAdapterError(
                f"{owner}.{parameter}: only {len(experts)} of the experts are changed; PEFT adapts all of them"
            )
        owners.setdefault(owner, {})[parameter] = [experts[number] for number in range(len(experts))]
    return modules, owners


def _of_module(name: str, delta: LowRank) -> dict[str, Array]:
    key = PREFIX + name.removesuffix(".weight")
    if is_embedding(name):
        return {f"{key}.lora_embedding_A": _stored(delta.b.T), f"{key}.lora_embedding_B": _stored(delta.a.T)}
    return {f"{key}.lora_A.weight": _stored(delta.a), f"{key}.lora_B.weight": _stored(delta.b)}


def _of_owner(owner: str, stacks: Mapping[str, Sequence[LowRank]]) -> dict[str, Array]:
    """Wrappers lie in each other, the last parameter outermost (see `adapters.parameters`)."""
    tensors: dict[str, Array] = {}
    for depth, stack in enumerate(reversed(list(stacks.values()))):
        key = PREFIX + owner + ".base_layer" * depth
        a = np.concatenate([as_float32(delta.a) for delta in stack], axis=0)
        b = np.stack([as_float32(delta.b) for delta in stack], axis=-1)
        tensors |= {f"{key}.lora_A.weight": _stored(a), f"{key}.lora_B.weight": _stored(b.reshape(len(b), -1))}
    return tensors


def _even(stack: list[LowRank]) -> list[LowRank]:
    """The experts' changes with one rank and one scaling."""
    rank = max(delta.rank for delta in stack)
    if len({(delta.rank, delta.scaling) for delta in stack}) == 1:
        return stack
    even = []
    for delta in stack:
        more = (0, rank - delta.rank)
        a, b = np.pad(as_float32(delta.a), (more, (0, 0))), np.pad(fold(delta), ((0, 0), more))
        even.append(LowRank(a, b, 1.0))
    return even


def _stored(array: Array) -> Array:
    """Contiguous, in half precision where that is exact."""
    values = as_float32(array)
    return np.ascontiguousarray(values, _DTYPES[exact_type(values)])


def _alpha(delta: LowRank) -> float:
    """The alpha of a change: a whole number where rounding has only just missed one."""
    alpha = delta.scaling * delta.rank
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) < 1e-9 * max(1.0, abs(alpha)) else alpha


def _config(
    adapter: FactoredAdapter,
    forms: Mapping[str, tuple[int, float]],
    targets: Sequence[str],
    parameters: Sequence[str],
) -> dict[str, Any]:
    rank = Counter(rank for rank, _ in forms.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in forms.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {name: own for name, (own, _) in forms.items() if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in forms.items() if own != alpha},
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    more: dict[str, Any] = {"target_parameters": list(parameters)} if parameters else {}
    if adapter.invocation_tokens:
        more["alora_invocation_tokens"] = list(adapter.invocation_tokens)
    return {**config, **more, **adapter.fields}


def write_peft_directory(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
    """Write both files into an existing directory.

    Raises:
        OSError: if they cannot be written.
    """
    from safetensors.numpy import save  # noqa: PLC0415  (only where adapters are written)

    content = save(dict(tensors), {"format": "pt", "gguflora": __version__})
    (folder / WEIGHTS).write_bytes(_with_ordered_metadata(content))
    (folder / FILE_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_ordered_metadata(content: bytes) -> bytes:
    """A safetensors file that is the same each time: the library writes the metadata in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]
