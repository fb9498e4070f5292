"""From what a user passes to a table estimator to float64 rows within their supports, every exception counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowpath.scope import processes
from flowpath.tables.columns import Schema, is_frame, labels_of, near, pick
from flowpath.tables.layout import Layout
from flowpath.training.rows import SHOWN, more, plural, row_weights, table

AtBound = Literal["error", "nudge"]
Missing = Literal["error", "drop"]


@dataclass
class Taken:
    """Rows to fit, and what became of the others.

    Attributes:
        x: `(N, D)`, context `(N, C)` or None, weights `(N,)` or None.
        kept: `(N,)`, their positions in the table that was passed.
        nudges: `(2, D)`, where values on open bounds move.
        counts: rows, missing, nudged, used.
        notes: the same in words, where there is something to say.
    """

    x: Tensor
    context: Tensor | None
    weights: Tensor | None
    kept: Tensor
    nudges: Tensor
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def numbers(value: Any, names: Sequence[str] | None, who: str, what: str) -> Tensor:
    """A table as float64 `(N, D)`, missing values as NaN; a frame's columns are matched by name where names are known.

    Raises:
        TypeError, ValueError: a column that is not there or holds no numbers, an array of another width, infinite
            numbers.
    """
    if names is not None and is_frame(value) and set(names) & set(labels_of(value)):
        value = pick(value, names, f"{who}: {what}")
    values, labels = table(value, who, what)
    if values.dim() != 2 or (names is not None and values.shape[1] != len(names)):
        want = "rows (N, features)" if names is None else f"{len(names)} columns ({', '.join(names)})"
        raise ValueError(f"{who} expects {what} as {want}, got shape {tuple(values.shape)}")
    bad = values.isinf()
    if bool(bad.any()):
        raise ValueError(f"{who}: {what} holds infinity (inf): {_places(values, bad, labels)}; drop these rows")
    return values


def take(
    x: Tensor,
    context: Tensor | None,
    weights: Any,
    layout: Layout,
    names: Sequence[str],
    at_bound: AtBound,
    missing: Missing,
    who: str,
) -> Taken:
    """Rows for a fit: complete, within their supports, lattices snapped.

    Raises:
        ValueError: missing values or values on an open bound where they are not allowed; values outside the supports,
            with rows and columns; lengths that differ.
    """
    w = check_weights(weights, len(x), who)
    check_rows(x, context, who)
    absent, notes = x.isnan(), []
    gone = absent.any(1) if context is None else absent.any(1) | context.isnan().any(1)
    if bool(gone.any()):
        if missing == "error":
            raise ValueError(_missing(absent, gone, names, who))
        notes.append(f"{plural('row', int(gone.sum()), count=True)} with missing values dropped")
    kept = (~gone).nonzero().flatten()
    x, context, w = x[kept], None if context is None else context[kept], None if w is None else w[kept]
    _check_inside(x, layout, names, who, kept)
    bound, to = layout.on_bound(x), layout.nudges(x)
    if bool(bound.any()):
        if at_bound == "error":
            raise ValueError(
                f"{who}: {plural('value', int(bound.sum()), count=True)} on an open bound of a support: "
                f"{_places(x, bound, names, kept)}; pass at_bound='nudge' to move them halfway to the nearest value "
                "inside, or give the column another support"
            )
        notes += _nudged(bound, x, layout.nudge(x, to), names)
    counts = {"rows": len(gone), "missing": int(gone.sum()), "nudged": int(bound.sum()), "used": len(x)}
    return Taken(layout.snap(layout.nudge(x, to)), context, w, kept, to, counts, notes)


def _missing(absent: Tensor, gone: Tensor, names: Sequence[str], who: str) -> str:
    held = [f"{n} ({k})" for n, k in zip(names, absent.sum(0).tolist(), strict=True) if k]
    where = ", ".join(held[:SHOWN]) + more(len(held)) if held else "the context"
    return (
        f"{who}: missing values (NaN) in {plural('row', int(gone.sum()), count=True)}: {where}; pass missing='drop' to "
        "leave these rows out, or fill them"
    )


def _check_inside(x: Tensor, layout: Layout, names: Sequence[str], who: str, kept: Tensor) -> None:
    outside = layout.outside(x)
    if not bool(outside.any()):
        return
    columns = outside.any(0).nonzero().flatten().tolist()
    held = ", ".join(f"{names[j]} of {layout.supports[j]!r}" for j in columns[:SHOWN]) + more(len(columns))
    count = int(outside.sum())
    raise ValueError(
        f"{who}: {plural('value', count, count=True)} outside the support, {held}: {_places(x, outside, names, kept)}; "
        "correct the support or drop these rows"
    )


def _nudged(bound: Tensor, x: Tensor, moved: Tensor, names: Sequence[str]) -> list[str]:
    found = []
    for j in bound.any(0).nonzero().flatten().tolist():
        at, to = x[bound[:, j], j], moved[bound[:, j], j]
        for value in at.unique().tolist():
            count, new = int((at == value).sum()), float(to[at == value][0])
            found.append(f"{names[j]}: {plural('value', count, count=True)} on the bound {value:g} moved to {new:.3g}")
    return found


def _places(values: Tensor, bad: Tensor, names: Sequence[str], kept: Tensor | None = None) -> str:
    """The first few of the bad values, with row and column."""
    where = bad.nonzero()
    rows = where[:, 0] if kept is None else kept[where[:, 0]]
    shown = [
        f"row {i} column {names[j]} ({value:g})"
        for i, j, value in zip(
            rows[:SHOWN].tolist(), where[:SHOWN, 1].tolist(), values[bad][:SHOWN].tolist(), strict=True
        )
    ]
    return ", ".join(shown) + more(len(where))


def one_row(given: Mapping[str, float], names: Sequence[str], who: str) -> Tensor:
    """A context given as a mapping from its columns to single numbers, as one row `(1, C)`."""
    for name in names:
        if name not in given:
            raise ValueError(f"{who}: the context lacks {name!r}{near(name, [n for n in given if n not in names])}")
    unknown = [n for n in given if n not in names]
    if unknown:
        raise ValueError(f"{who}: the model has no context column {unknown[0]!r}{near(unknown[0], names)}")
    return torch.tensor([[float(given[n]) for n in names]], dtype=torch.float64)


def ones_or_each(context: Tensor | None, count: int, who: str) -> Tensor | None:
    """A context of one row repeated, or of a row for each draw.

    Raises:
        ValueError: another number of rows.
    """
    if context is None or len(context) == count:
        return context
    if len(context) != 1:
        raise ValueError(
            f"{who} expects a context of 1 row, or of one for each of {count} draws, got {len(context)} rows"
        )
    return context.expand(count, -1)


def split(count: int, validation: float | None, test: float | None, seed: int) -> dict[str, Tensor]:
    """Positions of training, validation and test rows, drawn by the seed; shares round to at least one row."""
    sizes = {}
    for name, share in (("test", test), ("validation", validation)):
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"FlowDensity expects {name} as a share in [0, 1) or None, got {share}")
        sizes[name] = max(1, round(share * count)) if share else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    a, b = sizes["test"], sizes["test"] + sizes["validation"]
    return {"train": order[b:], "validation": order[a:b], "test": order[:a]}


def first_context(context: Any, who: str) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """The context of a fit, and the names of its columns."""
    if context is None:
        return None, None
    values = numbers(context, None, who, "context")
    return values, Schema.of(context if is_frame(context) else values).names


def known_context(context: Any, names: tuple[str, ...] | None, who: str) -> Tensor | None:
    """A later context, its columns matched with those of the fit.

    Raises:
        ValueError: one is missing, or there should be none.
    """
    if (context is None) != (names is None):
        had = "without a context" if names is None else f"with a context of {', '.join(names)}"
        raise ValueError(f"{who}: the model was fitted {had}; {'drop' if names is None else 'pass'} context=")
    return None if names is None else numbers(context, names, who, "context")


def check_rows(x: Tensor, context: Tensor | None, who: str) -> None:
    """A context has a row for each of x."""
    if context is not None and len(context) != len(x):
        raise ValueError(f"{who}: X has {len(x)} rows, the context has {len(context)}; they go row by row")


def check_weights(weights: Any, count: int, who: str) -> Tensor | None:
    """One weight a row, not all of them zero."""
    if weights is None:
        return None
    array = np.asarray(weights, dtype=np.float64)
    if len(array) and not array.any():
        raise ValueError(f"{who}: all weights are zero; drop sample_weight to weigh all rows alike")
    w = row_weights(array, who)
    if len(w) != count:
        raise ValueError(f"{who}: X has {count} rows, sample_weight has {len(w)}; they go row by row")
    return w


def as_array(X: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return X.detach().cpu().numpy() if isinstance(X, Tensor) else X


def seed_of_fit(random_state: Any) -> int:
    """As `seed_of`; processes that fit together must all begin with the same.

    Raises:
        ValueError: there are several, and no seed.
    """
    if random_state is None and processes() > 1:
        raise ValueError(
            f"FlowDensity.fit: each of the {processes()} processes would split the rows in its own way; pass the same "
            "random_state to all, such as random_state=0"
        )
    return seed_of(random_state)


def seed_of(random_state: Any) -> int:
    """A seed for torch: the int itself, a draw from a NumPy RandomState or Generator, or from torch's own generator."""
    if random_state is None:
        return int(torch.randint(2**31 - 1, ()))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31 - 1))
    if isinstance(random_state, int | np.integer) and random_state >= 0:
        return int(random_state)
    raise ValueError(
        f"FlowDensity expects random_state to be a whole number, a RandomState or None, got {random_state!r}"
    )
