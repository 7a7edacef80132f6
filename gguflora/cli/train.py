"""``gguflora train``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

import gguflora
from gguflora.cli.app import app, console, print_report, stderr, to_json
from gguflora.cli.options import AsJson, DryRun, Force, Threads
from gguflora.files.output_rule import check_text_targets, write_output
from gguflora.training.report import StepDone, TrainPlan, TrainReport


def _number_or_auto(text: str) -> str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise typer.BadParameter(f"is {text!r}, expected a whole number or auto")
    return text


@app.command()
def train(
    base: Annotated[str, typer.Argument(help="Base model: a GGUF file.")],
    data: Annotated[list[str], typer.Option(help="JSONL file, or folder of .txt and .md files. Repeatable.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Name: writes NAME/ (PEFT) and NAME.gguf.")],
    valid: Annotated[list[str] | None, typer.Option(help="Held-out data of the same forms. Repeatable.")] = None,
    valid_split: Annotated[float, typer.Option(help="Share of the rows to hold out without --valid.")] = 0.05,
    rank: Annotated[int, typer.Option(min=1, help="Rank; of --method prompt the number of virtual tokens.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Scaling times rank; by default twice the rank.")] = None,
    dropout: Annotated[float, typer.Option(help="Share of a LoRA's inputs that a step leaves out.")] = 0.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    targets: Annotated[
        list[str] | None, typer.Option(metavar="all|attention|experts|GLOB", help="Layers to adapt. Repeatable.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Adapt only so many of the last blocks.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, in place of --epochs.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time to train, in place of both.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 8,
    accumulate: Annotated[
        str, typer.Option(callback=_number_or_auto, help="Parts that a step is computed in, or auto: as memory allows.")
    ] = "auto",
    length: Annotated[
        str, typer.Option(callback=_number_or_auto, help="Most tokens of a sample, or auto: those of the longest.")
    ] = "auto",
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default 2e-4, of prompt 5e-3.")] = None,
    schedule: Annotated[Literal["cosine", "linear", "constant"], typer.Option(help="Of the rate.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(help="Longer gradients are shortened to it; 0 leaves them.")] = 1.0,
    loss: Annotated[Literal["answers", "all"], typer.Option(help="Which tokens are learned.")] = "answers",
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    patience: Annotated[int, typer.Option(min=0, help="Evaluations without a better one that end the run.")] = 3,
    sample: Annotated[list[str] | None, typer.Option(help="Prompt to answer beside the base. Repeatable.")] = None,
    method: Annotated[Literal["lora", "dora", "prompt"], typer.Option(help="What is trained.")] = "lora",
    init: Annotated[Literal["default", "olora", "pissa"], typer.Option(help="First factors.")] = "default",
    lora_plus_ratio: Annotated[float, typer.Option(help="Rate of B over that of A (LoRA+).")] = 1.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")] = False,
    from_adapter: Annotated[str | None, typer.Option("--from", help="Begin with the factors of this LoRA.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most memory, for example 6G.")] = None,
    precision: Annotated[Literal["auto", "f32", "bf16"], typer.Option(help="Of the products.")] = "auto",
    threads: Threads = None,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja template, not the base's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of first factors, order and dropout.")] = 0,
    check_merge: Annotated[bool, typer.Option("--check-merge", help="Measure what a merge would keep.")] = False,
    dry_run: DryRun = False,
    force: Force = False,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the loss curve.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA on the very GGUF file that is served, on this computer's processor.

    Needs the extra `train`: torch and transformers. The weights stay quantized in the mapped file.

    **Examples**

    gguflora train model-Q4_K_M.gguf --data chats.jsonl -o my-adapter

    gguflora train model.gguf --data chats.jsonl -o my-adapter --dry-run

    gguflora train model.gguf --data notes/ -o my-notes --hours 2 --sample "What is on the list?"
    """
    others = [base, *data, *(valid or []), from_adapter, out, out.parent / f"{out.name}.gguf"]
    check_text_targets((report, plot), others, force=force or resume)
    try:
        with _watcher(quiet=as_json) as watch:
            done = gguflora.train(
                base,
                data,
                out,
                valid=valid,
                valid_split=valid_split,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                rslora=rslora,
                targets=targets,
                layers=layers,
                epochs=epochs,
                steps=steps,
                hours=hours,
                batch=batch,
                accumulate=accumulate if accumulate == "auto" else int(accumulate),
                length=length if length == "auto" else int(length),
                lr=lr,
                schedule=schedule,
                warmup=warmup,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                loss=loss,
                eval_every=eval_every,
                patience=patience,
                sample=sample or (),
                method=method,
                init=init,
                lora_plus_ratio=lora_plus_ratio,
                resume=resume,
                from_adapter=from_adapter,
                memory=memory,
                precision=precision,
                threads=threads,
                chat_template=chat_template,
                seed=seed,
                check_merge=check_merge,
                dry_run=dry_run,
                force=force,
                plot=plot,
                show_plan=(lambda _: None) if as_json else _print_plan,
                watch=watch,
            )
    except KeyboardInterrupt:
        if (out.parent / f"{out.name.removesuffix('.gguf')}.training").is_dir():
            words = [word for word in sys.argv[1:] if word != "--resume"]
            stderr.print(f"to go on: {shlex.join(['gguflora', *words, '--resume'])}", markup=False)
        raise
    if report is not None:
        write_output(report, f"{to_json(done)}\n".encode())
    print_report(done, _print_training, as_json=as_json)


@contextmanager
def _watcher(*, quiet: bool) -> Iterator[Callable[[StepDone], None]]:
    """Progress: in a terminal a line that moves, on stderr; else, unless ``quiet``, a line for each evaluation."""
    if not stderr.file.isatty():  # is_terminal would be true for FORCE_COLOR, also in a log
        yield lambda done: None if quiet or done.valid_loss is None else console.print(_line(done), markup=False)
        return
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("training", total=None, said="")

        def watch(done: StepDone) -> None:
            from gguflora.training.plots import sparkline  # noqa: PLC0415

            losses.append(done.loss)
            bar.update(task, total=done.steps, completed=done.step, said=f"{_line(done)} {sparkline(losses, 24)}")
            if done.valid_loss is not None:
                bar.console.print(_line(done), markup=False)

        yield watch


def _line(done: StepDone) -> str:
    held = "" if done.valid_loss is None else f", held out {done.valid_loss:.4f}"
    return (
        f"step {done.step}/{done.steps}: loss {done.loss:.4f}{held}, {done.tokens_per_second:.0f} tokens/s, "
        f"{_duration(done.seconds_left)} left"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _print_plan(plan: TrainPlan) -> None:
    share = plan.trained_tokens / plan.tokens
    example = plan.example.replace("\n", "\n  ")
    lines = [
        f"{plan.method} on {plan.modules} modules: {plan.parameters:,} numbers to train, products in {plan.precision}",
        f"{plan.samples} samples, {plan.tokens:,} tokens, {share:.0%} learned, the longest {plan.length}; "
        f"{plan.valid_samples} held out",
        f"{plan.steps} steps ({plan.steps_per_epoch} an epoch), evaluated every {plan.eval_every}; "
        f"{plan.seconds_per_step:.2f} s a step, {_duration(plan.seconds)} in all",
        f"about {plan.memory / 1e9:.2f} GB of memory, at most {plan.micro_positions} positions at once, "
        f"{'blocks recomputed' if plan.recompute else 'nothing recomputed'}; {plan.padding:.0%} padding",
        f"torch and llama.cpp predict the same within {plan.self_check:.2g} nats",
        f"a sample, with what is learned in [[..]]:\n  {example}",
    ]
    if plan.kept_blocks:
        lines.insert(
            4,
            f"the output of the first {plan.kept_blocks} blocks is computed once, in {_duration(plan.kept_seconds)}, "
            f"and kept on disk: {plan.kept_bytes / 1e9:.2f} GB",
        )
    if plan.ranks:
        lines.append("what a rank costs:")
        lines.append(f"  {'rank':>4} {'numbers':>13} {'memory':>10} {'time':>9}")
        lines += [
            f"  {row.rank:>4} {row.parameters:>13,} {row.memory / 1e9:>7.2f} GB {_duration(row.seconds):>9}"
            for row in plan.ranks
        ]
    for line in lines:
        console.print(line, markup=False)


def _print_training(report: TrainReport) -> None:
    if report.dry_run:
        console.print(f"would write {report.output} after {report.plan.steps} steps", markup=False)
        return
    written = f"{report.output}" + (f" and {report.lora}" if report.lora else "")
    console.print(
        f"wrote {written}: {report.steps} steps ({report.stopped}), the best at {report.best_step}, "
        f"{report.trained_tokens:,} learned tokens in {_duration(report.seconds)}, "
        f"{report.peak_memory / 1e9:.2f} GB at most",
        markup=False,
    )
    if report.valid_loss is not None and report.base_valid_loss is not None and report.perplexity is not None:
        console.print(
            f"held out, in nats a token: {report.base_valid_loss:.4f} -> {report.valid_loss:.4f} "
            f"(perplexity {report.perplexity:.2f})",
            markup=False,
        )
    if report.scales:
        scales = ", ".join(f"{scale}: {loss:.4f}" for scale, loss in report.scales.items())
        console.print(f"at other scales: {scales}", markup=False)
    if report.merge is not None:
        console.print(f"merged: {report.merge.valid_loss:.4f}, {report.merge.kept:.0%} of the gain kept", markup=False)
    for answer in report.samples:
        console.print(f"[bold]{escape(answer.prompt)}[/bold]")
        console.print(f"  base:    {answer.base.strip()!r}", markup=False)
        console.print(f"  trained: {answer.trained.strip()!r}", markup=False)
