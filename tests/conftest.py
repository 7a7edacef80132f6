"""What every test needs before the heavy libraries are imported: no network, no progress bars, few threads, Ctrl+C."""

import contextlib
import os
import signal
import sys

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

with contextlib.suppress(ImportError):
    import llama_cpp  # noqa: F401  (before torch, in every process of tests)

pytest.register_assert_rewrite("support")

from support import ROOT  # noqa: E402

sys.path.append(str(ROOT))  # for tools; last, since an installed gguflora is compiled and the sources may not be

# the same examples everywhere, and no verdict on how fast the machine is
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _take_ctrl_c() -> None:
    """A job in the background of a shell ignores Ctrl+C, and so would the processes that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
