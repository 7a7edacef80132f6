"""Read soft prompts: learned numbers that precede the first token. They change no weights and apply only at run time.

Some methods learn virtual tokens, which are embeddings (n_virtual, n_embd):

* PROMPT_TUNING (https://arxiv.org/abs/2104.08691) and CPT (https://arxiv.org/abs/2410.17222) store the embeddings.
* P_TUNING (https://arxiv.org/abs/2103.10385) computes them with an encoder; PEFT stores the encoder's output.
* MULTITASK_PROMPT_TUNING (https://arxiv.org/abs/2303.02861) shares them among tasks: task t has ``shared * (cols[t] @
  rows[t])``, elementwise, with cols (n_tasks, n_virtual, rank) and rows (n_tasks, rank, n_embd).

Others learn keys and values (n_virtual, n_layers * 2 * n_kv): for each layer the keys and then the values of all heads.

* PREFIX_TUNING (https://arxiv.org/abs/2101.00190), with or without projection: PEFT stores the projection's output.
* CARTRIDGE (https://arxiv.org/abs/2506.06266).

They are stored as attention finds them in the KV cache, so the keys are already rotated.

Source: ``_get_adapter_state_dict`` and ``get_prompt`` of PEFT 0.21.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gguflora.adapters.peft.config import FILE_NAME, PeftConfig, read_config
from gguflora.errors import AdapterError, UnsupportedAdapterError
from gguflora.files.safetensors import Array, as_float32, is_float, read_weights

MULTITASK: Final = "MULTITASK_PROMPT_TUNING"
VIRTUAL_TOKENS: Final = frozenset({"PROMPT_TUNING", "P_TUNING", MULTITASK, "CPT"})
KEYS_AND_VALUES: Final = frozenset({"PREFIX_TUNING", "CARTRIDGE"})

_ROWS: Final = "prompt_embeddings"
_COLS_OF_TASKS: Final = "prefix_task_cols"
_ROWS_OF_TASKS: Final = "prefix_task_rows"


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """A soft prompt, read but not yet fitted to a base model.

    Attributes:
        name: name of its directory.
        path: path of the file with the numbers.
        sha256: SHA-256 of the method, the task and that file, in hexadecimal.
        method: ``peft_type`` of the configuration.
        values: float32 array with a row for each virtual token: its embedding, or its keys and values of all layers.
    """

    name: str
    path: Path
    sha256: str
    method: str
    values: NDArray[np.float32]

    @property
    def n_virtual(self) -> int:
        """Number of virtual tokens."""
        return len(self.values)

    @property
    def is_keys_and_values(self) -> bool:
        """Whether the rows hold keys and values of all layers instead of embeddings."""
        return self.method in KEYS_AND_VALUES


def is_soft_prompt(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a PEFT directory with a soft prompt.

    Raises:
        AdapterError: if its ``adapter_config.json`` is invalid.
    """
    folder = Path(path)
    return (folder / FILE_NAME).is_file() and read_config(folder).peft_type in VIRTUAL_TOKENS | KEYS_AND_VALUES


def read_soft_prompt(path: str | os.PathLike[str], task: int | None = None) -> SoftPrompt:
    """Read a soft prompt from a PEFT directory.

    Args:
        path: the directory.
        task: number of the task for MULTITASK_PROMPT_TUNING; may be omitted if there is only one.

    Raises:
        AdapterError: if the directory is invalid, or there is no such task.
        UnsupportedAdapterError: if it does not hold a soft prompt, or one for a model with an encoder.
        FormatError: if its numbers cannot be read.
    """
    folder = Path(path)
    config = read_config(folder)
    if config.peft_type not in VIRTUAL_TOKENS | KEYS_AND_VALUES:
        raise UnsupportedAdapterError(
            f"{config.path}: peft_type {config.peft_type} is not a soft prompt; expected one of "
            + ", ".join(sorted(VIRTUAL_TOKENS | KEYS_AND_VALUES))
        )
    if config.fields.get("task_type") == "SEQ_2_SEQ_LM" or config.integer_or_none("num_transformer_submodules") == 2:
        raise UnsupportedAdapterError(
            f"{config.path}: {config.peft_type} was trained for a model with an encoder and a decoder; only decoders "
            "are supported"
        )
    file, tensors = read_weights(folder, "adapter_model")
    values = _values(config, file, tensors, task)
    digest = hashlib.sha256(f"{config.peft_type} {task or 0} ".encode() + file.read_bytes())
    return SoftPrompt(folder.resolve().name, file, digest.hexdigest(), config.peft_type, values)


def first_task(path: str | os.PathLike[str]) -> int | None:
    """Return 0 if a soft prompt has tasks, else None. The shape of a soft prompt does not depend on the task."""
    return 0 if read_config(Path(path)).peft_type == MULTITASK else None


def _values(config: PeftConfig, file: Path, tensors: Mapping[str, Array], task: int | None) -> NDArray[np.float32]:
    names = {_ROWS, _COLS_OF_TASKS, _ROWS_OF_TASKS} if config.peft_type == MULTITASK else {_ROWS}
    if set(tensors) != names:
        raise AdapterError(f"{file}: holds {sorted(tensors)[:8]}, expected {sorted(names)} of {config.peft_type}")
    values = _checked(file, _ROWS, tensors[_ROWS], 2)
    expected = config.integer("num_virtual_tokens", len(values), minimum=1)
    if len(values) != expected:
        raise AdapterError(f"{file}: {_ROWS!r} has shape {values.shape}, expected {expected} rows (num_virtual_tokens)")
    if config.peft_type == MULTITASK:
        return _select_task(file, values, tensors, task)
    if task is not None:
        raise AdapterError(f"{config.path}: task {task} was requested, but {config.peft_type} has no tasks")
    return values


def _select_task(
    file: Path, shared: NDArray[np.float32], tensors: Mapping[str, Array], task: int | None
) -> NDArray[np.float32]:
    cols, rows = (_checked(file, name, tensors[name], 3) for name in (_COLS_OF_TASKS, _ROWS_OF_TASKS))
    n_tasks, n_virtual, rank = cols.shape
    if rows.shape != (n_tasks, rank, shared.shape[1]) or n_virtual != len(shared):
        raise AdapterError(
            f"{file}: {_COLS_OF_TASKS!r} {cols.shape} and {_ROWS_OF_TASKS!r} {rows.shape} do not fit {_ROWS!r} "
            f"{shared.shape}"
        )
    chosen = 0 if task is None and n_tasks == 1 else task
    if chosen is None or not 0 <= chosen < n_tasks:
        raise AdapterError(
            f"{file}: has the tasks 0 to {n_tasks - 1}, but {chosen} was requested; choose one with task="
        )
    values: NDArray[np.float32] = shared * (cols[chosen] @ rows[chosen])
    return values


def _checked(file: Path, name: str, tensor: Array, n_dims: int) -> NDArray[np.float32]:
    if tensor.ndim != n_dims or not tensor.size or not is_float(tensor):
        raise AdapterError(f"{file}: {name!r} is {tensor.dtype} {tensor.shape}, expected floats of {n_dims} dimensions")
    values = np.array(as_float32(tensor))
    if not np.isfinite(values).all():
        raise AdapterError(f"{file}: tensor {name!r} holds NaN or infinity; its training has diverged")
    return values
