"""LORA: ``W + scaling * B A`` (https://arxiv.org/abs/2106.09685), with rsLoRA's scaling (https://arxiv.org/abs/2312.03732).

Tensors of a module: ``lora_A.weight`` (r, n_in) and ``lora_B.weight`` (n_out, r). An embedding has ``lora_embedding_A``
(r, rows) and ``lora_embedding_B`` (width, r), which add ``scaling * (B A)^T`` to its weight (rows, width). The factors
of a ``fan_in_fan_out`` layer (GPT-2's Conv1D) have the same layout as any other layer's: PEFT transposes their product,
GGUF transposes the weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gguflora.adapters.deltas import Delta, FunctionDelta, LowRank, ShapeDependentDelta, as_float64
from gguflora.adapters.peft.config import PeftConfig
from gguflora.adapters.peft.keys import Parts, by_module, expect
from gguflora.adapters.peft.lora_compact import with_blocks, with_pooling
from gguflora.adapters.peft.lora_dora import with_magnitude
from gguflora.adapters.peft.lora_experts import is_stack, read_stack
from gguflora.adapters.peft.lora_init import INITIALIZATIONS, subtract_initial
from gguflora.adapters.peft.lora_kasa import with_diagonal
from gguflora.adapters.peft.lora_scaling import lora_scaling
from gguflora.adapters.peft.lora_target_parameters import read_parameter, split_wrapped
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array, is_float
from gguflora.quants.arrays import Float64Array, Indices

_MAGNITUDE: Final = "lora_magnitude_vector"
_DIAGONAL: Final = "lora_diag"
_BIAS: Final = "lora_B.bias"
_PAIRS: Final = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))

# values of init_lora_weights that do not change the base weight; the others subtract the initial B A from it
_PLAIN_INITIALIZATIONS: Final = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_LOST_INITIALIZATIONS: Final = {
    "pissa_niter": "is a randomized decomposition, whose random numbers are not saved",
    "corda": "comes from activations of sample texts, which are not saved",
    "lora_ga": "comes from gradients of sample texts, which are not saved",
    "loftq": "is a quantization of the base, whose error the factors compensate",
}
"""Why other initializations cannot be recomputed from the base and the adapter."""

_REFUSED: Final = {
    "enable_lora": "has factors for some of the parts of a fused weight (PEFT 0.2): merge it with that version of PEFT",
    "layer_replication": "refers to a deeper model than the base: merge it with PEFT and convert the whole model",
    "arrow_config": "routes each token to several adapters, so no fixed weight is equivalent: merge them one by one",
}

# tensors that are used only in training
_UNUSED: Final = re.compile(r".*\.(?:lora_velora_embed|lora_monteclora_sampler)(?:\..*)?")


def read_lora(config: PeftConfig, tensors: Mapping[str, Array]) -> dict[str, Delta | ShapeDependentDelta]:
    """Read the delta of every adapted weight, by its name in the Hugging Face model.

    Raises:
        UnsupportedAdapterError: for options that are not supported.
        AdapterError: if a factor is missing, or does not have the configured rank.
    """
    _check_options(config)
    used = {key: tensor for key, tensor in tensors.items() if not _UNUSED.fullmatch(key)}
    modules = by_module(config, used, [*(part for pair in _PAIRS for part in pair), _BIAS, _MAGNITUDE, _DIAGONAL])
    parameters, modules = split_wrapped(config, modules)
    deltas: dict[str, Delta | ShapeDependentDelta] = {}
    for parameter, parts in parameters.items():
        deltas |= read_parameter(config, parameter, parts)
    for module, parts in modules.items():
        if is_stack(module, parts):
            deltas |= read_stack(config, module, parts)
            continue
        if _BIAS in parts:
            deltas[f"{module}.bias"] = _read_bias(config, module, parts)
        deltas[f"{module}.weight"] = _read_module(config, module, parts)
    return deltas


def _check_options(config: PeftConfig) -> None:
    for name, reason in _REFUSED.items():
        if config.fields.get(name):
            raise UnsupportedAdapterError(f"{config.path}: {name} is set: the adapter {reason}")
    initial = config.fields.get("init_lora_weights")
    if initial not in _PLAIN_INITIALIZATIONS and initial not in INITIALIZATIONS:
        reasons = (text for name, text in _LOST_INITIALIZATIONS.items() if str(initial).startswith(name))
        remedy = "" if initial == "loftq" else "save it with PEFT's path_initial_model_for_weight_conversion, or "
        raise UnsupportedAdapterError(
            f"{config.path}: init_lora_weights is {initial!r}: PEFT changed the base's weights before training. This "
            f"initialization {next(reasons, 'is not known')}, so the change cannot be recomputed from the original "
            f"base; {remedy}make the GGUF base from the changed model (base_model.save_pretrained right after "
            "get_peft_model), for which the adapter is a plain LoRA, and set init_lora_weights to true"
        )


def _read_bias(config: PeftConfig, module: str, parts: Parts) -> FunctionDelta:
    """Return the delta of the layer's bias if B has a bias (``lora_bias``): ``b' = b + scaling * lora_B.bias``."""
    bias = expect(config, module, _BIAS, parts.pop(_BIAS), (None,))
    terms = len(parts["lora_A"]) if "lora_A" in parts and parts["lora_A"].ndim else 0
    values = lora_scaling(config, module, config.rank(module, terms)) * as_float64(bias)

    def compute(w: Float64Array, rows: Indices) -> Float64Array:
        return values[rows, None]

    return FunctionDelta((len(values), 1), compute)


def _read_module(config: PeftConfig, module: str, parts: Parts) -> Delta | ShapeDependentDelta:
    embedding, extra = "lora_embedding_A" in parts, {name for name in (_MAGNITUDE, _DIAGONAL) if name in parts}
    low_rank = _read_factors(config, module, {name: part for name, part in parts.items() if name not in extra})
    expected = {
        name for name, option in ((_MAGNITUDE, "use_dora"), (_DIAGONAL, "kasa_config")) if config.fields.get(option)
    }
    if extra != expected:
        raise AdapterError(
            f"{config.path.parent}: module {module!r} has {', '.join(parts)}, but {config.path.name} asks for "
            f"{', '.join(expected) or 'no more than a pair of factors'}"
        )
    initial = config.fields.get("init_lora_weights")
    delta: Delta = low_rank
    if initial in INITIALIZATIONS and not embedding:
        delta = subtract_initial(low_rank, initial)
    if _DIAGONAL in extra:
        return with_diagonal(config, module, low_rank, parts[_DIAGONAL])
    if _MAGNITUDE in extra:
        return with_magnitude(config, module, delta, parts[_MAGNITUDE], embedding=embedding)
    if config.flag("use_qalora") and not embedding and delta is low_rank:
        return with_pooling(config, low_rank)
    return delta


def _read_factors(config: PeftConfig, module: str, parts: Parts) -> LowRank:
    where = f"{config.path.parent}: module {module!r}"
    for name_a, name_b in _PAIRS:
        if parts.keys() == {name_a, name_b}:
            if name_a == "lora_embedding_A":
                return read_pair(config, module, parts[name_a], parts[name_b]).transposed()
            return read_pair(config, module, *with_blocks(config, module, parts[name_a], parts[name_b]))
    missing = [f"{b} (has {a})" if a in parts else f"{a} (has {b})" for a, b in _PAIRS if (a in parts) != (b in parts)]
    if missing:
        raise AdapterError(f"{where} has no {missing[0]}; the adapter is incomplete, save it again")
    raise AdapterError(f"{where} has {', '.join(parts)}, expected one pair of factors")


def read_pair(config: PeftConfig, module: str, a: Array, b: Array) -> LowRank:
    """Return the low-rank delta of a pair of factors, with the rank and alpha that are configured for the module.

    Raises:
        UnsupportedAdapterError: if the factors are not matrices.
        AdapterError: if they do not have the configured rank.
    """
    where = f"{config.path.parent}: module {module!r}"
    if a.ndim != 2 or b.ndim != 2:
        raise UnsupportedAdapterError(
            f"{where}: A is {a.shape} and B is {b.shape}, expected two matrices: LoRA of a grouped convolution mixes "
            "its groups, so no weight is equivalent, and PEFT cannot merge it either; train without this module"
        )
    for name, matrix in (("A", a), ("B", b)):
        if not is_float(matrix):
            raise AdapterError(f"{where}: {name} holds {matrix.dtype}, expected floating-point numbers")
    rank = config.rank(module, a.shape[0])
    terms = min(rank, len(b), a.shape[1]) if config.fields.get("init_lora_weights") in INITIALIZATIONS else rank
    if a.shape[0] != terms or b.shape[1] != terms:
        raise AdapterError(
            f"{where}: A is {a.shape} and B is {b.shape}, expected rank {terms} as {config.path.name} says: "
            f"({terms}, n_in) and (n_out, {terms})"
        )
    return LowRank(a, b, lora_scaling(config, module, rank))
