"""What a run will do, and what it did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict


class CurveRow(TypedDict):
    """One step: its loss in nats a trained token, the held-out loss if it was evaluated, and its learning rate."""

    step: int
    loss: float
    valid_loss: float | None
    lr: float


@dataclass(frozen=True, slots=True)
class RankRow:
    """What a rank would cost.

    Attributes:
        rank: rank of the factors.
        parameters: trained numbers.
        memory: estimated bytes, mapped file included.
        seconds: estimated, of the whole run.
    """

    rank: int
    parameters: int
    memory: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a run will do.

    Attributes:
        method: ``lora``, ``dora`` or ``prompt``.
        modules: adapted layers.
        parameters: trained numbers.
        samples: to learn.
        valid_samples: held out.
        tokens: of one epoch.
        trained_tokens: those of them that are learned.
        length: longest sample.
        cut: sources of samples without their end.
        dropped: sources of samples that have nothing left to learn.
        steps: number of optimizer steps in the run.
        steps_per_epoch: of one epoch.
        eval_every: steps between evaluations.
        seconds_per_step: measured on one real step; 0 if it was not.
        recompute: whether blocks are computed again for the backward pass.
        micro_positions: positions computed at once, at most.
        memory: estimated bytes, mapped file included.
        precision: type in which products are computed.
        self_check: nats between torch's predictions and llama.cpp's; None if it was not measured.
        example: one sample as text, learned parts in ``[[..]]``.
        ranks: what other ranks would cost.
        notes: what the user should know.
        padding: share of the computed positions that hold no token, in one epoch.
        kept_blocks: lowest blocks whose output is computed once and kept; 0 if none is.
        kept_bytes: size of the file that it is kept in.
        kept_seconds: estimated, to compute it.
    """

    method: str
    modules: int
    parameters: int
    samples: int
    valid_samples: int
    tokens: int
    trained_tokens: int
    length: int
    cut: tuple[str, ...]
    dropped: tuple[str, ...]
    steps: int
    steps_per_epoch: int
    eval_every: int
    seconds_per_step: float
    recompute: bool
    micro_positions: int
    memory: int
    precision: str
    self_check: float | None
    example: str
    ranks: tuple[RankRow, ...]
    notes: tuple[str, ...] = ()
    padding: float = 0.0
    kept_blocks: int = 0
    kept_bytes: int = 0
    kept_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Estimated, of all steps and what they need."""
        return self.steps * self.seconds_per_step + self.kept_seconds


@dataclass(frozen=True, slots=True)
class StepDone:
    """What a watcher is told after each step.

    Attributes:
        step: steps done.
        steps: number of optimizer steps in the run.
        loss: loss of the step, in nats per learned token.
        valid_loss: if it was evaluated.
        lr: learning rate.
        tokens_per_second: positions of samples, while computing.
        seconds_left: estimated.
    """

    step: int
    steps: int
    loss: float
    valid_loss: float | None
    lr: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """The answers to one ``--sample`` prompt."""

    prompt: str
    base: str
    trained: str


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """What a merge would keep: the held-out loss of the merged model, and the share of the gain that it has."""

    valid_loss: float
    kept: float


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What `train` did, or with ``dry_run`` would do.

    Attributes:
        output: the PEFT directory.
        lora: the GGUF LoRA; None of methods that have none.
        base: the base model.
        method: ``lora``, ``dora`` or ``prompt``.
        plan: what was to be done.
        base_valid_loss: the base's loss on held-out samples, in nats per learned token; None without such samples.
        valid_loss: the same of what was written.
        steps: done.
        best_step: whose factors were written.
        stopped: why it ended: ``done``, ``early stop`` or ``time``.
        trained_tokens: learned tokens seen in all steps.
        seconds: of computing.
        peak_memory: most bytes of memory at once, mapped files included.
        curve: a row for each step.
        scales: held-out loss at other scales of the adapter.
        samples: answers to sample prompts.
        merge: what a merge would keep.
        warnings: what the user should know.
        dry_run: True if nothing was trained.
    """

    output: Path
    lora: Path | None
    base: Path
    method: str
    plan: TrainPlan
    base_valid_loss: float | None
    valid_loss: float | None
    steps: int
    best_step: int
    stopped: str
    trained_tokens: int
    seconds: float
    peak_memory: int
    curve: tuple[CurveRow, ...] = ()
    scales: dict[str, float] = field(default_factory=dict)
    samples: tuple[SampleAnswer, ...] = ()
    merge: MergeCheck | None = None
    warnings: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def perplexity(self) -> float | None:
        """Loss of the held-out samples with the written adapter."""
        return None if self.valid_loss is None else math.exp(self.valid_loss)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        fields = asdict(self)
        lora = None if self.lora is None else str(self.lora)
        return {**fields, "output": str(self.output), "base": str(self.base), "lora": lora}
