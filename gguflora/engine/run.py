"""Answer one prompt, or hold a conversation: ``run``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gguflora.engine import Engine, Sampling
from gguflora.engine.chat import Chat, ChatAnswer
from gguflora.engine.context_size import context_size
from gguflora.files.remote import remote_inputs
from gguflora.runtime.templates import RENDERER

AdapterPath = str | os.PathLike[str]
Adapters = Mapping[str, AdapterPath | tuple[AdapterPath, float]]
"""Adapters by name: each a GGUF LoRA file or PEFT directory, or a tuple of it and its scale."""


_KEPT_SETS: Final = 4
"""Adapter sets whose tokens are kept, so that a chat goes back to one of them without computing its tokens again."""


@dataclass(frozen=True, slots=True)
class RunReport(ChatAnswer):
    """The answer to `run`, with the attributes of `gguflora.engine.chat.ChatAnswer`.

    Attributes:
        base: path of the base model.
        prompt: the prompt.
        warnings: what was left out of the adapters or could not be checked.
    """

    base: Path
    prompt: str
    warnings: tuple[str, ...] = ()

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
    text_only: bool = False,
    trust_names: bool = False,
    chat_template: str | None = None,
    chat_template_file: AdapterPath | None = None,
    write: Callable[[str], None] = lambda _: None,
) -> RunReport:
    """Answer one prompt with a model and adapters. Needs llama-cpp-python.

    This loads the model for a single answer; to answer many prompts, use `gguflora.engine.Engine`.

    Args:
        base: GGUF file of the base model.
        prompt: the prompt.
        adapters: adapters by name: each a GGUF LoRA file or PEFT directory, or a tuple of it and its scale (default 1).
        tasks: task number of each MULTITASK_PROMPT_TUNING adapter in ``adapters``, by name.
        raw: continue the prompt as plain text, without the model's chat template.
        ctx: size of the context in tokens; by default the model's training length, up to 4096.
        max_tokens: largest number of tokens of the answer.
        temperature: sampling temperature; 0 always takes the most likely token.
        seed: seed of the random numbers.
        threads: number of threads; by default one less than the cores that this process may use.
        text_only: take only the part of a multimodal model's adapters that changes the language model.
        trust_names: apply adapters by name and shape where the order of a tensor's rows is not known.
        chat_template: ``adapter``, ``base`` or a template in Jinja; see `gguflora.engine.Engine`.
        chat_template_file: file with a template.
        write: called with each piece of the answer's text.

    Raises:
        GgufloraError: if an input cannot be read, or inputs do not fit together.
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
        text_only=text_only,
        trust_names=trust_names,
        chat_template=chat_template,
        chat_template_file=chat_template_file,
        write=write,
    ) as chat:
        answer, warnings = chat.say(prompt), chat.engine.warnings
    return RunReport(**asdict(answer), base=Path(base), prompt=prompt, warnings=warnings)


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
    text_only: bool,
    trust_names: bool,
    chat_template: str | None = None,
    chat_template_file: AdapterPath | None = None,
    write: Callable[[str], None],
    tell: Callable[[str], None] = lambda _: None,
    show: Callable[[list[ChatAnswer]], None] = lambda _: None,
) -> Iterator[Chat]:
    """Load a model and open a conversation with it; see `run` and `gguflora.engine.chat.Chat` for the arguments."""
    scaled = {name: item if isinstance(item, tuple) else (item, 1.0) for name, item in adapters.items()}
    paths = {name: path for name, (path, _) in scaled.items()}
    n_ctx = context_size(base, ctx)
    if not raw:
        RENDERER.warm()
    options: dict[str, Any] = {"n_ctx": n_ctx, "n_parallel": _KEPT_SETS, "threads": threads}
    options |= {"text_only": text_only, "trust_names": trust_names}
    options |= {"chat_template": chat_template, "chat_template_file": chat_template_file}
    with Engine(base, adapters=paths, tasks=tasks, **options) as engine:
        for text in engine.warnings:
            tell(f"warning: {text}")
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
