"""Write trained factors: a PEFT directory, and the GGUF LoRA of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gguflora.adapters.adapter import read_adapter
from gguflora.adapters.peft.config import FILE_NAME
from gguflora.adapters.peft.keys import PREFIX
from gguflora.architectures.base_model import BaseModel
from gguflora.errors import OutputError
from gguflora.files.atomic import atomic_folder, atomic_output
from gguflora.files.output_checks import ADAPTER_WEIGHTS, check_folder_target, check_target
from gguflora.files.safetensors import Array
from gguflora.files.strict_json import to_json
from gguflora.lora.factors import factor_adapter
from gguflora.lora.gguf_writer import LoraHeader, common_alpha, encode_factors, write_lora
from gguflora.lora.peft_writer import write_peft_directory
from gguflora.system.nameless import path_of
from gguflora.training.adapters import LoraExperts, LoraLayer, SoftPromptRows
from gguflora.training.model import PackedModel
from gguflora.training.options import LoraShape

RECORD: Final = "training.json"
"""File of a written directory that says how it was trained."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run writes.

    Attributes:
        folder: the PEFT directory.
        lora: the GGUF LoRA beside it.
        state: directory of what the run needs to go on.
    """

    folder: Path
    lora: Path
    state: Path

    @classmethod
    def from_name(cls, out: Path) -> Outputs:
        """The outputs of ``-o NAME``.

        Raises:
            OutputError: if it is no name.
        """
        if not out.name.removesuffix(".gguf").strip("."):
            raise OutputError(
                f"{out}: is no name; with '-o merry' the directory merry and the file merry.gguf are written"
            )
        folder = out.with_name(out.name.removesuffix(".gguf"))
        return cls(folder, folder.with_name(f"{folder.name}.gguf"), folder.with_name(f"{folder.name}.training"))

    def check(self, inputs: list[Path], *, force: bool) -> None:
        """Check, before any work, that both can be written.

        Raises:
            OutputError: if they cannot.
        """
        check_folder_target(self.folder, inputs, marker=FILE_NAME, force=force)
        check_target(self.lora, inputs, force=force, size=0)


@dataclass(frozen=True, slots=True, eq=False)
class Trainables:
    """What is trained: LoRA layers, or a soft prompt.

    Attributes:
        model: the model that they lie in.
        layers: by module name.
        shape: rank, alpha and method of the LoRA layers.
        prompt: the soft prompt.
    """

    model: PackedModel
    layers: Mapping[str, LoraLayer]
    shape: LoraShape | None
    prompt: SoftPromptRows | None = None

    @property
    def is_servable(self) -> bool:
        """Whether llama.cpp can apply them without a merge."""
        return self.prompt is not None or not (self.shape and self.shape.dora)

    @property
    def method(self) -> str:
        """``lora``, ``dora`` or ``prompt``."""
        return "prompt" if self.prompt is not None else "dora" if self.shape and self.shape.dora else "lora"

    def named(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name."""
        if self.prompt is not None:
            return {"prompt_embeddings": self.prompt.rows}
        return {
            f"{PREFIX}{name}.{own}": parameter
            for name, layer in self.layers.items()
            for own, parameter in layer.parameters_by_name().items()
        }

    def set_dropout(self, on: bool) -> None:
        """Switch dropout on for a step of training, off for everything else."""
        for layer in self.layers.values():
            layer.drops = on and layer.shape.dropout > 0

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the parameters these values."""
        with torch.no_grad():
            for name, parameter in self.named().items():
                parameter.copy_(values[name])

    def tensors(self, values: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """The tensors of a PEFT directory; of OLoRA and PiSSA with their start taken off (rank 2r)."""
        found = {name: value.detach().numpy() for name, value in values.items()}
        for name, layer in self.layers.items():
            if layer.start is not None:
                a, b = (part.numpy() for part in layer.start)
                key_a, key_b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"
                found[key_a] = np.concatenate([found[key_a], a])
                found[key_b] = np.concatenate([found[key_b], -b], axis=1)
        return {name: np.ascontiguousarray(value) for name, value in found.items()}

    def config(self) -> dict[str, Any]:
        """The configuration of the PEFT directory."""
        base = self.model.packed.base
        if self.prompt is not None:
            return _prompt_config(self.model, len(self.prompt.rows))
        assert self.shape is not None
        shape, doubled = self.shape, any(layer.start is not None for layer in self.layers.values())
        rank = 2 * shape.rank if doubled else shape.rank
        alpha = shape.scaling * rank if doubled else shape.alpha
        experts = [name for name, layer in self.layers.items() if isinstance(layer, LoraExperts)]
        parameters = [f"{name}.{stack}" for name in experts for stack in ("gate_up_proj", "down_proj")]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": shape.dropout,
            "target_modules": [name for name in self.layers if name not in experts],
            **({"target_parameters": parameters} if parameters else {}),
            "bias": "none",
            "fan_in_fan_out": base.architecture == "gpt2",  # whose layers hold their weights transposed
            "use_rslora": shape.rslora and not doubled,
            "use_dora": shape.dora,
            "init_lora_weights": True,
        }


def _prompt_config(model: PackedModel, n_virtual: int) -> dict[str, Any]:
    config = model.config
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": n_virtual,
        "token_dim": int(config.hidden_size),
        "num_transformer_submodules": 1,
        "num_attention_heads": int(config.num_attention_heads),
        "num_layers": int(config.num_hidden_layers),
        "prompt_tuning_init": "RANDOM",
    }


def write_folder(
    folder: Path, trained: Trainables, values: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> None:
    """Write the PEFT directory into an existing folder, with ``training.json`` beside its two files."""
    write_peft_directory(folder, trained.tensors(values), trained.config())
    (folder / RECORD).write_text(to_json(record, indent=2) + "\n", encoding="utf-8")


def write_gguf(path: Path, folder: Path, name: str, base: BaseModel, record: Mapping[str, Any]) -> None:
    """Write the GGUF LoRA of a PEFT directory.

    Args:
        path: where the file lies.
        folder: the directory.
        name: the adapter's name.
        base: the base model.
        record: how it was trained, for the metadata ``gguflora.training.*``.
    """
    adapter = read_adapter(folder)
    factored = factor_adapter(adapter, base, None, None)
    alpha = common_alpha(factored)
    contents = [item for factors in factored for item in encode_factors(factors, "auto", alpha)]
    source = {f"training.{key}": _text(value) for key, value in record.items()}
    header = LoraHeader(name, base.architecture, alpha, {"source.sha256": adapter.sha256, **source})
    write_lora(path, header, contents)


def _text(value: Any) -> str:  # noqa: ANN401  (JSON)
    return value if isinstance(value, str) else to_json(value)


def publish(
    outputs: Outputs, trained: Trainables, values: Mapping[str, torch.Tensor], record: Mapping[str, Any], *, force: bool
) -> None:
    """Write what was trained: both outputs, or none.

    Raises:
        OutputError: if they cannot be written.
    """
    with atomic_folder(outputs.folder, marker=FILE_NAME, stale=ADAPTER_WEIGHTS) as folder:
        write_folder(folder, trained, values, record)
        if trained.method == "lora":
            with atomic_output(outputs.lora, force=force) as file:
                write_gguf(path_of(file), folder, outputs.folder.name, trained.model.packed.base, record)
