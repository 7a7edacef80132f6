"""The demo's table on a real model: ``tools/demo --real``, or ``python -m tools.real_demo``.

The model is SmolLM2-135M-Instruct (Q4_1), fetched once from PyPI by `tools.real_models`. The two adapters beside this
file, of rank 4, are PEFT's; `tools.make_real_demo` trains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguflora.cli.app import print_report
from gguflora.cli.demo import print_demo
from gguflora.diagnostics.demo import Demo
from tools.real_models import CannotFetchError, real_model

HERE = Path(__file__).parent / "real_demo_adapters"
ADAPTERS = ("shout", "verse")
QUESTION = "What does the fox eat?"


def chat_prompt(question: str) -> str:
    """Return a question in SmolLM2's chat template."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = (("system", system), ("user", question))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def main(
    keep: Annotated[Path | None, typer.Option(help="Directory in which to keep the GGUF files.")] = None,
    question: Annotated[str, typer.Option(help="Question to the base and each adapter.")] = QUESTION,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert, merge and hot-swap two small adapters on SmolLM2-135M-Instruct."""
    try:
        base = real_model("smollm2")
    except CannotFetchError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    demo = Demo(base, {name: HERE / name for name in ADAPTERS})
    print_report(demo.run(keep, prompt=chat_prompt(question)), print_demo, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
