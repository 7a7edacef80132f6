"""Write a LoRA like PEFT's ``save_pretrained``: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gguflora._version import __version__
from gguflora.adapters.deltas import LowRank, fold
from gguflora.adapters.peft.config import FILE_NAME
from gguflora.adapters.peft.keys import PREFIX
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array, as_float32
from gguflora.files.safetensors_writer import SafetensorsWriter, header_room
from gguflora.files.strict_json import is_strict, to_json
from gguflora.lora.factored import FactoredAdapter, Pairs, is_embedding
from gguflora.lora.gguf_writer import check_finite, exact_type

WEIGHTS: Final = "adapter_model.safetensors"
_PARAMETER: Final = re.compile(r"(?P<owner>.+\.experts)\.(?P<parameter>gate_up_proj|down_proj)\.(?P<expert>\d+)")
_ROUTER: Final = re.compile(r".+\.(?:mlp|moe|feed_forward|block_sparse_moe)\.(?:gate|router)")
"""Routers of experts. In transformers 5 they are no linear layers but hold a parameter ``weight``, which PEFT adapts as
one of ``target_parameters``, as it does for linear layers."""
_EXPERTS: Final = re.compile(r"\.(?:experts|shared_experts?|shared_mlp|gate\.weight|router\.weight)")
_GATED: Final = re.compile(r".+\.(?:gate_proj|up_proj|down_proj)")
"""Dense layers of a model with experts. Among ``target_modules`` PEFT 0.21 takes their names for the experts'."""
_OUTPUT: Final = "lm_head"
_LONGEST_END: Final = ".base_layer.lora_embedding_A"
_METADATA: Final = {"format": "pt", "gguflora": __version__}
_ORDER: Final[tuple[str, ...]] = ("gate_up_proj", "down_proj")
_DTYPES: Final = {"F32": np.float32, "F16": np.float16}


Forms = dict[str, tuple[int, float]]
"""Rank and alpha by the name of a module or parameter."""


@dataclass(frozen=True, slots=True)
class PeftSummary:
    """What a PEFT directory holds.

    Attributes:
        ranks: rank of each changed module or parameter.
        size: bytes of the tensors.
    """

    ranks: list[int]
    size: int


def write_peft_adapter(folder: Path, adapter: FactoredAdapter) -> PeftSummary:
    """Write an adapter as PEFT does, into an existing directory. Each delta is read once, and not kept.

    Args:
        folder: the directory.
        adapter: adapter whose pairs are named after the weights of a Hugging Face model.

    Raises:
        UnsupportedAdapterError: if PEFT's LoRA cannot hold a delta.
        AdapterError: if a factor is not finite.
        OSError: if a file cannot be written.
    """
    modules, parameters = _split(adapter.pairs)
    unsupported = [name for name in modules if not name.endswith(".weight")]
    if unsupported:
        raise UnsupportedAdapterError(f"{adapter.path}: PEFT's LoRA cannot change {unsupported[0]!r}")
    forms: Forms = {}
    size = 0
    keys = [PREFIX + name + _LONGEST_END for name in (*adapter.pairs, *adapter.saved, "lm_head") for _ in range(2)]
    with SafetensorsWriter(folder / WEIGHTS, header_room(keys), _METADATA) as writer:
        for key, values in _tensors(adapter, modules, parameters, forms):
            check_finite(key, values)
            writer.add(key, values)
            size += values.nbytes
    ranks = [rank for rank, _ in forms.values()]
    targets = [f"{name}.weight" for name in forms if f"{name}.weight" in modules or name == _OUTPUT]
    if not adapter.invocation_tokens:  # an aLoRA cannot adapt parameters
        has_experts = any(_EXPERTS.search(name) for name in adapter.pairs)
        wrapped = {
            name
            for name in (target.removesuffix(".weight") for target in targets)
            if _ROUTER.fullmatch(name) or (has_experts and _GATED.fullmatch(name))
        }
        forms = {f"{name}.weight" if name in wrapped else name: form for name, form in forms.items()}
    linear = [name for name in forms if f"{name}.weight" in targets]
    config = _config(adapter, forms, linear, [name for name in forms if name not in linear])
    (folder / FILE_NAME).write_text(_config_text(config), encoding="utf-8")
    return PeftSummary(ranks, size)


def _tensors(
    adapter: FactoredAdapter,
    modules: Mapping[str, str],
    parameters: Mapping[str, Mapping[str, Sequence[str]]],
    forms: Forms,
) -> Iterator[tuple[str, Array]]:
    """Yield all tensors, and note the rank and the alpha of each module in ``forms``."""
    is_tied = bool(adapter.fields.get("ensure_weight_tying"))
    for name in modules:
        if is_tied and name == f"{_OUTPUT}.weight":
            continue
        delta = adapter.pairs[name]
        forms[name.removesuffix(".weight")] = delta.rank, _alpha(delta)
        yield from _module_tensors(name, delta).items()
        if is_tied and is_embedding(name) and not name.endswith("wpe.weight"):  # PEFT stores the output's, too
            forms[_OUTPUT] = forms[name.removesuffix(".weight")]
            yield from _module_tensors(f"{_OUTPUT}.weight", delta).items()
    for owner, experts in parameters.items():
        for depth, parameter in enumerate(name for name in reversed(_ORDER) if name in experts):
            stack = _with_equal_ranks([adapter.pairs[name] for name in experts[parameter]])
            forms[f"{owner}.{parameter}"] = stack[0].rank, _alpha(stack[0])
            yield from _parameter_tensors(owner, depth, stack).items()
    for name, values in adapter.saved.items():
        module, _, kind = name.rpartition(".")
        is_wrapped = kind == "bias" and module in forms
        yield PREFIX + (f"{module}.base_layer.bias" if is_wrapped else name), _to_storage(values)


def _split(pairs: Pairs) -> tuple[dict[str, str], dict[str, dict[str, list[str]]]]:
    """Split names into those of modules, and those of experts, as lists by owner and parameter."""
    modules: dict[str, str] = {}
    by_parameter: dict[tuple[str, str], dict[int, str]] = {}
    for name in pairs:
        match = _PARAMETER.fullmatch(name)
        if match is None:
            modules[name] = name
        else:
            by_parameter.setdefault((match["owner"], match["parameter"]), {})[int(match["expert"])] = name
    owners: dict[str, dict[str, list[str]]] = {}
    for (owner, parameter), experts in by_parameter.items():
        if sorted(experts) != list(range(len(experts))):
            raise UnsupportedAdapterError(
                f"{owner}.{parameter}: only {len(experts)} of the experts are changed; PEFT adapts all of them"
            )
        owners.setdefault(owner, {})[parameter] = [experts[number] for number in range(len(experts))]
    return modules, owners


def _module_tensors(name: str, delta: LowRank) -> dict[str, Array]:
    key = PREFIX + name.removesuffix(".weight")
    if is_embedding(name):
        return {f"{key}.lora_embedding_A": _to_storage(delta.b.T), f"{key}.lora_embedding_B": _to_storage(delta.a.T)}
    return {f"{key}.lora_A.weight": _to_storage(delta.a), f"{key}.lora_B.weight": _to_storage(delta.b)}


def _parameter_tensors(owner: str, depth: int, stack: Sequence[LowRank]) -> dict[str, Array]:
    """Return the tensors of one of a module's expert parameters.

    PEFT nests one wrapper for each parameter, that of the last parameter outermost
    (`gguflora.adapters.peft.lora_target_parameters`), at depth 0.
    """
    key = PREFIX + owner + ".base_layer" * depth
    a = np.concatenate([as_float32(delta.a) for delta in stack], axis=0)
    b = np.stack([as_float32(delta.b) for delta in stack], axis=-1)
    return {f"{key}.lora_A.weight": _to_storage(a), f"{key}.lora_B.weight": _to_storage(b.reshape(len(b), -1))}


def _with_equal_ranks(stack: list[LowRank]) -> list[LowRank]:
    """Give all experts of a stack the same rank and scaling."""
    rank = max(delta.rank for delta in stack)
    if len({(delta.rank, delta.scaling) for delta in stack}) == 1:
        return stack
    padded_stack = []
    for delta in stack:
        padding = (0, rank - delta.rank)
        a, b = np.pad(as_float32(delta.a), (padding, (0, 0))), np.pad(fold(delta), ((0, 0), padding))
        padded_stack.append(LowRank(a, b, 1.0))
    return padded_stack


def _to_storage(array: Array) -> Array:
    """Return a contiguous array, in half precision if that is exact."""
    values = as_float32(array)
    return np.ascontiguousarray(values, _DTYPES[exact_type(values)])


def _alpha(delta: LowRank) -> float:
    """Return the alpha of a delta, rounded to a whole number if it misses one only by float error."""
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
        "rank_pattern": {name: r for name, (r, _) in forms.items() if r != rank},
        "alpha_pattern": {name: value for name, (_, value) in forms.items() if value != alpha},
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    optional: dict[str, Any] = {"target_parameters": list(parameters)} if parameters else {}
    if adapter.saved:
        whole = {name.rpartition(".")[0] for name in adapter.saved if name.endswith(".weight")}
        biases = {name.rpartition(".")[0] for name in adapter.saved if name.endswith(".bias")} - whole
        optional |= {"modules_to_save": sorted(whole)} if whole else {}
        optional |= {"bias": "all"} if biases else {}
    if adapter.invocation_tokens:
        optional["alora_invocation_tokens"] = list(adapter.invocation_tokens)
    return {**config, **optional, **adapter.fields}


def write_peft_directory(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
    """Write both files into an existing directory.

    Raises:
        AdapterError: if a field of the configuration, taken over from the adapter that was read, is no finite number.
        OSError: if they cannot be written.
    """
    text = _config_text(config)
    with SafetensorsWriter(folder / WEIGHTS, header_room(list(tensors)), _METADATA) as writer:
        for name, values in tensors.items():
            writer.add(name, values)
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def _config_text(config: Mapping[str, Any]) -> str:
    for name, value in config.items():
        if not is_strict(value):
            raise AdapterError(f"{FILE_NAME}: {name} is {value!r:.80}, which JSON cannot hold; expected finite numbers")
    return to_json(config, indent=2) + "\n"
