"""Merge every adapter below a folder at several scales, in processes of one machine or on a Dask cluster.

python process_pool.py base.gguf adapters out
python process_pool.py base.gguf adapters out tcp://head:8786
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gguflora

SCALES = (0.5, 1.0)


def merge(base: str, adapter: str, scale: float, out: str) -> tuple[str, float]:
    """Merge one adapter; return the output and the share of the adapter's change that the quant types keep."""
    report = gguflora.merge(base, [(adapter, scale)], out, threads=1, force=True)
    return out, report.total.retention


def main(base: str, adapters: str, out: str, scheduler: str | None = None) -> None:
    """Merge all and print what became of each."""
    Path(out).mkdir(exist_ok=True)
    folders = sorted(path.parent for path in Path(adapters).glob("*/adapter_config.json"))
    jobs = [(base, str(folder), scale, f"{out}/{folder.name}-x{scale}.gguf") for folder in folders for scale in SCALES]
    if scheduler is None:
        with ProcessPoolExecutor() as pool:
            results = list(pool.map(merge, *zip(*jobs, strict=True)))
    else:
        from distributed import Client  # noqa: PLC0415  (only here is Dask needed)

        with Client(scheduler) as client:
            results = client.gather(client.map(merge, *zip(*jobs, strict=True)))
    for name, retention in results:
        print(f"{name}: {retention:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
