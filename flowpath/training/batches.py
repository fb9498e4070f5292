"""Batches for the training loop: from rows held in memory, or from a stream that never ends or is passed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from flowpath.training.front import Front, Prepared
from flowpath.training.rowchecks import check_fits, check_trainable
from flowpath.training.rows import Rows, parts, row_weights, table

Batch = tuple[Tensor | None, ...]
_BUFFER = 10_000  # rows of a stream from which whitening is set


class Batches(Protocol):
    """What the loop asks of data.

    `offset` is added to the negative loss to give nats in the user's units; `steps` is the number of batches of an
    epoch, None where only the end of the pass tells.
    """

    offset: float
    steps: int | None

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from batch `start` on."""


class RowBatches:
    """Shuffled batches of rows in memory; the remainder of each epoch's shuffle is left out.

    The order depends on `order_seed` and the epoch alone, so that a fit can go on in the middle of one.

    Args:
        rows: what `Front.prepare` gave. Weights are scaled to a mean positive part of one.
        batch_size: rows of a batch; all rows where there are fewer.
        order_seed: of the shuffles.
        part: what of each batch this process takes, of several that fit together; `size` counts whole batches.
    """

    def __init__(self, rows: Prepared, batch_size: int, order_seed: int, part: slice = slice(None)) -> None:
        self.size, self._seed, self._part = min(batch_size, len(rows.x)), order_seed, part
        weights = None if rows.weights is None else rows.weights / rows.weights.clamp_min(0).mean()
        self._tensors = (rows.x, rows.context, weights)
        counted = rows.ladj if weights is None else weights.double() * rows.ladj
        self.offset = float(counted.mean())
        self.steps: int | None = len(rows.x) // self.size

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._order(epoch)
        for i in range(start, self.steps or 0):
            yield self._take(order[i * self.size : (i + 1) * self.size][self._part])

    def first(self) -> Batch:
        """The first batch of the first epoch, whole."""
        return self._take(self._order(0)[: self.size])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        return torch.randperm(len(self._tensors[0]), generator=generator).to(self._tensors[0].device)

    def _take(self, index: Tensor) -> Batch:
        return tuple(None if t is None else t[index] for t in self._tensors)


class StreamBatches:
    """Batches as a DataLoader or an iterator gives them.

    The first batches, up to 10,000 rows, are read ahead to set the whitening; those of an iterator are then trained on.

    Args:
        source: a DataLoader or another re-iterable (a pass is an epoch), or an iterator (an epoch is `steps` batches).
        front: of the flow; its whitening is set here.
        steps: batches of an iterator's epoch.

    Raises:
        TypeError, ValueError: a batch that does not fit the flow, or an empty stream.
    """

    def __init__(self, source: Any, front: Front, steps: int | None) -> None:
        source = DataLoader(source, batch_size=256) if isinstance(source, IterableDataset) else source
        self._front, self._passes = front, not hasattr(source, "__next__")
        ahead, items = _read_ahead(iter(source), front)
        first = _joined(ahead)
        self.names = first.names
        check_trainable(first)
        front.set_from(first)
        self._scale = 1.0 if first.weights is None else float(first.weights.clamp_min(0).mean())
        self._source: Iterable[Any] = source if self._passes else chain(ahead, items)
        self.steps = None if self._passes else steps
        self.offset = float(front.prepare(first).ladj.mean())

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        del epoch, start  # a stream goes on where it is
        for i, item in enumerate(self._source, 1):
            yield self._batch(item)
            if i == self.steps:
                return

    def _batch(self, item: Any) -> Batch:
        rows = item if isinstance(item, Rows) else read_batch(item, self._front)
        x, context, weights, _ = self._front.prepare(rows)
        return x, context, None if weights is None else weights / self._scale


def read_batch(item: Any, front: Front) -> Rows:
    """One batch of a stream as Rows; numbers that are not finite are left to the loop, which skips and explains."""
    x, context, weights = parts(item)
    values, names = table(x, "fit", "a batch")
    rows = Rows(values, names=names)
    if context is not None:
        held, context_names = table(context, "fit", "a batch's context")
        rows = Rows(values, held, None, names, context_names)
    if weights is not None:
        rows = Rows(rows.x, rows.context, row_weights(weights, "fit"), names, rows.context_names)
    check_fits(rows, front.flow)
    return rows


def _read_ahead(items: Iterator[Any], front: Front) -> tuple[list[Rows], Iterator[Any]]:
    """The first batches of up to 10,000 rows together, and the iterator that goes on behind them."""
    ahead: list[Rows] = []
    while sum(map(len, ahead)) < _BUFFER:
        item = next(items, None)
        if item is None:
            break
        ahead.append(read_batch(item, front))
    if not ahead:
        raise ValueError("fit: the stream gave no batch")
    return ahead, items


def _joined(batches: list[Rows]) -> Rows:
    """Batches as one, without rows that are not finite."""
    x, context, weights = (
        None if getattr(batches[0], name) is None else torch.cat([getattr(b, name) for b in batches])
        for name in ("x", "context", "weights")
    )
    whole = Rows(x, context, weights, batches[0].names, batches[0].context_names)  # type: ignore[arg-type]
    return whole.take(torch.isfinite(whole.x.flatten(1)).all(1).nonzero().flatten())
