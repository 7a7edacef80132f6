"""Run the command line with ``python -m gguflora``."""

from gguflora.cli import main

main()
