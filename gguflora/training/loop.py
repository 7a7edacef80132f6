"""The training loop: steps of AdamW, evaluations, the best factors, checkpoints, and how a run ends."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from gguflora.errors import TrainingError
from gguflora.training.batches import Batches, MicroBatch
from gguflora.training.checkpoints import Checkpoint, Progress, save_checkpoint
from gguflora.training.kept import KeptStates
from gguflora.training.loss import backward_loss
from gguflora.training.options import TrainOptions
from gguflora.training.outputs import Trainables
from gguflora.training.report import StepDone

_SAVE_EVERY: Final = 600.0
"""Seconds between checkpoints, at most."""

Evaluate = Callable[[dict[str, torch.Tensor], int], float]
"""The held-out loss of factors at a step, in nats."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends and what it does on the way.

    Attributes:
        steps: number of optimizer steps in the run.
        eval_every: steps between evaluations.
        deadline: seconds of computing, at most.
    """

    steps: int
    eval_every: int
    deadline: float = math.inf


class Trainer:
    """Trains factors; can stop after any step and go on from its checkpoint with the same bits.

    Args:
        trained: what is trained.
        batches: the steps.
        options: what the caller of ``train`` asked for.
        limits: when it ends.
        settings: what a run that goes on must have in common with this one.
        folder: where checkpoints are written; None to keep none.
        evaluate: the held-out loss; None without held-out samples.
        watch: told of each step.
        kept: hidden states that no step changes.
    """

    def __init__(
        self,
        trained: Trainables,
        batches: Batches,
        options: TrainOptions,
        limits: Limits,
        settings: dict[str, Any],
        folder: Path | None,
        evaluate: Evaluate | None,
        watch: Callable[[StepDone], None] = lambda _: None,
        kept: KeptStates | None = None,
    ) -> None:
        self._trained, self._batches, self._options, self._limits = trained, batches, options, limits
        self._settings, self._folder, self._evaluate, self._watch = settings, folder, evaluate, watch
        self._kept = kept
        self._named = trained.named()
        self._optimizer = torch.optim.AdamW(self._groups(), lr=options.rate, weight_decay=options.weight_decay)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self._stop = threading.Event()
        self._saved = time.monotonic()

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by their rates: B learns faster in LoRA+ (https://arxiv.org/abs/2402.12354)."""
        fast = [p for name, p in self._named.items() if name.endswith("lora_B.weight")]
        slow = [p for name, p in self._named.items() if not name.endswith("lora_B.weight")]
        groups = [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": self._options.lora_plus_ratio}]
        return [group for group in groups if group["params"]]

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self._trained.load(checkpoint.factors)
        self.progress, self.best = checkpoint.progress, checkpoint.best
        for name, parameter in self._named.items():
            if f"{name}.exp_avg" in checkpoint.moments:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.progress.step)),
                    "exp_avg": checkpoint.moments[f"{name}.exp_avg"].clone(),
                    "exp_avg_sq": checkpoint.moments[f"{name}.exp_avg_sq"].clone(),
                }

    def factors(self) -> dict[str, torch.Tensor]:
        """Copies of the trained numbers."""
        return {name: parameter.detach().clone() for name, parameter in self._named.items()}

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OutputError: if it cannot be written.
        """
        if self._folder is None:
            return
        moments = {
            f"{name}.{key}": state[key]
            for name, parameter in self._named.items()
            if (state := self._optimizer.state.get(parameter))
            for key in ("exp_avg", "exp_avg_sq")
        }
        save_checkpoint(self._folder, Checkpoint(self._settings, self.progress, self.factors(), moments, self.best))
        self._saved = time.monotonic()

    def run(self) -> str:
        """Train to the end: ``done``, ``early stop`` or ``time``.

        Raises:
            KeyboardInterrupt: if it is interrupted; the step at work is given up, the checkpoint written.
            TrainingError: if the loss is not finite.
            OutputError: if a checkpoint cannot be written.
        """
        with self._interruptible():
            while self.progress.step < self._limits.steps:
                if self._has_missed_enough():
                    return "early stop"
                if self.progress.seconds + self.progress.prepared >= self._limits.deadline:
                    return "time"
                if not self._one_step():
                    self.save()
                    raise KeyboardInterrupt
            return "early stop" if self._has_missed_enough() and self.progress.misses else "done"

    def _has_missed_enough(self) -> bool:
        return bool(self._options.patience) and self.progress.misses >= self._options.patience

    def _one_step(self) -> bool:
        """One step; False if it was given up because the run is to stop."""
        started, number = time.monotonic(), self.progress.step
        micros = self._batches.step(number)
        rate = self._options.rate * schedule(self._options, number, self._limits.steps)
        torch.manual_seed((self._options.seed << 32) + number)  # of dropout: the same when the run goes on here
        loss = self._gradients(micros)
        if loss is None:
            self._optimizer.zero_grad()
            return False
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        progress = self.progress
        progress.step += 1
        progress.trained_tokens += sum(micro.n_trained for micro in micros)
        seconds = time.monotonic() - started
        progress.seconds += seconds
        valid_loss = self._evaluated()
        progress.curve.append({"step": progress.step, "loss": loss, "valid_loss": valid_loss, "lr": rate})
        if valid_loss is not None or time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()
        self._tell(loss, valid_loss, rate, sum(micro.tokens.numel() for micro in micros) / max(seconds, 1e-9))
        return True

    def _gradients(self, micros: list[MicroBatch]) -> float | None:
        """Gradients of a step, clipped; its loss, or None if the run is to stop.

        Raises:
            TrainingError: if they are not finite.
        """
        total, loss = sum(micro.n_trained for micro in micros), 0.0
        prompt = None if self._trained.prompt is None else self._trained.prompt.rows
        self._trained.set_dropout(True)
        try:
            for micro in micros:
                if self._stop.is_set():
                    return None
                below = None if self._kept is None else self._kept.of(micro)
                part = backward_loss(
                    self._trained.model,
                    micro.tokens,
                    micro.trained,
                    total,
                    prompt=prompt,
                    positions=micro.positions,
                    below=below,
                )
                if not math.isfinite(part):
                    raise self._diverged("loss", micro.sources)
                loss += part
        finally:
            self._trained.set_dropout(False)
        most = self._options.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self._named.values()), most)
        if not math.isfinite(float(norm)):
            raise self._diverged("gradient", [source for micro in micros for source in micro.sources])
        return loss / total

    def _diverged(self, what: str, sources: Any) -> TrainingError:  # noqa: ANN401
        self._optimizer.zero_grad()
        self.save()
        best = self.progress.best_step
        kept = f"; the best factors, of step {best}, are kept" if best > 0 else ""
        where = f" in {self._folder}" if self._folder and kept else ""
        return TrainingError(
            f"the {what} is not finite in step {self.progress.step + 1}, at {', '.join(list(sources)[:8])}"
            f"{kept}{where}; try a lower --lr or a lower --max-grad-norm"
        )

    def _evaluated(self) -> float | None:
        """The held-out loss, if it is time; the best factors are kept."""
        progress = self.progress
        is_last = progress.step == self._limits.steps
        if self._evaluate is None or (progress.step % self._limits.eval_every and not is_last):
            return None
        factors = self.factors()
        loss = self._evaluate(factors, progress.step)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.misses = loss, progress.step, 0
            self.best = factors
        else:
            progress.misses += 1
        return loss

    def _tell(self, loss: float, valid_loss: float | None, rate: float, speed: float) -> None:
        progress, steps = self.progress, self._limits.steps
        left = (steps - progress.step) * progress.seconds / progress.step
        left = min(left, max(0.0, self._limits.deadline - progress.prepared - progress.seconds))
        self._watch(StepDone(progress.step, steps, loss, valid_loss, rate, speed, left))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl+C (or SIGTERM) end the run after the micro-batch at work; the second ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:  # noqa: ANN401
            del number, frame
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._stop.set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def schedule(options: TrainOptions, step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 0: up over the warm-up, then down to 0 (or constant)."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1 - done
