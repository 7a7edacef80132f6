"""The presets of llama-quantize: a name such as ``Q4_K_M``, the number in ``general.file_type``, and the main type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gguflora.errors import QuantizationError
from gguflora.quants.types import GgmlType, type_named

TensorTypes = Mapping[str, str] | Sequence[tuple[str, str]]

_PRESETS: Final = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "Q4_0": (2, "Q4_0"),
    "Q4_1": (3, "Q4_1"),
    "Q8_0": (7, "Q8_0"),
    "Q5_0": (8, "Q5_0"),
    "Q5_1": (9, "Q5_1"),
    "Q2_K": (10, "Q2_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q6_K": (18, "Q6_K"),
    "IQ2_XXS": (19, "IQ2_XXS"),
    "IQ2_XS": (20, "IQ2_XS"),
    "Q2_K_S": (21, "Q2_K"),
    "IQ3_XS": (22, "IQ3_S"),
    "IQ3_XXS": (23, "IQ3_XXS"),
    "IQ1_S": (24, "IQ1_S"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ3_S": (26, "IQ3_S"),
    "IQ3_M": (27, "IQ3_S"),
    "IQ2_S": (28, "IQ2_XS"),
    "IQ2_M": (29, "IQ2_S"),
    "IQ4_XS": (30, "IQ4_XS"),
    "IQ1_M": (31, "IQ1_M"),
    "BF16": (32, "BF16"),
    "TQ1_0": (36, "TQ1_0"),
    "TQ2_0": (37, "TQ2_0"),
    "MXFP4_MOE": (38, "MXFP4"),
    "Q1_0": (40, "Q1_0"),
    "Q2_0": (41, "Q2_0"),
}
"""Number and main type of each preset (llama.cpp's ``include/llama.h`` and ``llama_ftype_get_default_type``)."""

_ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset and the user's exceptions from it.

    Attributes:
        name: llama-quantize's name in capitals.
        file_type: the number in ``general.file_type``.
        main: the type of tensors for which no rule names another.
        tensor_types: types by regular expressions that are searched in the tensor's name; the first match counts.
        pure: whether all tensors get the main type.
        output_tensor_type: type of the output weight.
        token_embedding_type: type of the token embedding.
    """

    name: str
    file_type: int
    main: GgmlType
    tensor_types: tuple[tuple[re.Pattern[str], GgmlType], ...] = ()
    pure: bool = False
    output_tensor_type: GgmlType | None = None
    token_embedding_type: GgmlType | None = None

    def named_type(self, tensor: str) -> GgmlType | None:
        """Return the type that a pattern of the user gives to a tensor, or None."""
        return next((kind for pattern, kind in self.tensor_types if pattern.search(tensor)), None)


def preset_named(
    name: str,
    *,
    tensor_types: TensorTypes | None = None,
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
) -> Preset:
    """Return the preset that llama-quantize calls ``name``; case does not matter.

    Raises:
        QuantizationError: if the preset, a type or a pattern is unknown.
    """
    upper = _ALIASES.get(name.upper(), name.upper())
    if upper not in _PRESETS:
        raise QuantizationError(f"unknown preset {name!r}; known are {', '.join([*_PRESETS, *_ALIASES])}")
    number, main = _PRESETS[upper]
    pairs = tensor_types.items() if isinstance(tensor_types, Mapping) else tensor_types or ()
    return Preset(
        upper,
        number,
        type_named(main),
        tuple((_compiled(pattern), type_named(kind)) for pattern, kind in pairs),
        pure,
        None if output_tensor_type is None else type_named(output_tensor_type),
        None if token_embedding_type is None else type_named(token_embedding_type),
    )


def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern in small letters, as llama-quantize does."""
    try:
        return re.compile(pattern.lower())
    except re.error as error:
        raise QuantizationError(
            f"--tensor-type: {pattern!r} is not a regular expression: {error}; llama-quantize searches it in the names "
            "of tensors, for example attn_v=q8_0"
        ) from error
