"""The command line: options in, one function of the library called, its report printed.

Each module registers its command on the application when it is imported; ``--help`` lists them in this order.
"""

from gguflora.cli.app import main

from gguflora.cli import (  # isort: skip
    convert,
    merge,
    apply_patch,
    unmerge,
    compare,
    inspect,
    combine,
    resize,
    extract,
    export,
    diff,
    pipeline,
    run,
    serve,
    doctor,
    demo,
)

__all__ = [
    "apply_patch",
    "combine",
    "compare",
    "convert",
    "demo",
    "diff",
    "doctor",
    "export",
    "extract",
    "inspect",
    "main",
    "merge",
    "pipeline",
    "resize",
    "run",
    "serve",
    "unmerge",
]
