"""Map the weights of a Hugging Face model to GGUF tensors: their names, rows and the order of the rows.

`names` maps the names, by gguf's ``TensorNameMap``. `rules` states what else llama.cpp's converter does for each
architecture: it reorders rows (`orders`) and splits weights into several tensors (`splits`). `lora_support` lists the
tensors to which llama.cpp cannot apply a LoRA.
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
)
from gguflora.architectures.rules import KNOWN
from gguflora.architectures.tensor_slice import TensorSlice
from gguflora.architectures.unruled import doubt_about, unknown_warning

__all__ = [
    "KNOWN",
    "TensorSlice",
    "aborts_at_run_time",
    "adaptable_weights",
    "can_untie",
    "check_known",
    "cut_positions",
    "decay_of",
    "doubt_about",
    "ignored_at_run_time",
    "is_conv1d",
    "is_cut",
    "is_transposed_expert",
    "key_order",
    "slices_of",
    "unknown_warning",
    "with_biases",
]
