"""What several tests share: builders of models and adapters, oracles, servers, assertions. No test is in here."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
