"""Evaluate factors as they are served: written as they will be, put hot on the base in llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gguflora.errors import TrainingError
from gguflora.merging.merge import merge
from gguflora.placement.prefix import read_prefix
from gguflora.training.batches import padded
from gguflora.training.loss import token_losses
from gguflora.training.memory import trim_heap
from gguflora.training.model import PackedModel
from gguflora.training.outputs import Trainables, write_folder, write_gguf
from gguflora.training.report import MergeCheck, SampleAnswer
from gguflora.training.samples import Sample
from gguflora.training.served import ServedModel

ANSWER_TOKENS: Final = 64
"""Of the answer to a sample prompt."""

SCALES: Final = (0.5, 0.75, 1.25, 1.5)
"""Beside 1, at which the held-out loss is measured in the end."""

MOST_NATS: Final = 0.05
"""Between torch's predictions and llama.cpp's: rounding of activations makes about 0.004, a wrong row order over 1."""

_CHECKED: Final = 256
"""Positions of the self-check."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluator:
    """Held-out samples and prompts, and the file that is served.

    Attributes:
        trained: what is trained.
        samples: held out.
        prompts: texts of sample prompts, and their tokens.
        length: tokens of the longest sample.
        threads: that compute.
    """

    trained: Trainables
    samples: Sequence[Sample]
    prompts: Mapping[str, Sequence[int]]
    length: int
    threads: int

    @property
    def n_ctx(self) -> int:
        """Tokens of a context that holds every text."""
        virtual = 0 if self.trained.prompt is None else len(self.trained.prompt.rows)
        longest = max([self.length, *(len(tokens) + ANSWER_TOKENS for tokens in self.prompts.values())])
        return longest + virtual

    def base_loss(self) -> float | None:
        """Held-out loss of the base; None without held-out samples."""
        if not self.samples:
            return None
        if not self.trained.is_servable:
            with self.without_factors():
                return self._in_torch()
        with self._served() as served:
            return served.mean_loss(self.samples)

    def loss(self, values: Mapping[str, torch.Tensor]) -> float:
        """Held-out loss of factors.

        Raises:
            TrainingError: if it is not finite.
        """
        if self.trained.is_servable:
            with self._served() as served, self._put(served, values):
                found = served.mean_loss(self.samples)
        else:
            found = self._in_torch()
        if not np.isfinite(found):
            raise TrainingError("the held-out loss is not finite; try a lower --lr")
        return found

    def scales(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Held-out loss at other scales of a LoRA."""
        if self.trained.method != "lora" or not self.samples:
            return {}
        found = {}
        with self._served() as served, self._put(served, values):
            for scale in SCALES:
                served.set_scale(scale)
                found[f"{scale:g}"] = served.mean_loss(self.samples)
        return found

    def answers(self, values: Mapping[str, torch.Tensor]) -> tuple[SampleAnswer, ...]:
        """Answers to the sample prompts, of the base and with the factors."""
        if not self.prompts or not self.trained.is_servable:
            return ()
        with self._served() as served:
            base = {text: served.answer(tokens, ANSWER_TOKENS) for text, tokens in self.prompts.items()}
            with self._put(served, values):
                tuned = {text: served.answer(tokens, ANSWER_TOKENS) for text, tokens in self.prompts.items()}
        return tuple(SampleAnswer(text, base[text], tuned[text]) for text in self.prompts)

    def merged(self, folder: Path, base_loss: float, loss: float) -> MergeCheck:
        """What a merge of the written adapter keeps."""
        with tempfile.TemporaryDirectory(prefix="gguflora-") as scratch:
            file = Path(scratch) / "merged.gguf"
            merge(self.trained.model.packed.path, [folder], file, threads=self.threads)
            with ServedModel(file, self.n_ctx, self.threads) as served:
                found = served.mean_loss(self.samples)
        gain = base_loss - loss
        return MergeCheck(found, (base_loss - found) / gain if gain else 0.0)

    @contextmanager
    def _served(self) -> Iterator[ServedModel]:
        packed = self.trained.model.packed
        packed.forget_pages()
        trim_heap()
        with ServedModel(packed.path, self.n_ctx, self.threads) as served:
            yield served

    @contextmanager
    def _put(self, served: ServedModel, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put factors on a served model, by the files that they will be written as."""
        base = self.trained.model.packed.base
        with tempfile.TemporaryDirectory(prefix="gguflora-") as scratch:
            folder = Path(scratch) / "adapter"
            folder.mkdir()
            write_folder(folder, self.trained, values, {})
            if self.trained.prompt is not None:
                served.put_prefix(read_prefix(folder, base))
                yield
                served.put_prefix(None)
                return
            file = Path(scratch) / "adapter.gguf"
            write_gguf(file, folder, "adapter", base, {})
            served.put_lora(file)
            yield
            served.put_lora(None)

    def _in_torch(self) -> float:
        model = self.trained.model
        prompt = None if self.trained.prompt is None else self.trained.prompt.rows
        losses = [token_losses(model, *_tensors(sample), prompt) for sample in self.samples]
        return float(torch.cat(losses).double().mean())

    @contextmanager
    def without_factors(self) -> Iterator[None]:
        """The base alone, while the block runs."""
        module: Any = self.trained.model.module
        for name, layer in self.trained.layers.items():
            module.set_submodule(name, layer.base)
        try:
            yield
        finally:
            for name, layer in self.trained.layers.items():
                module.set_submodule(name, layer)


def _tensors(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    batch = padded([sample])
    return batch.tokens, batch.trained


def self_check(model: PackedModel, samples: Sequence[Sample], threads: int) -> float:
    """Mean divergence of torch's predictions from llama.cpp's on the same file, in nats a position.

    Raises:
        TrainingError: if it is over `MOST_NATS`: another model would be trained than is served.
    """
    chosen: list[Sequence[int]] = []
    for sample in sorted(samples, key=lambda each: len(each.tokens)):
        chosen.append(sample.tokens[:_CHECKED])
        if sum(map(len, chosen)) >= _CHECKED:
            break
    total, count = 0.0, 0
    model.packed.forget_pages()
    with ServedModel(model.packed.path, max(map(len, chosen)), threads) as served, torch.inference_mode():
        for tokens in chosen:
            hidden = model.hidden(torch.tensor([list(tokens)]))[0]
            for row, theirs in zip(hidden, served.logits(tokens), strict=True):
                total += _divergence(torch.from_numpy(theirs.copy()), model.logits(row))
                count += 1
    found = total / count
    if not found <= MOST_NATS:
        raise TrainingError(
            f"{model.packed.path}: torch's predictions are {found:.3g} nats from llama.cpp's on the same file, more "
            f"than {MOST_NATS}; the model that would be trained is not the one that is served. Please report this"
        )
    return found


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    log_p, log_q = (torch.log_softmax(each.double(), dim=-1) for each in (theirs, ours))
    return float((log_p.exp() * (log_p - log_q)).sum())
