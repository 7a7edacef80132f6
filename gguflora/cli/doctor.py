"""``gguflora doctor``."""

from __future__ import annotations

from gguflora.cli.app import app, console
from gguflora.doctor import describe_machine


@app.command()
def doctor() -> None:
    """Say what this machine offers and what is installed.

    **Example**

    gguflora doctor
    """
    for line in describe_machine():
        console.print(line, markup=False)
