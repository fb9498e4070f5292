"""Scoring rows with a flow: log densities, in chunks, whitened in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.flow import Flow
from flowpath.training.front import Front, Prepared
from flowpath.training.rowchecks import check_fits
from flowpath.training.rows import is_stream, parts, read
from flowpath.training.team import Team

Score = tuple[float, float]  # a mean log density in nats, and its standard error
_SCORED = 4096  # rows scored at a time


def log_prob(flow: Flow, x: Any, context: Any = None, *, batch_size: int = _SCORED) -> Tensor:
    """Log density of each row, whitened in float64 and scored in chunks; the flow's mode stays as found.

    Where `flow.log_prob` takes tensors of the flow's dtype, this takes what `fit` takes.

    Args:
        flow: a Flow.
        x: rows `(N, *event)`: tensor, NumPy array, DataFrame, Dataset, or batches of them.
        context: rows `(N, C)`, or None.
        batch_size: rows scored at a time; it changes memory, not results.

    Returns:
        `(N,)` in float64 on the CPU, in nats.

    Raises:
        TypeError, ValueError: rows that are no numbers, not finite, or do not fit the flow.

    Example:
        >>> import numpy as np, flowpath as fp
        >>> fp.log_prob(fp.nsf(2), np.zeros((3, 2))).shape
        torch.Size([3])
    """
    if is_stream(x):
        return torch.cat([log_prob(flow, *parts(b)[:2], batch_size=batch_size) for b in x])
    check_count("log_prob", "batch_size", batch_size)
    rows = read(x, context, who="log_prob")
    check_fits(rows, flow, "log_prob")
    front = Front(flow)
    chunks = torch.arange(len(rows)).split(batch_size)
    return torch.cat([scores(front, front.prepare(rows.take(i)), batch_size).cpu() for i in chunks])


def held_out(front: Front, rows: Prepared, team: Team | None = None) -> Score:
    """Weighted mean log density and its standard error; each process of a team scores a part of the rows."""
    values = scores(front, rows, _SCORED) if team is None else _in_parts(front, rows, team)
    w = torch.ones_like(values) if rows.weights is None else rows.weights.double()
    values = torch.where(w == 0, torch.zeros_like(values), values)
    mean = (w * values).sum() / w.sum()
    error = (w * (values - mean)).square().sum().sqrt() / w.sum().abs()
    return float(mean), float(error)


def _in_parts(front: Front, rows: Prepared, team: Team) -> Tensor:
    team.level(b for b in front.flow.buffers() if b.is_floating_point())  # a batch norm's moments
    part, values = team.part(len(rows.x)), torch.zeros_like(rows.ladj)
    values[part] = scores(front, Prepared(*(None if t is None else t[part] for t in rows)), _SCORED)  # type: ignore[arg-type]
    return team.total(values)


@torch.no_grad()
def scores(front: Front, rows: Prepared, size: int) -> Tensor:
    """log q of each row in the user's units, `(N,)` in float64."""
    contexts = [None] * len(rows.x.split(size)) if rows.context is None else rows.context.split(size)
    with _evaluating(front.inner):
        chunks = [front.inner.log_prob(x, c) for x, c in zip(rows.x.split(size), contexts, strict=True)]
    return torch.cat(chunks).double() + rows.ladj


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, each part's own mode put back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
