"""The data of a training run: rows as samples in llama.cpp's tokens, learned or held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from gguflora.engine.model import Model
from gguflora.errors import TrainingDataError, UsageError
from gguflora.training.configs import Header
from gguflora.training.options import TrainOptions
from gguflora.training.packed import PackedBase
from gguflora.training.rows import Row
from gguflora.training.samples import Sample, SampleMaker, SampleSet, fit

_LONGEST: Final = 2048
"""Tokens of a sample, at most, unless the user asks for more."""

_SHOWN: Final = 600
"""Characters of the example that the plan shows."""


@dataclass(frozen=True, slots=True)
class TrainingData:
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
        """Tokens of the longest sample."""
        return max(len(sample.tokens) for sample in (*self.learned.samples, *self.held))


def prepare(
    packed: PackedBase,
    rows: Sequence[Row],
    held: Sequence[Row] | None,
    digest: str,
    options: TrainOptions,
    chat_template: Path | None,
) -> TrainingData:
    """Make the samples of a run, in llama.cpp's tokens.

    Args:
        packed: the base.
        rows: rows to learn.
        held: rows to hold out; None takes them from ``rows``.
        digest: SHA-256 over all files.
        options: how to train.
        chat_template: file of a chat template instead of the base's.

    Raises:
        UsageError: if the template cannot be read, or the length asked for is beyond the base's context.
        TrainingDataError: if nothing is left to learn.
    """
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
    return TrainingData(learned, kept, prompts, example, digest)


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
