"""The commands of ``python -m tools.bench``, one module for each; README.md says which table each one makes."""
