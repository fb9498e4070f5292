"""What a table's columns show of themselves: ranges, counts, and the supports that can be known from values alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowpath.supports import Support, integer, interval, lattice, positive, real
from flowpath.tables.columns import Schema, is_frame
from flowpath.tables.layout import Layout, resolve
from flowpath.training.rows import table

_REPEATS = 2.0  # on a lattice that is more than chance, a value comes so many times on average
_NEAR = 0.1  # a bound is believed where the data come this near to it, as a share of their range
_SPIKE = 0.05  # a continuum has no value that so many rows share
_FIT = 0.01  # how far off the lattice values may lie, in steps: they are rounded to a few digits
_TOUCH = "values on the open bound: see at_bound"


@dataclass(frozen=True)
class Column:
    """One column in numbers.

    Attributes:
        name, dtype: of the column.
        low, high: its range, NaN where nothing is finite.
        distinct, missing: how many different values, and how many missing ones.
        support: given, or proposed.
        note: what a density would stumble over, or "".
    """

    name: str
    dtype: str
    low: float
    high: float
    distinct: int
    missing: int
    support: Support
    note: str = ""


def infer_supports(data: Any, *, show: bool = True) -> dict[Any, Support]:
    """Propose supports from the values: whole numbers, lattices, and 0 and 1 as bounds. Nothing is applied.

    What values cannot tell is not proposed: other bounds, or that a column is positive whose values stay far from 0. A
    lattice is proposed where each value comes twice or more on average and all lie on equal steps.

    Args:
        data: a pandas or polars DataFrame, or an array `(N, D)`.
        show: print the table of columns.

    Returns:
        A support for each column that shows one, by name (by position for arrays): pass it, or what you make of it, as
        `supports=` of `FlowDensity`.

    Raises:
        TypeError, ValueError: columns that are no numbers, named; an empty table.

    Example:
        >>> import numpy as np, flowpath as fp
        >>> x = np.random.default_rng(0).exponential(size=(500, 2))
        >>> x[:, 1] = x[:, 1].round()
        >>> fp.infer_supports(x, show=False)
        {0: positive(), 1: integer(0)}
    """
    found = columns(data)
    if show:
        sys.stdout.write(_text(found, "proposed support") + "\n")
    labels = Schema.of(data).labels if is_frame(data) else range(len(found))
    return {label: c.support for label, c in zip(labels, found, strict=True) if c.support != real()}


def describe(data: Any, supports: Any = None) -> str:
    """The table of columns as text: name, dtype, min, max, distinct, missing, support, note.

    Args:
        data: a pandas or polars DataFrame, or an array `(N, D)`.
        supports: as `FlowDensity` takes them; with None those that `infer_supports` would propose are shown.

    Example:
        >>> import polars as pl, flowpath as fp
        >>> print(fp.tables.describe(pl.DataFrame({"n": [3, 0, 4]}), {"n": fp.integer(0)}))
        column  dtype  min  max  distinct  missing  support
        n       Int64  0    4    3         0        integer(0)
    """
    return _text(columns(data, supports), "proposed support" if supports is None else "support")


def columns(data: Any, supports: Any = None) -> list[Column]:
    """Each column in numbers, with the support given for it or, with None, the one its values show."""
    values, _ = table(data, "columns", "the table")
    array = values.numpy()
    schema = Schema.of(data if is_frame(data) else np.asarray(array))
    given = None if supports is None else resolve(supports, schema.names)
    pairs = zip(schema.names, schema.dtypes, strict=True)
    return [_column(n, d, array[:, j], None if given is None else given[j]) for j, (n, d) in enumerate(pairs)]


def _column(name: str, dtype: str, values: np.ndarray, given: Support | None) -> Column:
    finite = values[np.isfinite(values)]
    distinct, counts = np.unique(finite, return_counts=True)
    low, high = (float(distinct[0]), float(distinct[-1])) if len(distinct) else (math.nan, math.nan)
    support = given or (_known(distinct, len(finite)) if len(distinct) > 1 else real())
    missing = int(np.isnan(values).sum())
    return Column(name, dtype, low, high, len(distinct), missing, support, _note(support, distinct, counts))


def _known(distinct: np.ndarray, rows: int) -> Support:
    """The support that sorted distinct values of so many rows show."""
    low, high = float(distinct[0]), float(distinct[-1])
    if bool((distinct == distinct.round()).all()) and np.abs(distinct).max() < 2**53:
        return integer(0 if low >= 0 else None, 1 if low >= 0 and high <= 1 else None)
    if rows >= _REPEATS * len(distinct):
        found = _lattice(distinct)
        if found is not None:
            return found
    reach = _NEAR * (high - low)
    if low >= 0 and high <= 1 and low <= reach and 1 - high <= reach:
        return interval(0, 1)
    return positive() if 0 <= low <= reach else real()


def _lattice(distinct: np.ndarray) -> Support | None:
    """The coarsest lattice that all values lie on, up to rounding; two values alone are a flag with both as bounds."""
    gap = float(np.diff(distinct).min())
    if len(distinct) == 2:
        step = _tidy(gap, 4)
        low, high = (round(v, 6 - math.floor(math.log10(step))) for v in distinct.tolist())
        return lattice(step, low, lo=low, hi=high)
    span = float(distinct[-1] - distinct[0])
    for step in (_tidy(gap, 1), _tidy(gap, 2), span / round(span / gap)):
        k = (distinct - distinct[0]) / step
        off = k - k.round()
        shift = 0.5 * float(off.min() + off.max())
        if float(np.abs(off - shift).max()) <= 0.5 * _FIT and bool((np.diff(k.round()) > 0).all()):
            return lattice(step, _tidy_offset(float(distinct[0]) + shift * step, step))
    return None


def _tidy(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _tidy_offset(value: float, step: float) -> float:
    """The lattice point nearest 0, to a thousandth of a step."""
    return round(value - step * round(value / step), 3 - math.floor(math.log10(step)))


def _note(support: Support, distinct: np.ndarray, counts: np.ndarray) -> str:
    if len(distinct) < 2:
        return "constant: drop it, or use it as context" if len(distinct) else "holds nothing"
    layout, values = Layout([support]), torch.from_numpy(distinct)[:, None]
    outside = int((counts * layout.outside(values)[:, 0].numpy()).sum())
    if outside:
        return f"{outside} {'row' if outside == 1 else 'rows'} outside"
    touching = int((counts * layout.on_bound(values)[:, 0].numpy()).sum())
    if touching:
        return f"{touching} {_TOUCH}"
    top = int(counts.argmax())
    if not support.is_lattice and counts[top] > max(_SPIKE * counts.sum(), 2):
        return f"{counts[top] / counts.sum():.0%} of the rows share the value {distinct[top]:g}: no density has that"
    return ""


def _text(found: Sequence[Column], title: str) -> str:
    """The columns as aligned text; the notes only where there are any."""
    head = ["column", "dtype", "min", "max", "distinct", "missing", title, "note"]
    lines = [
        [c.name, c.dtype, f"{c.low:.6g}", f"{c.high:.6g}", str(c.distinct), str(c.missing), repr(c.support), c.note]
        for c in found
    ]
    rows = [head, *lines] if any(c.note for c in found) else [line[:-1] for line in [head, *lines]]
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return "\n".join("  ".join(w.ljust(n) for w, n in zip(row, widths, strict=True)).rstrip() for row in rows)
