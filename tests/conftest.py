"""What every test needs before the heavy libraries are imported: no network, no progress bars, few threads, Ctrl+C."""

import contextlib
import os
import runpy
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

HIDDEN = Path(__file__).parent / "support/hidden"
if os.environ.get("GGUFLORA_TEST_HIDE", "0") != "0":  # as on a system without most system calls
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HIDDEN), os.environ.get("PYTHONPATH")]))
    runpy.run_path(str(HIDDEN / "sitecustomize.py"))

with contextlib.suppress(ImportError):
    import llama_cpp  # noqa: F401  (before torch, in every process of tests)

pytest_plugins = ("support.needs", "support.skips")
pytest.register_assert_rewrite("support")

from support import ROOT  # noqa: E402

sys.path.append(str(ROOT))  # for tools; last, since an installed gguflora is compiled and the sources may not be

# the same examples everywhere, and no verdict on how fast the machine is
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option ``--full``."""
    parser.addoption("--full", action="store_true", help="run the tests marked `full`, too, which take long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless it is asked for."""
    if config.option.full or "full" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def _take_ctrl_c() -> None:
    """A job in the background of a shell ignores Ctrl+C, and so would the processes that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
