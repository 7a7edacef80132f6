"""Install Snakemake and DVC, with which the tests run the examples for them, into an environment of their own.

They want older versions of packages that the tests need, so they cannot share an environment. This prints the directory
of their programs; a second run finds them there.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

WANTED = "snakemake==9.27.1", "dvc==3.67.1"
PROGRAMS = "snakemake", "dvc"


def programs_dir() -> Path:
    """The directory of the programs, which belongs to these versions and this Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = "-".join(name.replace("==", "-") for name in WANTED)
    return cache / "gguflora" / f"{versions}-python-{sys.version_info.major}.{sys.version_info.minor}" / "bin"


def main() -> None:
    """Print the directory, after installing what is missing."""
    target = programs_dir()
    if not all((target / name).exists() for name in PROGRAMS):
        shutil.rmtree(target.parent, ignore_errors=True)
        venv.create(target.parent, with_pip=True)
        try:
            subprocess.run([target / "python", "-m", "pip", "install", "--quiet", *WANTED], check=True)
        except BaseException:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise
    print(target)


if __name__ == "__main__":
    main()
