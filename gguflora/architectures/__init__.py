"""Where a Hugging Face weight lies in a GGUF file, and in which order its rows lie there.

Names come from gguf's ``TensorNameMap`` (`names`); what llama.cpp's converter does beyond renaming is stated in
`rules`, a rule a line, in terms of orders of rows (`orders`) and of weights that GGUF cuts into several tensors
(`splits`). `lora_support` knows what llama.cpp does not multiply with a LoRA.
"""

from gguflora.architectures.biases import with_biases
from gguflora.architectures.lora_support import aborts_at_run_time, ignored_at_run_time
from gguflora.architectures.mapping import (
    adaptable_weights,
    can_untie,
    check_known,
    cut_positions,
    decay_of,
    is_conv1d,
    is_cut,
    is_transposed_expert,
    key_order,
    slices_of,
    unknown_warning,
)
from gguflora.architectures.rules import KNOWN
from gguflora.architectures.tensor_slice import TensorSlice

__all__ = [
    "KNOWN",
    "TensorSlice",
    "aborts_at_run_time",
    "adaptable_weights",
    "can_untie",
    "check_known",
    "cut_positions",
    "decay_of",
    "ignored_at_run_time",
    "is_conv1d",
    "is_cut",
    "is_transposed_expert",
    "key_order",
    "slices_of",
    "unknown_warning",
    "with_biases",
]
