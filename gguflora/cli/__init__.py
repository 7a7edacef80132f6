"""The command line: each command calls one function of the library and prints its report.

A module registers its command on the application when it is imported. The list below is the only one, and ``--help``
shows the commands in its order. To add a command, write its module and add one line here.
"""

from gguflora.cli.app import main

from gguflora.cli import (  # noqa: F401  # isort: skip
    convert,
    merge,
    quantize,
    imatrix,
    apply_patch,
    unmerge,
    compare,
    inspect,
    combine,
    resize,
    extract,
    export,
    diff,
    train,
    pipeline,
    run,
    serve,
    doctor,
    demo,
)

__all__ = ["main"]
