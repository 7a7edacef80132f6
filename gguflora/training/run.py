"""A whole run: data, model, plan, training, evaluation, outputs."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Final

import torch

from gguflora.engine.model import Model
from gguflora.errors import TrainingDataError, TrainingError, UsageError
from gguflora.files.checksum import sha256_of
from gguflora.files.visible import visible_files
from gguflora.system.cpus import thread_count
from gguflora.system.memory import read_bytes
from gguflora.system.processes import peak_memory
from gguflora.training.adapters import LoraLayer, SoftPromptRows, add_loras, choose_modules
from gguflora.training.batches import Batches, MicroBatch
from gguflora.training.checkpoints import STATE, Checkpoint, read_checkpoint
from gguflora.training.configs import Header, kind_of
from gguflora.training.evaluation import Evaluator, self_check
from gguflora.training.initial import put_factors
from gguflora.training.kept import FILE, KeptStates
from gguflora.training.loop import Limits, Trainer
from gguflora.training.loss import backward_loss
from gguflora.training.memory import MemoryPlan, needed_bytes, plan_memory, return_memory_early, total_bytes
from gguflora.training.model import Below, PackedModel
from gguflora.training.options import TrainOptions
from gguflora.training.outputs import Outputs, Trainables, publish
from gguflora.training.packed import PackedBase
from gguflora.training.plots import check_plot, plot_curve
from gguflora.training.report import RankRow, StepDone, TrainPlan, TrainReport
from gguflora.training.rows import Row, read_rows
from gguflora.training.samples import Sample, SampleMaker, SampleSet, fit

_LOG = logging.getLogger(__name__)
_RANKS: Final = (4, 8, 16, 32, 64, 128)
_LONGEST: Final = 2048
"""Tokens of a sample, at most, unless the user asks for more."""

_FEW: Final = 8
_SHOWN: Final = 600
_EVALUATIONS: Final = 10


@dataclass(frozen=True, slots=True)
class _Data:
    """The data of a run.

    Attributes:
        learned: samples to learn.
        held: samples held out.
        prompts: tokens of the sample prompts.
        example: one sample as text.
        sha256: SHA-256 over all files.
    """

    learned: SampleSet
    held: tuple[Sample, ...]
    prompts: dict[str, list[int]]
    example: str
    sha256: str

    @property
    def longest(self) -> int:
        return max(len(sample.tokens) for sample in (*self.learned.samples, *self.held))


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
    found = _prepare(packed, rows, held, _hash_of([*data, *(valid or ())]), options, chat_template)
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


def _prepare(
    packed: PackedBase,
    rows: Sequence[Row],
    held: Sequence[Row] | None,
    digest: str,
    options: TrainOptions,
    chat_template: Path | None,
) -> _Data:
    """Rows as samples, by llama.cpp's tokens."""
    template = None if chat_template is None else _template(chat_template)
    if template is not None:
        digest = hashlib.sha256(f"{digest} {template}".encode()).hexdigest()
    n_ctx = Header(packed).context
    if options.length is not None and options.length > n_ctx:
        raise UsageError(f"length is {options.length}, but the base was trained with {n_ctx} tokens of context")
    if held is None:
        rows, held = _split(rows, options)
    model = Model(packed.path, verbose=False, repack=False)
    try:
        maker = SampleMaker(model, template, options.loss == "all")
        samples, held_samples = maker.make(rows), maker.make(held)
        longest = max(len(sample.tokens) for sample in (*samples, *held_samples))
        length = options.length or min(longest, n_ctx, max(_LONGEST, 2))
        learned = fit(samples, length)
        kept = fit(held_samples, length, "held-out samples").samples if held_samples else ()
        messages = [(text, [{"role": "user", "content": text}]) for text in options.sample]
        has_template = template is not None or model.has_template
        prompts = {
            text: model.tokenize(
                model.chat_text(chat, template=template) if has_template else text,
                add_bos=not has_template,
                special=True,
            )
            for text, chat in messages
        }
        example = _marked(model, learned.samples[0])
    finally:
        model.free()
    return _Data(learned, kept, prompts, example, digest)


def _template(path: Path) -> str:
    """The text of ``--chat-template``.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"chat template {path}: cannot be read: {error}") from error


def _split(rows: Sequence[Row], options: TrainOptions) -> tuple[list[Row], list[Row]]:
    """Rows to learn, and rows to hold out."""
    count = max(1, round(len(rows) * options.valid_split)) if options.valid_split else 0
    if count >= len(rows):
        raise TrainingDataError(
            f"{rows[0].source}: too little data: of {len(rows)} rows {count} would be held out and none learned; give "
            "more rows, --valid FILE, or another --valid-split"
        )
    chosen = set(Random(options.seed).sample(range(len(rows)), count))  # noqa: S311  (a choice, no secret)
    return [r for n, r in enumerate(rows) if n not in chosen], [r for n, r in enumerate(rows) if n in chosen]


def _marked(model: Model, sample: Sample) -> str:
    """A sample as text, its learned parts in double brackets."""
    content, inside = bytearray(), False
    for token, is_learned in zip(sample.tokens, sample.trained, strict=True):
        if is_learned != inside:
            content += b"[[" if is_learned else b"]]"
            inside = is_learned
        content += model.piece(token, True)
    text = (bytes(content) + (b"]]" if inside else b"")).decode("utf-8", errors="replace")
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"


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

    def __init__(self, trained: Trainables, data: _Data, options: TrainOptions, outputs: Outputs) -> None:
        self._trained, self._data, self._options, self._outputs = trained, data, options, outputs
        self._evaluator = Evaluator(trained, data.held, data.prompts, data.longest, torch.get_num_threads())
        self._kept: KeptStates | None = None
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
        self._batches = Batches(samples, options.batch, options.seed, memory.positions, options.accumulate, packs=packs)
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
            steps_per_epoch=self._batches.steps_per_epoch,
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
            kept_blocks=0 if self._kept is None else self._kept.first,
            kept_bytes=0 if self._kept is None else self._kept.n_bytes,
            kept_seconds=kept_seconds,
        )

    def _times(self, planned: dict[str, Any]) -> tuple[float, int, float]:
        """Seconds of a step, number of steps, and seconds to compute the states that are kept, if they are worth it."""
        if planned:
            if planned["kept_blocks"]:
                self._kept = self._states(planned["kept_blocks"])
            return planned["seconds_per_step"], planned["steps"], planned["kept_seconds"]
        micro = self._batches.step(0)[-1]
        per_step = self._positions() / self._batches.steps_per_epoch / micro.tokens.numel()
        seconds = self._measure(micro) * per_step
        steps = self._steps(seconds)
        states = self._states(min(map(self._trained.model.block_of, self._trained.layers), default=0))
        if steps <= self._batches.steps_per_epoch or not states.first or not self._has_room(states.n_bytes):
            return seconds, steps, 0.0
        self._kept, started = states, time.monotonic()
        below = self._trained.model.states_below(states.first, micro.tokens, micro.positions)
        kept_seconds = (time.monotonic() - started) * per_step * self._batches.steps_per_epoch
        seconds = self._measure(micro, Below(states.first, below)) * per_step
        return seconds, self._steps(seconds, kept_seconds), kept_seconds

    def _states(self, first: int) -> KeptStates:
        return KeptStates(self._trained.model, self._data.learned.samples, first, self._outputs.state / FILE)

    def _has_room(self, n_bytes: int) -> bool:
        """Whether the disk holds a file and as much again for outputs; else the plan says so."""
        folder = next(each for each in self._outputs.state.absolute().parents if each.exists())
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
        return max(1, math.ceil(options.epochs * self._batches.steps_per_epoch))

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
        steps = range(self._batches.steps_per_epoch)
        return sum(micro.tokens.numel() for step in steps for micro in self._batches.step(step))

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
            self._batches,
            self._options,
            limits,
            settings,
            self._outputs.state,
            evaluate,
            watch,
            self._kept,
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
        if self._kept is None or (goes_on and self._kept.is_there):
            return
        started = time.monotonic()
        self._kept.fill(self._batches)
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
