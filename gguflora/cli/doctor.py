"""``gguflora doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguflora
from gguflora.cli.app import app, console, print_report
from gguflora.cli.options import AsJson

if TYPE_CHECKING:
    from gguflora.diagnostics.doctor import DoctorReport


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show the kernels, quant types, packages and limits of this machine, for a report of a fault.

    **Example**

    gguflora doctor
    """
    print_report(gguflora.doctor(), _print_machine, as_json=as_json)


def _print_machine(report: DoctorReport) -> None:
    lines = [
        f"gguflora {report.version}, Python {report.python}, {report.platform}",
        f"compiled by {report.compiler}{f'; {report.libc}' if report.libc else ''}",
        f"memory: {report.available_memory / 1e9:.1f} of {report.memory / 1e9:.1f} GB available; cache: {report.cache}",
        f"cpu: {report.cpu}, {report.usable_cores} of {report.cores} cores usable",
        f"kernels: {report.isa} (available: {', '.join(report.isas)}; force one with GGUFLORA_ISA)",
        "type       weights bytes  quantize  imatrix   dequantize  dither",
    ]
    for kind in report.types:
        imatrix, dither = "required" if kind.needs_imatrix else "yes", "yes" if kind.dithers else "no"
        sizes = f"{kind.name:<10} {kind.block_weights:>7} {kind.block_bytes:>5}"
        lines.append(f"{sizes}  {'yes':<8}  {imatrix:<8}  {'yes':<10}  {dither}")
    lines += [f"{package}: {version or 'not installed'}" for package, version in report.packages.items()]
    lines += [f"{name}={value}" for name, value in report.settings.items()]
    if report.runtime:
        lines += ["", "what llama-cpp-python (run, serve, attach, compare, imatrix, train) needs:"]
        lines += [f"- {need}" for need in report.runtime]
    for line in lines:
        console.print(line, markup=False)
