"""The plan of a training run: what it takes, from one real step, and how it is cut into batches."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from gguflora.system.memory import read_bytes
from gguflora.training.batches import Batches, MicroBatch
from gguflora.training.data import TrainingData
from gguflora.training.evaluation import Evaluator, self_check
from gguflora.training.kept import FILE, KeptStates
from gguflora.training.loss import backward_loss
from gguflora.training.memory import MemoryPlan, needed_bytes, plan_memory, total_bytes
from gguflora.training.model import Below
from gguflora.training.options import TrainOptions
from gguflora.training.outputs import Trainables
from gguflora.training.report import RankRow, TrainPlan

_RANKS: Final = (4, 8, 16, 32, 64, 128)
_FEW: Final = 8
_EVALUATIONS: Final = 10


class Planner:
    """Plans one run.

    Args:
        trained: the model and what is trained in it.
        data: the samples.
        options: how to train.
        state: the folder of what a run needs to go on.
        evaluator: knows the model without its factors.

    Attributes:
        batches: the samples in batches, once `plan` has chosen their size.
        kept: the states below the adapted blocks, if it pays to keep them.
    """

    def __init__(
        self, trained: Trainables, data: TrainingData, options: TrainOptions, state: Path, evaluator: Evaluator
    ) -> None:
        self._trained, self._data, self._options, self._state = trained, data, options, state
        self._evaluator = evaluator
        self.batches: Batches
        self.kept: KeptStates | None = None
        self._more_notes: list[str] = []
        self._n_parameters = sum(parameter.numel() for parameter in trained.named().values())

    def plan(self, planned: dict[str, Any]) -> TrainPlan:
        """The plan, with one real step measured; of a run that goes on, the plan it began with."""
        options, model, samples = self._options, self._trained.model, self._data.learned.samples
        with self._evaluator.without_factors():
            divergence = self_check(model, self._data.held or samples, torch.get_num_threads())
        asked = None if options.memory is None else read_bytes(options.memory)
        memory = plan_memory(model, self._n_parameters, self._data.longest, options.batch, asked)
        if planned:
            memory = replace(memory, recompute=planned["recompute"], positions=planned["micro_positions"])
        model.recompute(memory.recompute)
        packs = model.can_pack and self._trained.prompt is None
        self.batches = Batches(samples, options.batch, options.seed, memory.positions, options.accumulate, packs=packs)
        seconds, steps, kept_seconds = self._times(planned)
        every = planned.get("eval_every") or options.eval_every or -(-steps // _EVALUATIONS)
        return TrainPlan(
            method=self._trained.method,
            modules=len(self._trained.layers) or 1,
            parameters=self._n_parameters,
            samples=len(samples),
            valid_samples=len(self._data.held),
            tokens=sum(len(sample.tokens) for sample in samples),
            trained_tokens=sum(sample.n_trained for sample in samples),
            length=self._data.longest,
            cut=self._data.learned.cut,
            dropped=self._data.learned.dropped,
            steps=steps,
            steps_per_epoch=self.batches.steps_per_epoch,
            eval_every=every,
            seconds_per_step=seconds,
            recompute=memory.recompute,
            micro_positions=memory.positions,
            memory=memory.total,
            precision=options.dtype,
            self_check=divergence,
            example=self._data.example,
            ranks=self._ranks(memory, seconds * steps + kept_seconds),
            notes=self._notes(),
            padding=self._padding(),
            kept_blocks=0 if self.kept is None else self.kept.first,
            kept_bytes=0 if self.kept is None else self.kept.n_bytes,
            kept_seconds=kept_seconds,
        )

    def _times(self, planned: dict[str, Any]) -> tuple[float, int, float]:
        """Seconds of a step, number of steps, and seconds to compute the states that are kept, if they are worth it."""
        if planned:
            if planned["kept_blocks"]:
                self.kept = self._states(planned["kept_blocks"])
            return planned["seconds_per_step"], planned["steps"], planned["kept_seconds"]
        micro = self.batches.step(0)[-1]
        per_step = self._positions() / self.batches.steps_per_epoch / micro.tokens.numel()
        seconds = self._measure(micro) * per_step
        steps = self._steps(seconds)
        states = self._states(min(map(self._trained.model.block_of, self._trained.layers), default=0))
        if steps <= self.batches.steps_per_epoch or not states.first or not self._has_room(states.n_bytes):
            return seconds, steps, 0.0
        self.kept, started = states, time.monotonic()
        below = self._trained.model.states_below(states.first, micro.tokens, micro.positions)
        kept_seconds = (time.monotonic() - started) * per_step * self.batches.steps_per_epoch
        seconds = self._measure(micro, Below(states.first, below)) * per_step
        return seconds, self._steps(seconds, kept_seconds), kept_seconds

    def _states(self, first: int) -> KeptStates:
        return KeptStates(self._trained.model, self._data.learned.samples, first, self._state / FILE)

    def _has_room(self, n_bytes: int) -> bool:
        """Whether the disk holds a file and as much again for outputs; else the plan says so."""
        folder = next(each for each in self._state.absolute().parents if each.exists())
        free = shutil.disk_usage(folder).free
        if free < 2 * n_bytes:
            self._more_notes.append(
                f"{folder}: has {free / 1e6:.0f} MB free; with {2 * n_bytes / 1e6:.0f} MB the output of the blocks "
                "below the adapted ones would be kept, and steps would be faster"
            )
        return free >= 2 * n_bytes

    def _steps(self, seconds: float, before: float = 0.0) -> int:
        options = self._options
        if options.steps is not None:
            return options.steps
        if options.hours is not None:
            return max(1, int((options.hours * 3600 - before) / seconds))
        return max(1, math.ceil(options.epochs * self.batches.steps_per_epoch))

    def _measure(self, micro: MicroBatch, below: Below | None = None) -> float:
        """Seconds of one real micro-batch forwards and backwards."""
        prompt = None if self._trained.prompt is None else self._trained.prompt.rows
        started = time.monotonic()
        backward_loss(
            self._trained.model,
            micro.tokens,
            micro.trained,
            1,
            prompt=prompt,
            positions=micro.positions,
            below=below,
        )
        seconds = time.monotonic() - started
        for parameter in self._trained.named().values():
            parameter.grad = None
        return seconds

    def _positions(self) -> int:
        """Positions that the first epoch computes, padding included."""
        steps = range(self.batches.steps_per_epoch)
        return sum(micro.tokens.numel() for step in steps for micro in self.batches.step(step))

    def _padding(self) -> float:
        return 1 - sum(len(sample.tokens) for sample in self._data.learned.samples) / self._positions()

    def _ranks(self, memory: MemoryPlan, seconds: float) -> tuple[RankRow, ...]:
        """What other ranks would cost: products with factors beside those with the weights."""
        model, longest = self._trained.model, self._data.longest
        if self._trained.shape is None:
            return ()
        sizes = [size for layer in self._trained.layers.values() for size in layer.sizes]
        widths, weights = sum(n_out + n_in for n_out, n_in in sizes), sum(n_out * n_in for n_out, n_in in sizes)
        own = weights * 2 + 3 * widths * self._trained.shape.rank
        found = []
        for rank in sorted({*_RANKS, self._trained.shape.rank}):
            at_once = min(memory.positions, self._options.batch * longest)
            needed = needed_bytes(model, rank * widths, at_once, longest, recompute=memory.recompute)
            share = (weights * 2 + 3 * widths * rank) / own
            found.append(RankRow(rank, rank * widths, total_bytes(model, rank * widths, needed), seconds * share))
        return tuple(found)

    def _notes(self) -> tuple[str, ...]:
        notes = list(self._more_notes)
        learned = self._data.learned
        if learned.dropped:
            notes.append(
                f"{len(learned.dropped)} samples are left out: no token to learn is left within {self._data.longest} "
                f"tokens ({', '.join(learned.dropped[:_FEW])})"
            )
        if learned.cut:
            notes.append(f"{len(learned.cut)} samples are cut at their end ({', '.join(learned.cut[:_FEW])})")
        if self._trained.method == "dora":
            notes.append("DoRA is evaluated in torch: llama.cpp cannot apply it; merge it, or convert it with --rank")
        if not self._data.held:
            notes.append("nothing is held out: the last factors are written, not the best")
        return tuple(notes)
