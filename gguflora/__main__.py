"""``python -m gguflora``."""

from gguflora.cli import main

main()
