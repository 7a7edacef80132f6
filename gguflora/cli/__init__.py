"""The command line: options in, one function of the library called, its report printed.

Each module registers its command on the application when it is imported; ``--help`` lists them in the order below. It
is the only list of them.
"""

from gguflora.cli.app import main

from gguflora.cli import (  # noqa: F401  # isort: skip
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

__all__ = ["main"]
