"""The options of a run, checked."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.errors import UsageError
from gguflora.system.processor import processor_flags

METHODS: Final = ("lora", "dora", "prompt")
INITS: Final = ("default", "olora", "pissa")
PRECISIONS: Final = ("f32", "bf16")
SCHEDULES: Final = ("cosine", "linear", "constant")
_BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16"}
_RATES: Final = {"lora": 2e-4, "dora": 2e-4, "prompt": 5e-3}
_LARGEST_SEED: Final = (1 << 31) - 1
"""A step's seed is this and the number of the step in 64 bits."""

_MOST_THREADS: Final = 512
"""llama.cpp's limit (GGML_MAX_N_THREADS); far more crash OpenMP."""

_NOT_IN_STATE: Final = {"sample", "check_merge", "threads", "memory", "hours", "patience"}
"""Options that a run may be resumed with otherwise: they change no number of a step."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What all LoRA layers of a run have in common.

    Attributes:
        rank: rank of the factors.
        alpha: numerator of their scaling.
        dropout: share of the inputs of A that is zeroed.
        rslora: whether the scaling is alpha / sqrt(rank).
        dora: whether the length of each row is learned, too.
        init: ``default`` as PEFT's; ``olora`` or ``pissa``: factors of the weight itself, whose start is taken off.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "default"

    @property
    def scaling(self) -> float:
        """Multiplies ``B A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How to train; `gguflora.training.train.train` says what each means."""

    valid_split: float = 0.05
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = ("all",)
    layers: int | None = None
    epochs: float = 3
    steps: int | None = None
    hours: float | None = None
    batch: int = 8
    accumulate: int | None = None
    length: int | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss: str = "answers"
    eval_every: int | None = None
    patience: int = 3
    sample: tuple[str, ...] = ()
    method: str = "lora"
    init: str = "default"
    lora_plus_ratio: float = 1.0
    memory: str | None = None
    precision: str = "auto"
    threads: int | None = None
    seed: int = 0
    check_merge: bool = False

    def check(self) -> None:
        """Raise ``UsageError`` unless every option makes sense, alone and with the others."""
        _within("valid_split", self.valid_split, 0, 0.9)
        for name, low in (("rank", 1), ("batch", 1), ("patience", 0), ("seed", 0)):
            _whole(name, getattr(self, name), low)
        _within("seed", self.seed, 0, _LARGEST_SEED)
        _within("threads", self.threads or 1, 1, _MOST_THREADS)
        for name in ("layers", "steps", "accumulate", "length", "eval_every", "threads"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 2 if name == "length" else 1)
        _within("dropout", self.dropout, 0, 0.99)
        _within("warmup", self.warmup, 0, 1)
        for name in ("weight_decay", "max_grad_norm"):
            _within(name, getattr(self, name), 0, 1e6)
        for name in ("alpha", "hours", "lr", "epochs", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise UsageError(f"{name} is {value!r:.80}, expected a positive number")
        if any(not isinstance(text, str) or not text.strip() for text in self.sample):
            raise UsageError("sample has an empty prompt; give texts that the model can answer")
        if not all(isinstance(target, str) for target in self.targets):
            raise UsageError(f"targets is {self.targets!r:.80}, expected names or globs of layers")
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("loss", self.loss, ("answers", "all"))
        _one_of("method", self.method, METHODS, "; PEFT trains the other methods")
        _one_of("init", self.init, INITS)
        _one_of("precision", self.precision, ("auto", *PRECISIONS))
        self._check_method()

    def _check_method(self) -> None:
        if self.method == "prompt":
            odd = [n for n in ("rslora", "layers") if getattr(self, n)]
            odd += [n for n, usual in (("init", "default"), ("targets", ("all",))) if getattr(self, n) != usual]
            if odd:
                raise UsageError(f"method 'prompt' trains embeddings before the prompt; {odd[0]} is for LoRA")
        if self.method == "dora" and self.init != "default":
            raise UsageError(f"init {self.init!r} is for method 'lora'")
        if self.check_merge and self.method == "prompt":
            raise UsageError("a soft prompt cannot be merged; leave check_merge out")

    @property
    def shape(self) -> LoraShape:
        """Options of the LoRA layers."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return LoraShape(self.rank, alpha, self.dropout, self.rslora, self.method == "dora", self.init)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return _RATES[self.method] if self.lr is None else self.lr

    @property
    def dtype(self) -> str:
        """Type of the products: bf16 only where the processor multiplies it faster."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if _BF16_FLAGS & processor_flags() else "f32"

    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_IN_STATE}


def as_paths(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """One location, or several."""
    return [Path(given)] if isinstance(given, str | os.PathLike) else [Path(each) for each in given]


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (_is_number(value) and low <= value <= high):
        raise UsageError(f"{name} is {value!r:.80}, expected {low:.10g} to {high:.10g}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name} is {value!r:.80}, expected a whole number of at least {low}")


def _one_of(name: str, value: str, known: Sequence[str], more: str = "") -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r:.80}, expected one of {', '.join(known)}{more}")
