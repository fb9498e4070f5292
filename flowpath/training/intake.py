"""From what a user passes to `fit` to a flow, batches to train on, and rows held out."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch

from flowpath.architectures import architectures
from flowpath.checks import check_count
from flowpath.flow import Flow
from flowpath.training.batches import Batches, RowBatches, StreamBatches
from flowpath.training.front import Front, Prepared
from flowpath.training.rowchecks import check_fits, check_trainable
from flowpath.training.rows import Rows, is_stream, parts, read
from flowpath.training.team import Team

_SMALLEST, _LARGEST, _BATCHES = 32, 256, 40  # a batch by default: about rows / 40, within these
_STREAM_EPOCHS, _STREAM_STEPS = 50, 500  # an iterator is scored so many times, or every so many steps


@dataclass(frozen=True)
class Data:
    """What a fit works on.

    Attributes:
        batches: to train on.
        validation, test: rows held out, behind the front, or None.
        names: of the columns.
        counts: rows by use; empty for a stream.
        identity: what must be the same when the fit is resumed.
        notes: what the report should say.
        settings: what the report repeats, such as the batch size.
        endless: whether the batches come from an iterator, which need not end.
    """

    batches: Batches
    validation: Prepared | None
    test: Prepared | None
    names: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    endless: bool = False


@dataclass(frozen=True)
class Request:
    """What `fit` was asked to work on: its arguments of the same names, the seed of split and shuffles, and by whom."""

    x: Any
    context: Any
    weights: Any
    validation: Any
    test: Any
    batch_size: int | None
    steps: int | None
    order_seed: int
    team: Team


def build(flow: Flow | str, x: Any, context: Any, options: dict[str, Any]) -> tuple[Flow, Any]:
    """The flow, built where a name is given, and x, whose first batch may have been looked at.

    Raises:
        TypeError: options beside a Flow. ValueError: an unknown name.
    """
    if isinstance(flow, Flow):
        if options:
            raise TypeError(f"fit got {', '.join(options)}: options build a flow from a name; this one is built")
        return flow, x
    if flow not in architectures:
        near = get_close_matches(flow, architectures, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"fit knows no architecture {flow!r}, but {', '.join(architectures)}{hint}")
    first: Any = x
    if is_stream(x):
        items = iter(x)
        first = next(items, None)
        x = chain([first], items) if items is x else x
        first, context, _ = parts(first)
    rows = read(first, context)
    width = 0 if rows.context is None else rows.context.shape[-1]
    return architectures[flow](rows.x.shape[-1], width, **options), x


def take_in(front: Front, asked: Request) -> Data:
    """Read, check, split and whiten; the front is set from the training rows alone."""
    return _from_stream(front, asked) if is_stream(asked.x) else _from_rows(front, asked)


def _from_rows(front: Front, asked: Request) -> Data:
    rows = read(asked.x, asked.context, asked.weights)
    check_fits(rows, front.flow)
    train, validation, test = _split(rows, front, asked)
    if rows.weights is not None and bool((rows.weights < 0).any()) and validation is None:
        raise ValueError("fit: weights below 0 can be fitted without bound, so validation rows must tell when to stop")
    check_trainable(train)
    for name, held_out in (("validation", validation), ("test", test)):
        _check_weighs(held_out, name)
    front.set_from(train)
    if asked.batch_size is not None:
        check_count("fit", "batch_size", asked.batch_size)
    size = asked.batch_size or min(_LARGEST, max(_SMALLEST, 2 ** round(len(train) / _BATCHES).bit_length() // 2))
    counts = {n: len(r) for n, r in (("train", train), ("validation", validation), ("test", test)) if r is not None}
    size = min(size, len(train))
    if size < asked.team.size:
        raise ValueError(f"fit: batches of {size} rows cannot be split over {asked.team.size} processes; start fewer")
    batches = RowBatches(front.prepare(train), size, asked.order_seed, asked.team.part(size))
    identity = {"rows": len(rows), "fingerprint": _fingerprint(rows), "batch_size": batches.size}
    identity["order_seed"] = asked.order_seed
    identity |= {"validation rows": counts.get("validation", 0), "test rows": counts.get("test", 0)}
    held = [None if r is None else front.prepare(r) for r in (validation, test)]
    return Data(batches, held[0], held[1], rows.names, counts, identity, settings={"batch_size": batches.size})


def _from_stream(front: Front, asked: Request) -> Data:
    if asked.team.size > 1:
        raise ValueError(
            f"fit: a stream cannot be split over {asked.team.size} processes; pass rows or a Dataset, or fit in one "
            "process, without torchrun"
        )
    if asked.context is not None or asked.weights is not None:
        raise ValueError("fit: a stream brings its own context and weights: its items are (x, context, weights)")
    if _fraction(asked.test, "test") is not None:
        raise ValueError("fit: no share of a stream can be held out; pass test=rows")
    endless = hasattr(asked.x, "__next__")
    every = max(1, asked.steps // _STREAM_EPOCHS) if asked.steps else _STREAM_STEPS
    batches = StreamBatches(asked.x, front, every if endless else None)
    notes = []
    validation = None
    if _fraction(asked.validation, "validation") is None:
        validation = _given(asked.validation, front)
    if validation is None:
        notes.append("no share of a stream can be held out; pass validation=rows to keep the best weights")
    test = _given(asked.test, front)
    held = [None if r is None else front.prepare(r) for r in (validation, test)]
    counts = {n: len(r) for n, r in (("validation", validation), ("test", test)) if r is not None}
    identity = {"rows": "a stream", "order_seed": asked.order_seed}
    return Data(batches, held[0], held[1], batches.names, counts, identity, notes, endless=endless)


def _split(rows: Rows, front: Front, asked: Request) -> tuple[Rows, Rows | None, Rows | None]:
    """Training, validation and test rows; shares are drawn by `order_seed`."""
    shares = {"test": _fraction(asked.test, "test"), "validation": _fraction(asked.validation, "validation")}
    counts = {name: 0 if share is None else max(1, round(share * len(rows))) for name, share in shares.items()}
    order = torch.arange(len(rows))
    if sum(counts.values()):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(asked.order_seed))
    test, validation = counts["test"], counts["test"] + counts["validation"]
    train = rows.take(order[validation:])
    return (
        train,
        rows.take(order[test:validation]) if counts["validation"] else _given(asked.validation, front),
        rows.take(order[:test]) if counts["test"] else _given(asked.test, front),
    )


def _fraction(asked: Any, name: str) -> float | None:
    """The share asked for, or None where rows or nothing was passed."""
    if isinstance(asked, bool) or not isinstance(asked, int | float) or asked == 0:
        return None
    if not 0 < asked < 1:
        raise ValueError(f"fit expects {name} as a share between 0 and 1, or as rows, got {asked}")
    return float(asked)


def _given(asked: Any, front: Front) -> Rows | None:
    """Rows passed as x, (x, context) or (x, context, weights); None for None, 0 or a share."""
    if asked is None or asked is False or isinstance(asked, int | float):
        return None
    rows = read(*(parts(asked) if isinstance(asked, tuple | dict) else (asked, None, None)))
    check_fits(rows, front.flow)
    return rows


def _check_weighs(rows: Rows | None, name: str) -> None:
    """The weights of held-out rows can average something."""
    total = 1.0 if rows is None or rows.weights is None else float(rows.weights.sum())
    if total <= 0:
        raise ValueError(
            f"fit: the weights of the {name} rows sum to {total:g}; hold out more rows, or pass rows that weigh"
        )


def _fingerprint(rows: Rows) -> int:
    """A checksum of all rows."""
    value = 0
    for t in (rows.x, rows.context, rows.weights):
        if t is not None:
            value = zlib.crc32(t.contiguous().numpy().data.cast("B"), value)
    return value
