"""Write a pipeline's report as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

from gguflora.files.atomic import atomic_output
from gguflora.files.strict_json import to_json
from gguflora.pipeline.results import PipelineReport, StepResult

_COLOURS: Final = {"done": "#2e7d32", "kept": "#607d8b", "planned": "#607d8b", "failed": "#c62828", "left": "#ef6c00"}
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .6rem; overflow: auto; max-height: 20rem; font-size: 12px }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { background: #242424 } }
"""


def write_html(path: Path, report: PipelineReport) -> None:
    """Write the page.

    Raises:
        OutputError: if it cannot be written.
    """
    counts = {status: sum(result.status == status for result in report.results) for status in _COLOURS}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no jobs"
    title = escape(f"{report.recipe.name}: {summary}")
    rows = "\n".join(_row(report, result) for result in report.results)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>Outputs in {escape(str(report.output))}; took {report.seconds:.1f} s.</p>
{_bars(report)}
<table><thead><tr><th>step</th><th>output</th><th>status</th><th>seconds</th><th>report</th></tr></thead>
<tbody>
{rows}
</tbody></table></body></html>
"""
    with atomic_output(path) as file:
        file.write(page.encode(errors="backslashreplace"))


def _row(report: PipelineReport, result: StepResult) -> str:
    content = escape(to_json(result.report, indent=2)) if result.report else ""
    details = f"<details><summary>show</summary><pre>{content}</pre></details>" if content else ""
    error = f"<br>{escape(result.error)}" if result.error else ""
    colour = _COLOURS[result.status]
    return (
        f"<tr><td>{escape(result.step)}</td><td>{escape(report.name_of(result))}</td>"
        f'<td style="color:{colour}">{result.status}{error}</td>'
        f'<td class="number">{result.seconds:.2f}</td><td>{details}</td></tr>'
    )


def _bars(report: PipelineReport) -> str:
    """Return a bar chart of the wall time of each job that ran."""
    ran = [result for result in report.results if result.seconds > 0]
    if not ran:
        return ""
    longest, height = max(result.seconds for result in ran), 18
    bars = "".join(
        f'<rect x="0" y="{number * height}" width="{600 * result.seconds / longest:.1f}" height="{height - 4}" '
        f'fill="{_COLOURS[result.status]}"><title>{escape(report.name_of(result))}: {result.seconds:.2f} s</title>'
        "</rect>"
        for number, result in enumerate(ran)
    )
    return f'<svg viewBox="0 0 600 {height * len(ran)}" role="img" aria-label="seconds of each job">{bars}</svg>'
