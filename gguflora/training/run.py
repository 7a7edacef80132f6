"""A whole run: data, model, plan, training, evaluation, outputs."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gguflora.errors import TrainingError, UsageError
from gguflora.files.checksum import sha256_of
from gguflora.files.visible import visible_files
from gguflora.system.cpus import thread_count
from gguflora.system.processes import peak_memory
from gguflora.training.adapters import LoraLayer, SoftPromptRows, add_loras, choose_modules
from gguflora.training.checkpoints import STATE, Checkpoint, read_checkpoint
from gguflora.training.configs import kind_of
from gguflora.training.data import TrainingData, prepare
from gguflora.training.evaluation import Evaluator
from gguflora.training.initial import put_factors
from gguflora.training.loop import Limits, Trainer
from gguflora.training.memory import return_memory_early
from gguflora.training.model import PackedModel
from gguflora.training.options import TrainOptions
from gguflora.training.outputs import Outputs, Trainables, publish
from gguflora.training.packed import PackedBase
from gguflora.training.planner import Planner
from gguflora.training.plots import check_plot, plot_curve
from gguflora.training.report import StepDone, TrainPlan, TrainReport
from gguflora.training.rows import read_rows


def run_training(
    *,
    base: Path,
    data: Sequence[Path],
    valid: Sequence[Path] | None,
    out: Path,
    options: TrainOptions,
    resume: bool,
    from_adapter: Path | None,
    chat_template: Path | None,
    dry_run: bool,
    force: bool,
    plot: Path | None,
    show_plan: Callable[[TrainPlan], None],
    watch: Callable[[StepDone], None],
) -> TrainReport:
    """Train; see `gguflora.training.train.train`, which checks the options and calls this."""
    outputs = Outputs.from_name(out)
    _check_outputs(outputs, [base, *data, *(valid or ())], plot, resume=resume, dry_run=dry_run, force=force)
    return_memory_early()
    packed = PackedBase(base)
    kind_of(packed)  # before the data is read
    rows, held = read_rows(data), None if valid is None else read_rows(valid)
    found = prepare(packed, rows, held, _hash_of([*data, *(valid or ())]), options, chat_template)
    settings = {
        **options.settings(),
        "base": sha256_of(*packed.paths),
        "data": found.sha256,
        "from": None if from_adapter is None else from_adapter.name,
    }
    checkpoint = read_checkpoint(outputs.state, settings) if resume else None
    planned: dict[str, Any] = {} if checkpoint is None else checkpoint.settings["planned"]
    torch.set_num_threads(options.threads or planned.get("threads") or thread_count(None))
    trained = _trainables(packed, options, from_adapter)
    run = _Run(trained, found, options, outputs)
    plan = run.plan(planned)
    show_plan(plan)
    if dry_run:
        return run.report(plan, None, "done", dry_run=True)
    settings["planned"] = {
        "steps": plan.steps,
        "eval_every": plan.eval_every,
        "recompute": plan.recompute,
        "micro_positions": plan.micro_positions,
        "threads": torch.get_num_threads(),
        "seconds_per_step": plan.seconds_per_step,
        "kept_blocks": plan.kept_blocks,
        "kept_seconds": plan.kept_seconds,
    }
    trainer, stopped = run.train(plan, settings, checkpoint, watch)
    return run.finish(plan, trainer, stopped, settings, force=force, plot=plot)


def _check_outputs(
    outputs: Outputs, inputs: list[Path], plot: Path | None, *, resume: bool, dry_run: bool, force: bool
) -> None:
    outputs.check(inputs, force=force or dry_run)
    if plot is not None:
        check_plot(plot)
    if (outputs.state / STATE).exists() and not (resume or dry_run or force):
        raise UsageError(
            f"{outputs.state}: a run that was interrupted lies there; go on with --resume, or drop it with --force"
        )


def _hash_of(paths: Sequence[Path]) -> str:
    return sha256_of(*[file for path in paths for file in (visible_files(path) if path.is_dir() else [path])])


def _trainables(packed: PackedBase, options: TrainOptions, from_adapter: Path | None) -> Trainables:
    """The model with what is trained in it."""
    model = PackedModel(packed, options.dtype)
    if options.method == "prompt":
        if from_adapter is not None:
            raise UsageError("--from is for LoRA; a soft prompt begins with embeddings of tokens")
        rows = SoftPromptRows(model, options.rank, torch.Generator().manual_seed(options.seed))
        return Trainables(model, {}, None, rows)
    names = list(choose_modules(model, options.targets, options.layers))
    layers: dict[str, LoraLayer] = add_loras(model, names, options.shape, options.seed)
    if from_adapter is not None:
        put_factors(from_adapter, packed.base, layers)
    return Trainables(model, layers, options.shape)


class _Run:
    """One run, once its data and its model are there."""

    def __init__(self, trained: Trainables, data: TrainingData, options: TrainOptions, outputs: Outputs) -> None:
        self._trained, self._data, self._options, self._outputs = trained, data, options, outputs
        self._evaluator = Evaluator(trained, data.held, data.prompts, data.longest, torch.get_num_threads())
        self._planner = Planner(trained, data, options, outputs.state, self._evaluator)

    def plan(self, planned: dict[str, Any]) -> TrainPlan:
        """The plan; of a run that goes on, the plan it began with."""
        return self._planner.plan(planned)

    def train(
        self,
        plan: TrainPlan,
        settings: dict[str, Any],
        checkpoint: Checkpoint | None,
        watch: Callable[[StepDone], None],
    ) -> tuple[Trainer, str]:
        """Train to the end."""
        hours = self._options.hours
        limits = Limits(plan.steps, plan.eval_every, math.inf if hours is None else hours * 3600)
        evaluate = (lambda values, _: self._evaluator.loss(values)) if self._data.held else None
        trainer = Trainer(
            self._trained,
            self._planner.batches,
            self._options,
            limits,
            settings,
            self._outputs.state,
            evaluate,
            watch,
            self._planner.kept,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        if trainer.progress.base_valid_loss is None:
            trainer.progress.base_valid_loss = self._evaluator.base_loss()
            trainer.save()
        self._keep(trainer, goes_on=checkpoint is not None)
        return trainer, trainer.run()

    def _keep(self, trainer: Trainer, *, goes_on: bool) -> None:
        """Compute the states to keep, unless the run goes on and they are there."""
        kept = self._planner.kept
        if kept is None or (goes_on and kept.is_there):
            return
        started = time.monotonic()
        kept.fill(self._planner.batches)
        trainer.progress.prepared += time.monotonic() - started
        trainer.save()

    def finish(
        self,
        plan: TrainPlan,
        trainer: Trainer,
        stopped: str,
        settings: dict[str, Any],
        *,
        force: bool,
        plot: Path | None,
    ) -> TrainReport:
        """Write the best factors, and look at what was written."""
        progress, outputs = trainer.progress, self._outputs
        if self._data.held and not trainer.best:  # time was up before the first evaluation
            trainer.best = trainer.factors()
            progress.best_loss, progress.best_step = self._evaluator.loss(trainer.best), progress.step
        values = trainer.best or trainer.factors()
        self._trained.load(values)
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            raise TrainingError("the trained factors are not finite; try a lower --lr")
        record = {
            "base_sha256": settings["base"],
            "data_sha256": settings["data"],
            "settings": {key: value for key, value in settings.items() if key not in {"base", "data", "planned"}},
            "steps": progress.step,
            "best_step": progress.best_step if trainer.best else progress.step,
            "base_valid_loss": progress.base_valid_loss,
            "valid_loss": progress.best_loss,
            "trained_tokens": progress.trained_tokens,
        }
        publish(outputs, self._trained, values, record, force=force)
        report = self.report(plan, trainer, stopped, values=values)
        if plot is not None:
            plot_curve(report.curve, report.base_valid_loss, f"{outputs.folder.name} on {report.base.name}", plot)
        shutil.rmtree(outputs.state, ignore_errors=True)
        return report

    def report(
        self,
        plan: TrainPlan,
        trainer: Trainer | None,
        stopped: str,
        *,
        values: dict[str, torch.Tensor] | None = None,
        dry_run: bool = False,
    ) -> TrainReport:
        """What was done."""
        progress = None if trainer is None else trainer.progress
        base_loss = None if progress is None else progress.base_valid_loss
        loss = None if progress is None else progress.best_loss
        is_lora = self._trained.method == "lora"
        merge = None
        if values is not None and self._options.check_merge and base_loss is not None and loss is not None:
            merge = self._evaluator.merged(self._outputs.folder, base_loss, loss)
        scales = {} if values is None or loss is None else self._evaluator.scales(values)
        return TrainReport(
            output=self._outputs.folder,
            lora=self._outputs.lora if is_lora else None,
            base=self._trained.model.packed.path,
            method=self._trained.method,
            plan=plan,
            base_valid_loss=base_loss,
            valid_loss=loss,
            steps=0 if progress is None else progress.step,
            best_step=0 if progress is None else progress.best_step if progress.best_step > 0 else progress.step,
            stopped=stopped,
            trained_tokens=0 if progress is None else progress.trained_tokens,
            seconds=0.0 if progress is None else progress.seconds + progress.prepared,
            peak_memory=peak_memory(),
            curve=() if progress is None else tuple(progress.curve),  # type: ignore[arg-type]
            scales=scales if loss is None or not scales else dict(sorted({**scales, "1": loss}.items())),
            samples=() if values is None else self._evaluator.answers(values),
            merge=merge,
            warnings=plan.notes,
            dry_run=dry_run,
        )
