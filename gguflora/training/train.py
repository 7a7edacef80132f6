"""Fine-tune a LoRA on the GGUF file that is served: ``train``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguflora.errors import MissingExtraError
from gguflora.files.remote import remote_inputs
from gguflora.training.options import TrainOptions, as_paths
from gguflora.training.report import StepDone, TrainPlan, TrainReport

Location = str | os.PathLike[str]


@remote_inputs(base="file", data="file", valid="file", from_adapter="adapter", chat_template="file")
def train(
    base: Location,
    data: Location | Sequence[Location],
    out: Location,
    *,
    valid: Location | Sequence[Location] | None = None,
    valid_split: float = 0.05,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: str | Sequence[str] | None = None,
    layers: int | None = None,
    epochs: float = 3,
    steps: int | None = None,
    hours: float | None = None,
    batch: int = 8,
    accumulate: int | str = "auto",
    length: int | str = "auto",
    lr: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    loss: str = "answers",
    eval_every: int | None = None,
    patience: int = 3,
    sample: Sequence[str] = (),
    method: str = "lora",
    init: str = "default",
    lora_plus_ratio: float = 1.0,
    resume: bool = False,
    from_adapter: Location | None = None,
    memory: str | None = None,
    precision: str = "auto",
    threads: int | None = None,
    chat_template: Location | None = None,
    seed: int = 0,
    check_merge: bool = False,
    dry_run: bool = False,
    force: bool = False,
    plot: Location | None = None,
    show_plan: Callable[[TrainPlan], None] = lambda _: None,
    watch: Callable[[StepDone], None] = lambda _: None,
) -> TrainReport:
    """Train an adapter on a GGUF model; needs llama-cpp-python, torch and transformers.

    The base's weights stay packed in the mapped file. Data is rendered and tokenized by llama.cpp, as it will be when
    the adapter is served. The best factors, by the held-out loss in llama.cpp, are written in the end: the PEFT
    directory ``out``, and of LoRA the file ``out.gguf``. What a run needs to go on lies in ``out.training`` meanwhile.

    Args:
        base: GGUF model.
        data: JSONL files (``messages``, ``prompt`` and ``completion``, ``text``, Alpaca rows) or folders of texts.
        out: name of the outputs.
        valid: held-out data of the same forms.
        valid_split: share of the rows to hold out where ``valid`` is not given; at least one row unless it is 0.
        rank: rank of the factors; of method ``prompt`` the number of virtual tokens.
        alpha: scaling times rank; by default twice the rank.
        dropout: share of a LoRA's inputs that a step leaves out.
        rslora: scale by alpha / sqrt(rank).
        targets: ``all`` linear layers (the default), ``attention``, ``experts``, or globs of their names.
        layers: adapt only so many of the last blocks.
        epochs: passes over the data.
        steps: number of steps, in place of ``epochs``.
        hours: time to train, in place of both.
        batch: samples of a step.
        accumulate: parts that a step is computed in, or ``auto``: as memory allows. The result is the same.
        length: most tokens of a sample, or ``auto``: those of the longest, within the base's context.
        lr: learning rate; by default 2e-4, of method ``prompt`` 5e-3.
        schedule: ``cosine``, ``linear`` or ``constant``.
        warmup: share of the steps over which the rate rises.
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are shortened to it; 0 leaves them.
        loss: learn ``answers`` only, or ``all`` tokens.
        eval_every: steps between evaluations; by default a tenth of the run.
        patience: evaluations without a better one after which the run ends; 0 never.
        sample: prompts whose answers are shown beside the base's.
        method: ``lora``, ``dora`` or ``prompt``.
        init: first factors: ``default``, ``olora`` or ``pissa``; the latter two are written converted, with rank 2r.
        lora_plus_ratio: rate of B over that of A.
        resume: go on with the run that was interrupted.
        from_adapter: begin with the factors of this LoRA.
        memory: most memory, for example ``6G``; by default most of what is available.
        precision: type of the products: ``f32``, ``bf16``, or ``auto``: bf16 where the processor has it.
        threads: by default one for each core this process may use.
        chat_template: a file with a Jinja template, in place of the base's.
        seed: decides the first factors, the order of the data and dropout.
        check_merge: also merge the adapter, and measure what the merged model keeps.
        dry_run: make the plan, with one real step measured, and train nothing.
        force: overwrite outputs, and drop a run that was interrupted.
        plot: picture of the loss curve to write (needs matplotlib).
        show_plan: given the plan before the training.
        watch: told of each step.

    Raises:
        TrainingDataError: with every row that cannot be used.
        TrainingError: if the self-check fails, the loss is not finite, or there is no run to resume.
        KeyboardInterrupt: if it was interrupted; ``resume`` goes on with it.
        GgufloraError: if an option makes no sense, or a file cannot be read or written.
    """
    options = TrainOptions(
        valid_split=valid_split,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=_as_tuple(targets),
        layers=layers,
        epochs=epochs,
        steps=steps,
        hours=hours,
        batch=batch,
        accumulate=None if accumulate == "auto" else accumulate,  # type: ignore[arg-type]
        length=None if length == "auto" else length,  # type: ignore[arg-type]
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        loss=loss,
        eval_every=eval_every,
        patience=patience,
        sample=tuple(sample),
        method=method,
        init=init,
        lora_plus_ratio=lora_plus_ratio,
        memory=memory,
        precision=precision,
        threads=threads,
        seed=seed,
        check_merge=check_merge,
    )
    options.check()
    run = _runner()
    return run(
        base=Path(base),
        data=as_paths(data),
        valid=None if valid is None else as_paths(valid),
        out=Path(out),
        options=options,
        resume=resume,
        from_adapter=None if from_adapter is None else Path(from_adapter),
        chat_template=None if chat_template is None else Path(chat_template),
        dry_run=dry_run,
        force=force,
        plot=None if plot is None else Path(plot),
        show_plan=show_plan,
        watch=watch,
    )


def _as_tuple(targets: Any) -> tuple[str, ...]:  # noqa: ANN401  (checked with the other options)
    if isinstance(targets, list | tuple):
        return tuple(targets) or ("all",)
    return ("all",) if targets is None else (targets,)


def _runner() -> Callable[..., TrainReport]:
    # threads of torch that wait for each other must sleep: spinning on shared processors made steps 35 times longer
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see memory.return_memory_early
    try:
        from gguflora.training.run import run_training  # noqa: PLC0415  (import gguflora does not load torch)
    except ModuleNotFoundError as error:
        packages = {"torch": "torch", "llama_cpp": "llama-cpp-python"}
        if error.name not in packages:
            raise
        raise MissingExtraError("training", packages[error.name], "train") from error
    return run_training
