"""Options that several commands have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from gguflora.files.remote import file_name, is_remote

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; by default one for each core.")]
OutType = Annotated[
    Literal["auto", "f32", "f16", "bf16", "q8_0"],
    typer.Option(help="Type of the factors in a GGUF file; auto: f16 where that is exact, else f32."),
]
AdapterOut = Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file (.gguf) or PEFT directory to write.")]
Base = Annotated[str, typer.Option(metavar="PATH", help="Base model: a GGUF file, or a directory with config.json.")]
AdapterBase = Annotated[str | None, typer.Option(metavar="PATH", help="Base model: needed between PEFT and GGUF.")]
Lora = Annotated[list[str] | None, typer.Option(help="Adapter: PEFT directory or GGUF LoRA. Repeatable.")]
LoraScaled = Annotated[
    list[str] | None, typer.Option(metavar="PATH:SCALE", help="Adapter with a scale of its own. Repeatable.")
]
Task = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=NUMBER", help="Which task of a MULTITASK_PROMPT_TUNING adapter, from 0. Repeatable."),
]
Context = Annotated[int | None, typer.Option(min=8, help="Tokens of context; by default the model's, at most 4096.")]


def scaled_paths(lora: Sequence[str] | None, lora_scaled: Sequence[str] | None) -> list[tuple[str, float]]:
    """Paths and scales of the adapters of ``--lora PATH`` and ``--lora-scaled PATH:SCALE``.

    Raises:
        typer.BadParameter: if there are none, or a scale is missing or no number.
    """
    adapters = [(path, 1.0) for path in lora or ()] + [_split_scale(text, "PATH:SCALE") for text in lora_scaled or ()]
    if not adapters:
        raise typer.BadParameter("give at least one adapter with --lora or --lora-scaled")
    return adapters


def _split_scale(text: str, form: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        number = float(scale)
    except ValueError:
        number = None
    if number is None or not path:
        raise typer.BadParameter(f"--lora-scaled is {text!r}, expected {form}, for example adapter.gguf:0.5")
    return path, number


def named_adapters(texts: Sequence[str] | None) -> dict[str, str]:
    """Files of ``--lora [NAME=]PATH`` by name; a path without a name is called as its file or directory.

    Raises:
        typer.BadParameter: if a name or path is empty, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        name, path = _split_name(text)
        if not name or not file_name(path):
            raise typer.BadParameter(f"the adapter is {text!r}, expected NAME=PATH, for example legal=legal.gguf")
        if name in found:
            raise typer.BadParameter(f"two adapters are named {name!r}; name them with NAME=PATH")
        found[name] = path
    return found


def named_tasks(texts: Sequence[str] | None) -> dict[str, int]:
    """Tasks of ``--task NAME=NUMBER`` by adapter name.

    Raises:
        typer.BadParameter: if there is no name, or no whole number.
    """
    pairs = [text.rpartition("=") for text in texts or ()]
    for name, equals, number in pairs:
        if not name or not number.isdecimal():
            raise typer.BadParameter(
                f"--task is {name + equals + number!r}, expected NAME=NUMBER, for example support=2"
            )
    return {name: int(number) for name, _, number in pairs}


def named_and_scaled(lora: Sequence[str] | None, lora_scaled: Sequence[str] | None) -> dict[str, tuple[str, float]]:
    """Files and scales of ``--lora [NAME=]PATH`` and ``--lora-scaled [NAME=]PATH:SCALE`` by name.

    Raises:
        typer.BadParameter: if a name, path or scale does not make sense.
    """
    pairs = [_split_scale(text, "[NAME=]PATH:SCALE") for text in lora_scaled or ()]
    paths = named_adapters([*(lora or ()), *(path for path, _ in pairs)])
    scales = [1.0] * len(lora or ()) + [scale for _, scale in pairs]
    return {name: (path, scale) for (name, path), scale in zip(paths.items(), scales, strict=True)}


def _split_name(text: str) -> tuple[str, str]:
    """A name and a location, which may be a URL with equals signs of its own."""
    name, equals, path = text.partition("=")
    if equals and not is_remote(text):
        return name, path
    own = Path(file_name(text) if is_remote(text) else text)
    return own.stem if own.suffix == ".gguf" else own.name if is_remote(text) else own.resolve().name, text
