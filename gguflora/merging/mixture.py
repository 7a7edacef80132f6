"""Choose the type of every tensor of a file as llama-quantize does: the mixture behind a preset.

The rules are llama.cpp's (``src/llama-quant.cpp``, MIT license): ``tensor_allows_quantization``,
``llama_tensor_get_type``, ``tensor_type_fallback`` and ``tensor_requires_imatrix``. Their order and their counters
matter, because a tensor's position among its kind decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from gguflora.errors import QuantizationError
from gguflora.files.gguf import OUTPUT, TOKEN_EMBEDDING, GgufFile, Shape
from gguflora.merging.presets import Preset
from gguflora.quants.types import GgmlType, type_named

EMBEDDINGS: Final = (TOKEN_EMBEDDING, "per_layer_token_embd.weight")
_KEPT_NAMES: Final = {"position_embd.weight", "token_types.weight"}
_KEPT: Final = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj|ssm_conv1d"
    r"|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|time_mix_(first|w[012]|v[012]|a[012]|g[12])\.weight"
    r"|time_mix_(decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)"
    r"|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Names that are never quantized: norms, gates of experts, and small or sensitive weights."""

_KINDS: Final = (
    ("attn_qkv.weight", "v"),
    ("attn_kv_b.weight", "v"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_SMALLEST: Final = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M"}
_NEED_IMATRIX: Final = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"}
FALLBACKS: Final = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
"""What llama-quantize takes if rows are no multiple of 256 (``tensor_type_fallback`` in src/llama-quant.cpp)."""

_MORE_Q5_OF_EIGHT_EXPERTS: Final = frozenset(
    ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
)


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor of the file to be quantized: its name, its shape in numpy's order, and its type."""

    name: str
    shape: Shape
    type: GgmlType


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask about a model.

    Attributes:
        architecture: GGUF's name of the architecture.
        n_layers: number of blocks.
        n_expert: number of experts, 0 if there are none.
        n_gqa: query heads for each key head of the first layer, 0 if it has no key heads.
        is_70b: whether llama.cpp calls it a 70B model, whose value weights are small.
    """

    architecture: str
    n_layers: int
    n_expert: int
    n_gqa: int
    is_70b: bool

    @classmethod
    def of(cls, file: GgufFile) -> ModelFacts:
        """Read the facts from the metadata of a model."""
        architecture = file.architecture
        n_layers, n_expert = (_first(file, f"{architecture}.{key}") for key in ("block_count", "expert_count"))
        n_head = _first(file, f"{architecture}.attention.head_count")
        n_head_kv = _first(file, f"{architecture}.attention.head_count_kv", n_head)
        is_70b = (architecture, n_layers) in {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}
        is_70b |= (architecture, n_layers) == ("llama", 80) and n_head != n_head_kv
        return cls(architecture, n_layers, n_expert, n_head // n_head_kv if n_head_kv else 0, is_70b)


def _first(file: GgufFile, key: str, default: int = 0) -> int:
    value = file.metadata.get(key, default)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else default


def mixture(
    preset: Preset, tensors: Sequence[Form], model: ModelFacts, *, has_imatrix: bool
) -> tuple[dict[str, GgmlType], dict[str, GgmlType]]:
    """Return the type of each tensor, and the types that did not fit the rows of some.

    Args:
        preset: the preset.
        tensors: all tensors in the order of the output, see `in_order`.
        model: facts about the model.
        has_imatrix: whether there is an importance matrix.

    Raises:
        QuantizationError: if a rule cannot be applied.
    """
    rules = _Rules(preset, model, has_imatrix, tensors)
    wanted = {tensor.name: rules.type_of(tensor) if is_quantized(tensor) else tensor.type for tensor in tensors}
    return wanted, rules.misfits


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of tensors as llama-quantize writes them: by layer, then by name."""
    return sorted(names, key=lambda name: (-1 if (layer := _block_of(name)) is None else layer, name.encode()))


def _block_of(name: str) -> int | None:
    """Return the number of a tensor's block; llama-quantize sees none in names that begin with ``enc.`` or ``dec.``."""
    match = re.match(r"blk\.(\d{1,6})", name)
    return int(match[1]) if match else None


def is_quantized(tensor: Form) -> bool:
    """Whether llama-quantize quantizes a tensor: a matrix or stack of matrices that no rule exempts."""
    name = tensor.name
    return (
        len(ggml_shape(tensor.shape)) > 1
        and name.endswith("weight")
        and name not in _KEPT_NAMES
        and not _KEPT.search(name)
    )


def needs_imatrix(name: str, kind: GgmlType, preset: Preset) -> bool:
    """Whether llama-quantize refuses to write a tensor without an importance matrix for it."""
    if name == OUTPUT or name in EMBEDDINGS:
        return kind.needs_imatrix  # ggml itself refuses these
    return kind.name in _NEED_IMATRIX or (kind.name == "Q2_K" and preset.name == "Q2_K_S")


def ggml_shape(shape: Shape) -> Shape:
    """Return a shape without leading ones, as ggml counts dimensions."""
    kept = next((index for index, size in enumerate(shape) if size != 1), len(shape) - 1)
    return shape[kept:]


@dataclass
class _Rules:
    preset: Preset
    model: ModelFacts
    has_imatrix: bool
    tensors: Sequence[Form]
    misfits: dict[str, GgmlType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.is_tied = not any(tensor.name == OUTPUT for tensor in self.tensors)
        self.n_values = sum(_kind_of(tensor.name) == "v" for tensor in self.tensors)
        self.seen = dict.fromkeys(("v", "ffn_down", "ffn_gate", "ffn_up"), 0)

    def type_of(self, tensor: Form) -> GgmlType:
        preset, name = self.preset, tensor.name
        named = preset.named_type(name)
        exempt = name == "per_layer_token_embd.weight" and named is not None
        if preset.token_embedding_type is not None and name in EMBEDDINGS and not exempt:
            return preset.token_embedding_type
        if preset.output_tensor_type is not None and name == OUTPUT:
            return preset.output_tensor_type
        if preset.main.block_weights == 1:
            return preset.main
        kind = named or (preset.main if preset.pure else type_named(self._rule(tensor)))
        return self._fitting(tensor, kind)

    def _fitting(self, tensor: Form, kind: GgmlType) -> GgmlType:
        n_in = tensor.shape[-1]
        if n_in % kind.block_weights == 0:
            return kind
        if kind.name not in FALLBACKS and kind.block_weights > 32:
            raise QuantizationError(
                f"tensor {tensor.name!r} has rows of {n_in} weights, which cannot be stored as {kind.name}; give it "
                f"another type with --tensor-type {tensor.name}=q8_0, for example"
            )
        self.misfits[tensor.name] = kind
        fallback = type_named(FALLBACKS.get(kind.name, kind.name))
        return fallback if n_in % fallback.block_weights == 0 else type_named("F16")

    def _rule(self, tensor: Form) -> str:  # noqa: PLR0911  (a table of rules)
        kind = _kind_of(tensor.name)
        if kind == "output" or (self.is_tied and kind == "embedding"):
            return self._output(tensor)
        if self.preset.name == "MXFP4_MOE":
            experts = len(ggml_shape(tensor.shape)) > 2
            if self.model.architecture == "bailingmoe3":
                experts &= kind.startswith("ffn_")
            return "MXFP4" if experts else "Q8_0"
        if kind == "embedding":
            return self._embedding()
        if self.preset.name in _SMALLEST:
            return self._smallest(kind)
        rules = {"v": self._value, "attn_output": self._attention_output, "ffn_down": self._ffn_down}
        if kind in rules:
            return rules[kind](tensor)
        if kind in {"ffn_gate", "ffn_up"}:
            return self._ffn_up(tensor, kind)
        return self._query_or_key(kind)

    def _output(self, tensor: Form) -> str:
        preset, main = self.preset, self.preset.main
        if preset.output_tensor_type is not None:
            return preset.output_tensor_type.name
        is_odd = tensor.shape[-1] % main.block_weights != 0
        if preset.name == "MXFP4_MOE" or self.model.architecture == "falcon" or is_odd:
            return "Q8_0"
        if preset.name in _SMALLEST or preset.name == "IQ3_XXS":
            return "Q5_K"
        return "Q8_0" if main.name == "Q8_0" else "Q6_K"

    def _embedding(self) -> str:
        name = self.preset.name
        if name in {"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"}:
            return "Q2_K"
        if name in {"IQ2_S", "IQ2_M", "IQ3_XXS"}:
            return "IQ3_S"
        return "Q4_K" if name in {"TQ1_0", "TQ2_0", "Q2_0"} else self.preset.main.name

    def _smallest(self, kind: str) -> str:
        """Types of the presets IQ1 and IQ2."""
        name, model = self.preset.name, self.model
        better = "IQ3_S" if name in {"IQ2_S", "IQ2_M"} else "Q2_K"
        if kind == "v":
            return "Q4_K" if model.n_gqa >= 4 or model.n_expert >= 4 else better
        if kind == "k" and model.n_expert == 8:
            return "Q4_K"
        if kind == "ffn_down":
            self.seen[kind] += 1
            return better if self.seen[kind] - 1 < model.n_layers // 8 else self.preset.main.name
        if kind == "attn_output":
            if model.n_expert == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(
                name, self.preset.main.name
            )
        return self.preset.main.name

    def _value(self, tensor: Form) -> str:
        number = self.seen["v"]
        self.seen["v"] += 1
        if self.model.n_expert == 8:
            return "Q8_0"
        kind = self._value_of_dense(number)
        return "Q5_K" if self.model.is_70b and kind in {"Q3_K", "Q4_K"} else kind

    def _value_of_dense(self, number: int) -> str:  # noqa: PLR0911  (a table of rules)
        name, main, shares = self.preset.name, self.preset.main.name, self.model.n_gqa >= 4
        if name == "Q2_K":
            return "Q4_K" if shares else "Q3_K"
        if name == "IQ3_XXS" and not shares:
            return "IQ3_XXS" if self.has_imatrix else "IQ3_S"
        if name == "IQ3_M" or (shares and name in {"Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"}):
            return "Q4_K"
        if name == "Q3_K_M":
            return "Q5_K" if number < 2 else "Q4_K"
        if name == "Q3_K_L" or (shares and name in {"IQ4_NL", "IQ4_XS"}):
            return "Q5_K"
        if name in {"Q4_K_M", "Q5_K_M"} and _has_more_bits(number, self.n_values):
            return "Q6_K"
        return "Q5_K" if name == "Q4_K_S" and number < 4 else main

    def _query_or_key(self, kind: str) -> str:
        if kind == "k" and self.model.n_expert == 8:
            return "Q8_0"
        if kind in {"q", "k"}:
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.preset.name, self.preset.main.name)
        return self.preset.main.name

    def _attention_output(self, tensor: Form) -> str:
        name, main = self.preset.name, self.preset.main.name
        if self.model.architecture == "falcon":
            return "Q4_K" if name == "Q3_K_L" else main
        if self.model.n_expert == 8:
            return "Q5_K" if name in _MORE_Q5_OF_EIGHT_EXPERTS else main
        return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(name, main)

    def _ffn_down(self, tensor: Form) -> str:  # noqa: PLR0911  (a table of rules)
        layer, n = self._layer(tensor, "ffn_down"), self.model.n_layers
        name, main, is_falcon = self.preset.name, self.preset.main.name, self.model.architecture == "falcon"
        more, early = _has_more_bits(layer, n), layer < n // 8
        if name == "Q4_K_M" and is_falcon:
            return "Q6_K" if layer < n // 16 else "Q5_K" if more else main
        if name == "Q3_K_M":
            return "Q5_K" if layer < n // 16 else "Q4_K" if not is_falcon or more else main
        if name == "IQ3_XXS" and not self.has_imatrix:
            return "Q4_K" if early else "Q3_K"
        if name == "IQ3_M" and (early or (self.model.n_expert == 8 and more)):
            return "Q4_K"
        if name in {"Q4_K_M", "Q5_K_M"} and more:
            return "Q6_K"
        if name in {"Q2_K", "Q3_K_L"}:
            return "Q3_K" if name == "Q2_K" else "Q4_K" if is_falcon else "Q5_K"
        return self._early_ffn_down() if early else main

    def _early_ffn_down(self) -> str:
        name, main = self.preset.name, self.preset.main.name
        if name == "Q2_K_S":
            return "Q4_K"
        if name in {"IQ4_NL", "IQ4_XS"}:
            return main if self.has_imatrix else "Q5_K"
        if name == "Q4_K_S":
            return main if self.model.architecture == "falcon" else "Q5_K"
        if name in {"Q4_0", "Q5_0"} and self.has_imatrix:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
        return main

    def _ffn_up(self, tensor: Form, kind: str) -> str:
        layer, n = self._layer(tensor, kind), self.model.n_layers
        is_inner = n // 8 <= layer < 7 * n // 8
        return "IQ3_XXS" if self.preset.name == "IQ3_XS" and is_inner else self.preset.main.name

    def _layer(self, tensor: Form, kind: str) -> int:
        """Return the layer: how many of the kind came before; with experts, the number in the name."""
        number = self.seen[kind]
        self.seen[kind] += 1
        if self.model.n_expert <= 1:
            return number
        layer = _block_of(tensor.name)
        if layer is None or layer >= self.model.n_layers:
            raise QuantizationError(
                f"tensor {tensor.name!r} belongs to none of the {self.model.n_layers} layers of the model, so preset "
                f"{self.preset.name} has no type for it; give it one with --tensor-type"
            )
        return layer


def _kind_of(name: str) -> str:
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((kind for part, kind in _KINDS if part in name), "other")


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's ``use_more_bits``: the first and last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
