"""Checks of rows against a flow and against each other, told with the names of the columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flowpath.flow import Flow
from flowpath.training.rows import SHOWN, Rows, more, plural


def check_fits(rows: Rows, flow: Flow, who: str = "fit") -> None:
    """The columns of x and context are those the flow was built for, or an error that says what differs."""
    shape, want = tuple(rows.x.shape[1:]), tuple(flow.event_shape)
    if shape != want:
        held = f"{want[0]} features" if len(want) == 1 else f"event shape {want}"
        raise ValueError(f"{who}: the flow has {held}, x has {_columns(shape, rows.names)}")
    if rows.context is None:
        if flow.context:
            raise ValueError(f"{who}: the flow expects a context with {flow.context} features, got none; pass context=")
        return
    if flow.context == 0:
        raise ValueError(f"{who}: the flow takes no context, got one; build it with context={rows.context.shape[-1]}")
    if flow.context is not None and rows.context.shape[-1] != flow.context:
        got = _columns(tuple(rows.context.shape[1:]), rows.context_names)
        raise ValueError(f"{who}: the flow expects a context with {flow.context} features, the context has {got}")


def check_trainable(rows: Rows, who: str = "fit") -> None:
    """A density can be fitted to these rows: two or more, no constant column, no two columns the same."""
    if len(rows) < 2:
        raise ValueError(f"{who}: too few rows: at least 2 are needed to train on, got {len(rows)}")
    used = rows.x if rows.weights is None else rows.x[rows.weights > 0]
    if len(used) < 2:
        raise ValueError(f"{who}: too few rows: at least 2 need a positive weight, got {len(used)}")
    flat = used.flatten(1)
    same = (flat == flat[0]).all(0).nonzero().flatten().tolist()
    if same:
        held = ", ".join(f"{rows.names[i]} ({flat[0, i]:g})" for i in same[:SHOWN]) + more(len(same))
        raise ValueError(
            f"{who}: {plural('column', len(same))} {held} {'is' if len(same) == 1 else 'are'} constant in the "
            "training rows, so a density has no width there; drop, or use as context"
        )
    twins = _twins(flat)
    if twins:
        pairs = ", ".join(f"{rows.names[i]} and {rows.names[j]}" for i, j in twins[:SHOWN]) + more(len(twins))
        raise ValueError(f"{who}: columns {pairs} are identical, so the density is singular; drop one of each")


def _twins(flat: Tensor) -> list[tuple[int, int]]:
    """Pairs of columns that hold the same numbers, the first of each kind with every later one."""
    first: dict[bytes, int] = {}
    found = []
    for j, column in enumerate(flat.T.contiguous().numpy()):
        i = first.setdefault(column.tobytes() if len(column) < 10_000 else _digest(column), j)
        if i != j and np.array_equal(column, flat[:, i].numpy()):
            found.append((i, j))
    return found


def _digest(column: np.ndarray) -> bytes:
    return column[:1000].tobytes() + np.float64(column.sum()).tobytes()


def _columns(shape: tuple[int, ...], names: Sequence[str]) -> str:
    if len(shape) != 1:
        return f"event shape {shape}"
    named = f" ({', '.join(names)})" if names and not names[0].isdigit() and len(names) <= 12 else ""
    return f"{plural('column', shape[0], count=True)}{named}"
