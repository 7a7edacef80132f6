"""Options that several commands share, and functions that parse their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from gguflora.files.remote import file_name, is_remote

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, for scripts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
TrustNames = Annotated[
    bool,
    typer.Option(
        "--trust-names", help="Match tensors by name and shape even where the order of their rows is not known."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Of a multimodal model's adapter, take only the language model's part.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Number of threads; default: from the usable cores.")
]
OutType = Annotated[
    Literal["auto", "f32", "f16", "bf16", "q8_0"],
    typer.Option(help="Type of the factors in a GGUF file; auto: f16 if that is exact, else f32."),
]
AdapterOut = Annotated[Path, typer.Option("-o", "--out", help="GGUF LoRA file (.gguf) or PEFT directory to write.")]
Base = Annotated[str, typer.Option(metavar="PATH", help="Base model: a GGUF file, or a directory with config.json.")]
AdapterBase = Annotated[
    str | None, typer.Option(metavar="PATH", help="Base model, required to go from PEFT to GGUF or back.")
]
Lora = Annotated[
    list[str] | None, typer.Option(metavar="PATH", help="Adapter: PEFT directory or GGUF LoRA. Repeatable.")
]
LoraScaled = Annotated[list[str] | None, typer.Option(metavar="PATH:SCALE", help="Adapter and its scale. Repeatable.")]
Task = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=NUMBER", help="Task of a MULTITASK_PROMPT_TUNING adapter, from 0. Repeatable."),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=TYPE",
        help="Type of tensors in whose names a regular expression is found, instead of the preset's. Repeatable.",
    ),
]
Pure = Annotated[bool, typer.Option("--pure", help="Give all tensors the preset's main type.")]
OutputTensorType = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Type of the output weight, instead of the preset's.")
]
TokenEmbeddingType = Annotated[
    str | None, typer.Option(metavar="TYPE", help="Type of the token embedding, instead of the preset's.")
]
Context = Annotated[
    int | None, typer.Option(min=8, help="Size of the context in tokens; default: the model's, up to 4096.")
]


ChatTemplate = Annotated[
    Literal["adapter", "base"] | None,
    typer.Option(
        help="Whose chat template is used; default: the adapter's, if those of a request have one that differs."
    ),
]
ChatTemplateFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Chat template in Jinja, in place of the base's and the adapter's.")
]


def scaled_paths(lora: Sequence[str] | None, lora_scaled: Sequence[str] | None) -> list[tuple[str, float]]:
    """Parse the values of ``--lora PATH`` and ``--lora-scaled PATH:SCALE``.

    Returns:
        Path and scale of each adapter.

    Raises:
        typer.BadParameter: if there is no adapter, or a scale is missing or not a number.
    """
    adapters = [(path, 1.0) for path in lora or ()] + [_split_scale(text, "PATH:SCALE") for text in lora_scaled or ()]
    if not adapters:
        raise typer.BadParameter("name at least one adapter with --lora or --lora-scaled")
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


def tensor_types(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Parse the values of ``--tensor-type PATTERN=TYPE``.

    Raises:
        typer.BadParameter: if a pattern or type is missing.
    """
    pairs = [text.partition("=") for text in texts or ()]
    for pattern, equals, name in pairs:
        if not pattern or not name:
            raise typer.BadParameter(
                f"--tensor-type is {pattern + equals + name!r}, expected PATTERN=TYPE, for example attn_v=q8_0"
            )
    return [(pattern, name) for pattern, _, name in pairs]


def named_adapters(texts: Sequence[str] | None) -> dict[str, str]:
    """Parse the values of ``--lora [NAME=]PATH``; the default name is that of the file or directory.

    Returns:
        Paths by name.

    Raises:
        typer.BadParameter: if a name or path is empty, or a name is given twice.
    """
    paths: dict[str, str] = {}
    for text in texts or ():
        name, path = _split_name(text)
        if not name or not file_name(path):
            raise typer.BadParameter(f"the adapter is {text!r}, expected NAME=PATH, for example legal=legal.gguf")
        if name in paths:
            raise typer.BadParameter(f"two adapters are named {name!r}; give them different names with NAME=PATH")
        paths[name] = path
    return paths


def named_aliases(texts: Sequence[str] | None) -> dict[str, str | None]:
    """Parse the values of ``--alias NAME[=SET]``; several names may be separated by commas, as in llama-server.

    Returns:
        The text of each set by name; None for the default set.

    Raises:
        typer.BadParameter: if a name or set is empty, or a name is given twice.
    """
    aliases: dict[str, str | None] = {}
    for text in texts or ():
        names, equals, target = text.partition("=")
        for name in (each.strip() for each in names.split(",")):
            if not name or (equals and not target):
                raise typer.BadParameter(
                    f"--alias is {text!r}, expected NAME or NAME=SET, for example gpt-4o=legal@0.5"
                )
            if name in aliases:
                raise typer.BadParameter(f"the alias {name!r} is given twice")
            aliases[name] = target or None
    return aliases


def named_tasks(texts: Sequence[str] | None) -> dict[str, int]:
    """Parse the values of ``--task NAME=NUMBER``.

    Returns:
        Task numbers by adapter name.

    Raises:
        typer.BadParameter: if a name is missing, or a number is not a whole number.
    """
    pairs = [text.rpartition("=") for text in texts or ()]
    for name, equals, number in pairs:
        if not name or not number.isdecimal():
            raise typer.BadParameter(
                f"--task is {name + equals + number!r}, expected NAME=NUMBER, for example support=2"
            )
    return {name: int(number) for name, _, number in pairs}


def named_and_scaled(lora: Sequence[str] | None, lora_scaled: Sequence[str] | None) -> dict[str, tuple[str, float]]:
    """Parse the values of ``--lora [NAME=]PATH`` and ``--lora-scaled [NAME=]PATH:SCALE``.

    Returns:
        Path and scale of each adapter, by name.

    Raises:
        typer.BadParameter: if a name or path is empty, a name is given twice, or a scale is not a number.
    """
    pairs = [_split_scale(text, "[NAME=]PATH:SCALE") for text in lora_scaled or ()]
    paths = named_adapters([*(lora or ()), *(path for path, _ in pairs)])
    scales = [1.0] * len(lora or ()) + [scale for _, scale in pairs]
    return {name: (path, scale) for (name, path), scale in zip(paths.items(), scales, strict=True)}


def _split_name(text: str) -> tuple[str, str]:
    """Split NAME=PATH; a URL has no name in front, but may contain equals signs."""
    name, equals, path = text.partition("=")
    if equals and not is_remote(text):
        return name, path
    location = Path(file_name(text) if is_remote(text) else text)
    if location.suffix == ".gguf":
        return location.stem, text
    return location.name if is_remote(text) else location.resolve().name, text
