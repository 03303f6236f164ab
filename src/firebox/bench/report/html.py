"""A report as one HTML file that needs nothing else: no script, style, font or picture from elsewhere.

plotly draws; its script is inside the file, which is why the file has some 5 MB.
"""

from __future__ import annotations

from html import escape
from typing import Any

from firebox.bench.report.base import Report
from firebox.bench.report.columns import table
from firebox.bench.report.plots import figures
from firebox.errors import ConfigError

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
body { color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d8dee4; text-align: left; }
td.number { text-align: right; white-space: nowrap; }
tr.bad td { background: #fff1ef; } tr.bad td.verdict { color: #b42318; font-weight: 600; }
.note { color: #57606a; } .plot { margin: 1rem 0; }
"""


def html(report: Report) -> str:
    """The page. Raises ConfigError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            "an HTML report needs plotly", hint="pip install 'firebox[report]', or --markdown FILE"
        ) from error
    plots = "\n".join(_plot(title, figure) for title, figure in figures(report))
    origin = f"{report.url}, {report.began}, Firebox {report.firebox}, seed {report.seed}"
    title = escape(f"{report.model}: {report.profile}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="icon" href="data:,"><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{title}</h1>
<p class="note">{escape(origin)}. Wall is throughput; sum is the rate of one answer times the concurrency,
which others call throughput. “=” marks rows whose throughput the 95 % intervals do not tell from the best. A
row whose output failed a guard has a verdict instead of numbers.</p>
{_table(report)}
{_reasons(report)}
{plots}
</body></html>
"""


def _table(report: Report) -> str:
    shown = table(report.rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in shown.headers)
    kinds = dict.fromkeys(shown.numeric, "number") | {shown.numeric[0]: "number verdict"}
    body = []
    for row, cells in zip(report.rows, shown.cells, strict=True):
        columns = "".join(
            f'<td class="{kinds.get(index, "")}">{escape(cell)}</td>' for index, cell in enumerate(cells)
        )
        body.append(f'<tr class="{"" if row.verdict == "ok" else "bad"}">{columns}</tr>')
    return (
        f'<p class="note">{escape(shown.caption)}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _reasons(report: Report) -> str:
    items = [
        f"<li>concurrency {row.concurrency}, <b>{escape(row.verdict)}</b>: {escape(why)}</li>"
        for row in report.rows
        for why in row.why + row.notes
    ]
    items += [f'<li class="note">{escape(note)}</li>' for note in report.notes]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _plot(title: str, figure: Any) -> str:
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return f'<h2>{escape(title)}</h2><div class="plot">{drawn}</div>'
