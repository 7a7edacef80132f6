"""One answer of a model with adapters: ``run``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguflora.engine import Engine, Sampling
from gguflora.engine.chat import Chat, ChatAnswer
from gguflora.engine.context_size import context_size
from gguflora.files.remote import remote_inputs

AdapterPath = str | os.PathLike[str]
Adapters = Mapping[str, AdapterPath | tuple[AdapterPath, float]]
"""By name: a GGUF LoRA file or PEFT directory, alone or with its scale."""


@dataclass(frozen=True, slots=True)
class RunReport(ChatAnswer):
    """What `run` was answered.

    Attributes:
        base: the base model.
        prompt: what was asked.
    """

    base: Path
    prompt: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "base": str(self.base)}


@remote_inputs(base="file", adapters="adapter")
def run(
    base: str | os.PathLike[str],
    prompt: str,
    *,
    adapters: Adapters | None = None,
    tasks: Mapping[str, int] | None = None,
    raw: bool = False,
    ctx: int | None = None,
    max_tokens: int = 512,
    temperature: float = 0.8,
    seed: int | None = None,
    threads: int | None = None,
    write: Callable[[str], None] = lambda _: None,
) -> RunReport:
    """Ask a model one thing; needs llama-cpp-python. `gguflora.engine.Engine` asks many.

    Args:
        base: the base model, a GGUF file.
        prompt: what to ask.
        adapters: by name, a GGUF LoRA file or PEFT directory (scale 1), or such a path and its scale.
        tasks: of those that are MULTITASK_PROMPT_TUNING: which task, by name.
        raw: continue the prompt as it is, without the model's chat template.
        ctx: tokens of context; by default the model's, at most 4096.
        max_tokens: most tokens of the answer.
        temperature: 0 takes the most likely token.
        seed: of the random numbers.
        threads: number of threads; by default one for each core this process may use, but one.
        write: takes the text as it comes.

    Raises:
        GgufloraError: if something cannot be read or does not fit together.
    """
    with open_chat(
        base,
        adapters or {},
        tasks or {},
        raw=raw,
        ctx=ctx,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        write=write,
    ) as chat:
        answer = chat.say(prompt)
    return RunReport(**asdict(answer), base=Path(base), prompt=prompt)


@remote_inputs(base="file", adapters="adapter")
@contextmanager
def open_chat(
    base: str | os.PathLike[str],
    adapters: Adapters,
    tasks: Mapping[str, int],
    *,
    raw: bool,
    ctx: int | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    threads: int | None,
    write: Callable[[str], None],
    tell: Callable[[str], None] = lambda _: None,
    show: Callable[[list[ChatAnswer]], None] = lambda _: None,
) -> Iterator[Chat]:
    """A conversation with an engine of its own; the arguments are those of `run` and of `gguflora.engine.chat.Chat`."""
    scaled = {name: item if isinstance(item, tuple) else (item, 1.0) for name, item in adapters.items()}
    paths = {name: path for name, (path, _) in scaled.items()}
    n_ctx = context_size(base, ctx)
    with Engine(base, adapters=paths, tasks=tasks, n_ctx=n_ctx, n_parallel=1, threads=threads) as engine:
        yield Chat(
            engine,
            write=write,
            tell=tell,
            show=show,
            raw=raw,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, seed=seed),
            scales={name: scale for name, (_, scale) in scaled.items()},
        )
