"""What a run needs to go on: one file with the factors, the optimizer's moments, the best factors and the curve.

It is replaced as a whole, so that a run that is killed, or whose disk is full, still has the one before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from gguflora.errors import TrainingError
from gguflora.files.atomic import atomic_output
from gguflora.files.output_rule import check_regular
from gguflora.files.strict_json import restored, to_json

STATE: Final = "state.safetensors"
_META: Final = "gguflora.training"


@dataclass(slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        trained_tokens: learned tokens so far.
        seconds: of steps so far.
        prepared: seconds that hidden states below the lowest adapted block took.
        base_valid_loss: held-out loss of the base.
        best_step: step with the best evaluation; -1 before the first.
        best_loss: its held-out loss.
        misses: evaluations since, none of them better.
        curve: a row for each step: ``step``, ``loss``, ``valid_loss``, ``lr``.
    """

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    prepared: float = 0.0
    base_valid_loss: float | None = None
    best_step: int = -1
    best_loss: float | None = None
    misses: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Checkpoint:
    """The state of a run.

    Attributes:
        settings: what the run was started with; must be the same when it goes on.
        progress: how far it is.
        factors: trained numbers by name.
        moments: of AdamW: ``<name>.exp_avg`` and ``<name>.exp_avg_sq``.
        best: factors of the best evaluation; none before the first.
    """

    settings: dict[str, Any]
    progress: Progress
    factors: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, in place of the one before.

    Raises:
        OutputError: if it cannot be written; then the one before is still there.
    """
    from safetensors.torch import save  # noqa: PLC0415

    parts = {"factors": checkpoint.factors, "moments": checkpoint.moments, "best": checkpoint.best}
    tensors = {f"{part}/{name}": value.contiguous() for part, group in parts.items() for name, value in group.items()}
    meta = {"settings": checkpoint.settings, "progress": asdict(checkpoint.progress)}
    content = save(tensors, {_META: to_json(meta)})
    check_regular(folder)
    folder.mkdir(exist_ok=True)
    try:
        with atomic_output(folder / STATE) as file:
            file.write(content)
    except BaseException:
        with suppress(OSError):  # it holds the checkpoint before
            folder.rmdir()
        raise


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of a run that was interrupted.

    Raises:
        TrainingError: if there is none, it cannot be read, or it was made with other settings.
        OutputError: if it is a link, a device or a FIFO.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    path = folder / STATE
    for each in (folder, path):
        check_regular(each)
    if not path.exists():
        raise TrainingError(f"{path}: does not exist; there is no run to resume, start it without --resume")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**restored(meta["progress"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: cannot be resumed: {error}") from error
    _check_same(path, meta["settings"], json.loads(to_json(dict(settings))))
    groups: dict[str, dict[str, torch.Tensor]] = {"factors": {}, "moments": {}, "best": {}}
    for name, value in tensors.items():
        part, _, own = name.partition("/")
        groups[part][own] = value
    return Checkpoint(meta["settings"], progress, groups["factors"], groups["moments"], groups["best"])


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [key for key in now if now[key] != before.get(key)]
    if other:
        key = other[0]
        raise TrainingError(
            f"{path}: the run was begun with {key} {before.get(key)!r:.80}, not {now[key]!r:.80}; resume it with the "
            "same command, or start anew without --resume"
        )
