"""One self-contained HTML page about a fit: the verdict first, then figures, tables and settings."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowpath.diagnostics import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --line: #d9dde5; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --soft: #a7afbf; --line: #3a4150; --paper: #161a22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { padding: .8rem 1rem; border-left: .4rem solid #2c7a4b; border-radius: .2rem; font-size: 1.1rem;
  background: color-mix(in srgb, #2c7a4b 10%, var(--paper)); }
.verdict.doubt { border-color: #b7791f; background: color-mix(in srgb, #b7791f 12%, var(--paper)); }
.verdict.fail { border-color: #b3372f; background: color-mix(in srgb, #b3372f 12%, var(--paper)); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
.grade { font-weight: 600; white-space: nowrap; } td { overflow-wrap: break-word; min-width: 4.5rem; } .pass .grade { color: #2c7a4b; } .warn .grade { color: #b7791f; }
.fail .grade { color: #b3372f; } .skipped .grade { color: var(--soft); }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .2rem; }
figcaption { color: var(--soft); font-size: .9rem; } footer { margin-top: 2rem; color: var(--soft); font-size: .8rem; }
"""

Table = Sequence[Mapping[str, Any]]


def page(
    title: str,
    report: Report,
    figures: Mapping[str, Figure] | None = None,
    tables: Mapping[str, Table] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML text; figures are embedded, nothing is fetched when it is opened.

    Args:
        title: the page's heading.
        report: what `fp.check` found.
        figures: caption -> matplotlib Figure.
        tables: heading -> rows, each a mapping of column to value.
        settings: names and values, shown last.

    Example:
        >>> import torch, flowpath as fp
        >>> from flowpath.report import page
        >>> text = page("A Gaussian", fp.check(fp.gaussian(2), torch.zeros(10, 2)))
        >>> text.startswith("<!doctype html>")
        True
    """
    tone = "" if report.sound and not any(p.grade == "warn" for p in report.parts) else "doubt"
    tone = tone if report.sound else "fail"
    parts = [
        f'<h1>{html.escape(title)}</h1><p class="verdict {tone}">{html.escape(report.verdict)}</p>',
        *(_figure(caption, figure) for caption, figure in (figures or {}).items()),
        _findings(report),
        *(f"<h2>{html.escape(name)}</h2>{_table(rows)}" for name, rows in (tables or {}).items()),
    ]
    if settings:
        rows = [{"setting": k, "value": v} for k, v in settings.items()]
        parts.append(f"<h2>Settings and versions</h2>{_table(rows)}")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return (
        head + "<body>" + "\n".join(parts) + "<footer>Made by flowpath. Log densities in nats.</footer></body></html>"
    )


def write(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Path:
    """Write `page(...)` to a file; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(*args, **kwargs), encoding="utf-8")
    return path


def _findings(report: Report) -> str:
    rows = "".join(
        f'<tr class="{p.grade}"><td class="grade">{p.grade}</td><td>{html.escape(p.name)}</td>'
        f"<td>{html.escape(p.says)}</td></tr>"
        for p in report.parts
    )
    return f'<h2>Findings on {report.rows} rows</h2><div class="scroll"><table>{rows}</table></div>'


def _figure(caption: str, figure: Figure) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110, bbox_inches="tight")
    text = base64.b64encode(held.getvalue()).decode("ascii")
    label = html.escape(caption)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{text}"><figcaption>{label}</figcaption></figure>'


def _table(rows: Table) -> str:
    if not rows:
        return "<p>none</p>"
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(_cell(row.get(n)) for n in names) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.6g}</td>'
    return (
        f'<td class="number">{value}</td>'
        if isinstance(value, int) and not isinstance(value, bool)
        else (f"<td>{html.escape(str(value))}</td>")
    )
