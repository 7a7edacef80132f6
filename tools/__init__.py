"""Programs for developers, run from the root of the repository: ``python -m tools.bench``.

``python -m`` finds the sources in the working directory first. Where they have no compiled extension beside them
(``python tools/build_backend.py --inplace`` puts it there), they step behind an installed gguflora.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

if not any((ROOT / "gguflora").glob("_gguflora*.so")):
    sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT), str(ROOT)]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))  # for tests/support
