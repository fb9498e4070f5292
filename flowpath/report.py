"""One self-contained HTML page about a fit: the verdict first, then figures, findings, tables and settings."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowpath import plot, tables
from flowpath.diagnostics import Report, check, hpd_level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowpath.density import FlowDensity

FILES = ("report.html", "pairs.png", "calibration.png", "history.png")  # what `Judged.write` leaves
_DRAWS, _LEVELS = 5000, 2000  # rows in the pair plot, and of which the credible levels are drawn
_COLUMNS = 8  # panels a side of the pair plot
_DPI = 110
_WIDE, _LONG = 720, 24  # pixels and letters from which a small screen scrolls rather than squeezes
_ASKED = {"epochs": "epochs at most", "steps": "steps at most"}  # settings that share a name with what came of them
_WHERE = {"validation": "early-stopping", "train": "training"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5b6475; --line: #d9dde5; --paper: #fff;
  --good: #2c7a4b; --doubt: #a3640f; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --soft: #a7afbf; --line: #3a4150; --paper: #161a22;
  --good: #63c08a; --doubt: #e0a64b; --bad: #ef7f76; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { padding: .8rem 1rem; border-left: .4rem solid var(--good); border-radius: .2rem; font-size: 1.1rem;
  background: color-mix(in srgb, var(--good) 10%, var(--paper)); }
.verdict.doubt { border-color: var(--doubt); background: color-mix(in srgb, var(--doubt) 12%, var(--paper)); }
.verdict.fail { border-color: var(--bad); background: color-mix(in srgb, var(--bad) 12%, var(--paper)); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: .5rem 0; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .2rem; }
.text { min-width: min(16rem, 45vw); }
@media (max-width: 40rem) { img.wide { max-width: none; width: 40rem; } }
figcaption { color: var(--soft); font-size: .9rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.grade { font-weight: 600; white-space: nowrap; } .pass .grade { color: var(--good); }
.warn .grade { color: var(--doubt); } .fail .grade { color: var(--bad); } .skipped .grade { color: var(--soft); }
footer { margin-top: 2rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 40rem) {
  .findings td { display: inline-block; border: 0; padding: 0 .6rem 0 0; }
  .findings td:last-child { display: block; color: var(--soft); }
  .findings tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
}
"""

Table = Sequence[Mapping[str, Any]]
Picture = Any  # a matplotlib Figure, or the bytes of a PNG


@dataclass(frozen=True)
class Judged:
    """A fitted table estimator looked at on some rows.

    Attributes:
        report: what `fp.check` found.
        figures: caption -> PNG; tables: heading -> rows; settings: of the fit.
    """

    report: Report
    figures: dict[str, bytes]
    tables: dict[str, Table]
    settings: dict[str, Any]

    def write(self, folder: str | os.PathLike[str], title: str) -> Path:
        """Write report.html and the figures into a folder, over what is there; returns the page's path."""
        folder = Path(folder)
        path = write(folder / FILES[0], title, self.report, self.figures, self.tables, self.settings)
        for caption, picture in self.figures.items():
            (folder / _NAMES[caption]).write_bytes(picture)
        return path


_PAIRS, _LEVELS_CAPTION, _HISTORY = (
    "Rows (grey, below the diagonal) and samples (red, above)",
    "Calibration: share of rows within each credible level",
    "Score by epoch",
)
_NAMES = dict(zip((_PAIRS, _LEVELS_CAPTION, _HISTORY), FILES[1:], strict=True))


def judge(
    model: FlowDensity, rows: Any, context: Any = None, weights: Any = None, *, held: str = "test", seed: int = 0
) -> Judged:
    """Check a fitted FlowDensity on rows within its supports, and draw what there is to see.

    Args:
        model: fitted.
        rows: polars DataFrame of its columns. context: likewise, or None. weights: `(N,)` or None.
        held: where the rows come from: "test", "given", "validation" (they chose the weights) or "train".
        seed: of draws and of the rows that are drawn.

    Raises:
        ValueError: no rows, missing values, or values outside the supports.
    """
    cells = model.to_cells(rows)
    given = None if context is None else torch.from_numpy(context.to_numpy().astype(float))
    weights = None if weights is None else np.array(weights, dtype=float)
    found = check(model.flow_, cells, given, weights, rows=_WHERE.get(held, "held out"), seed=seed)
    shown = _some(len(rows), weights, seed)
    under = None if context is None else context[shown]
    drawn = model.sample(len(shown), context=under, random_state=seed)
    names = [*model.schema_.names, *(model.context_names_ or ())][:_COLUMNS]
    figures = {_PAIRS: _png(plot.pairs(_beside(rows[shown], under), _beside(drawn, under), names))}
    if found.sound:
        few, some = 1000 if given is None else 200, shown[:_LEVELS]
        levels = _credible(model, cells[some], None if given is None else given[some], few, seed)
        figures[_LEVELS_CAPTION] = _png(plot.calibration(levels, draws=few))
    if len(model.result_.history) > 1:
        figures[_HISTORY] = _png(plot.history({"": model.result_.history}))
    return Judged(found, figures, {f"Columns of the {len(rows)} rows": _columns(model, rows)}, _settings(model))


def _some(count: int, weights: Any, seed: int) -> np.ndarray:
    """Rows to draw, by the seed; weighted rows are drawn by their weights."""
    chance = np.random.default_rng(seed)
    w = None if weights is None else np.clip(np.asarray(weights, dtype=float), 0.0, None)
    if w is None or not w.sum() > 0:
        return chance.permutation(count)[:_DRAWS]
    return chance.choice(count, min(count, _DRAWS), p=w / w.sum())


def _credible(model: FlowDensity, cells: Tensor, given: Tensor | None, draws: int, seed: int) -> np.ndarray:
    """The credible level of each row."""
    like = next(model.flow_.parameters(), model.flow_.base.like)
    context = None if given is None else given.to(like.device, like.dtype)
    levels = hpd_level(model.flow_, cells.to(like.device, like.dtype), context, draws=draws, seed=seed)
    return levels.cpu().numpy()


def _beside(table: Any, context: Any) -> np.ndarray:
    """Columns, then those of the context, as numbers: as many as the pair plot has room for."""
    parts = [t.to_numpy().astype(float) for t in (table, context) if t is not None]
    return np.concatenate(parts, 1)[:, :_COLUMNS]


def _columns(model: FlowDensity, rows: Any) -> Table:
    found = tables.columns(rows, list(model.supports_))
    titles = {"name": "column", "low": "min", "high": "max"}
    kept = [{titles.get(k, k): v for k, v in vars(c).items()} for c in found]
    return kept if any(c.note for c in found) else [{k: v for k, v in row.items() if k != "note"} for row in kept]


def _settings(model: FlowDensity) -> dict[str, Any]:
    """How the fit came about, one plain value a line."""
    result, architecture = model.result_, model.architecture
    scores = {n: v for n, v in (("test", result.test_log_prob), ("validation", result.validation_log_prob)) if v}
    return {
        **{f"{name} score, nats a row": v for name, v in scores.items()},
        **{f"rows {name}" if name != "rows" else "rows passed": v for name, v in model.counts_.items()},
        **({"context": ", ".join(model.context_names_)} if model.context_names_ else {}),
        "architecture": architecture if isinstance(architecture, str) else architecture.__name__,
        "seed": result.seed,
        "device": result.device + (", compiled" if result.compiled else ""),
        "epochs": f"{result.epochs}, the weights are those of epoch {result.best_epoch or result.epochs}",
        "steps": result.steps,
        "batches skipped as not finite": result.skipped,
        "seconds": round(result.seconds, 1),
        "ended": result.stop_reason,
        **{_ASKED.get(name, name.replace("_", " ")): v for name, v in result.settings.items() if v is not None},
        **{f"note {i}": note for i, note in enumerate([*model.notes_, *result.notes], 1)},
        **result.versions,
    }


def page(
    title: str,
    report: Report,
    figures: Mapping[str, Picture] | None = None,
    tables: Mapping[str, Table] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML text; figures are embedded, nothing is fetched when it is opened.

    Args:
        title: the page's heading.
        report: what `fp.check` found.
        figures: caption -> matplotlib Figure, or the bytes of a PNG.
        tables: heading -> rows, each a mapping of column to value.
        settings: names and values, shown last.

    Example:
        >>> import torch, flowpath as fp
        >>> from flowpath.report import page
        >>> text = page("A Gaussian", fp.check(fp.gaussian(2), torch.zeros(10, 2)))
        >>> text.startswith("<!doctype html>")
        True
    """
    doubt = any(p.grade == "warn" for p in report.parts)
    tone = "fail" if not report.sound else "doubt" if doubt else "good"
    shown = "".join(_figure(caption, figure) for caption, figure in (figures or {}).items())
    parts = [
        f'<h1>{html.escape(title)}</h1><p class="verdict {tone}">{html.escape(report.verdict)}</p>',
        *([f'<div class="figures">{shown}</div>'] if shown else []),
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
    return f'<h2>Findings on {report.rows} rows</h2><div class="scroll"><table class="findings">{rows}</table></div>'


def _figure(caption: str, figure: Picture) -> str:
    picture = figure if isinstance(figure, bytes) else _png(figure)
    text = base64.b64encode(picture).decode("ascii")
    label = html.escape(caption)
    wide = ' class="wide"' if int.from_bytes(picture[16:20], "big") > _WIDE else ""  # the width in a PNG's header
    shown = f'<img{wide} alt="{label}" src="data:image/png;base64,{text}">'
    return f'<figure><figcaption>{label}</figcaption><div class="scroll">{shown}</div></figure>'


def _png(figure: Figure) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=_DPI, bbox_inches="tight")
    return held.getvalue()


def _table(rows: Table) -> str:
    if not rows:
        return "<p>none</p>"
    names = list(rows[0])
    numbers = {n for n in names if all(_is_number(row.get(n)) for row in rows)}
    head = "".join(f"<th{_class(n in numbers)}>{html.escape(n)}</th>" for n in names)
    body = "".join("<tr>" + "".join(_cell(row.get(n), n in numbers) for n in names) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any, number: bool) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"<td{_class(number) or _class(len(text) > _LONG, 'text')}>{html.escape(text)}</td>"


def _class(holds: bool, name: str = "number") -> str:
    return f' class="{name}"' if holds else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
