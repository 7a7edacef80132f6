"""PEFT methods that gguflora does not convert or merge, with the reason and an alternative."""

from __future__ import annotations

from typing import Final

_RUN: Final = "run it: gguflora.attach, gguflora run or gguflora serve put it in front of the prompt"
_PROMPT: Final = f"learns virtual tokens, not weights, so no GGUF file can hold it; {_RUN}"
_KEYS_AND_VALUES: Final = (
    f"learns keys and values that precede the prompt, not weights, so no GGUF file can hold it; {_RUN}"
)
_ROUTED: Final = "weights its parts differently for each input, so no fixed weight is equivalent"

REFUSED: Final[dict[str, str]] = {
    "ADAMSS": "its file does not hold the clustering that determines the changed rows: merge it with PEFT",
    "ADAPTION_PROMPT": "adds gated attention to learned prompts, not a change of weights: train LORA",
    "CARTRIDGE": _KEYS_AND_VALUES,
    "CPT": _PROMPT,
    "LILY": f"{_ROUTED}: train LORA",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": f"{_ROUTED}: train LORA, one adapter for each task",
    "PREFIX_TUNING": _KEYS_AND_VALUES,
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": "depends on the signs of singular vectors that its file does not hold: merge it with PEFT",
    "P_TUNING": _PROMPT,
    "SHADOW": "runs a second network in parallel to the model, so no changed weight is equivalent: train LORA",
    "XLORA": f"{_ROUTED}: convert or merge one of its LoRA adapters by itself",
}
"""By ``peft_type``: the reason and the alternative, as text that follows the method's name."""
