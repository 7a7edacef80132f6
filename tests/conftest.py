"""What every test needs before the heavy libraries are imported: no network, no progress bars, few threads, Ctrl+C."""

import os
import signal

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def _take_ctrl_c() -> None:
    """A job in the background of a shell ignores Ctrl+C, and so would the processes that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
