"""A flow over cells put to use for a table: the log probability of rows, and draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowpath.flow import Flow
from flowpath.tables.layout import Layout
from flowpath.training.front import Front
from flowpath.training.scoring import log_prob

_POINTS = 1 << 19  # points held in memory at a time
_DRAWN = 8192  # rows drawn at a time


def log_mass(flow: Flow, layout: Layout, x: Tensor, context: Tensor | None, points: Tensor) -> Tensor:
    r"""The log of density (of the continuous columns) times probability mass (of the lattices' cells), in nats.

    .. math:: \log P(x) = \log \frac1K \sum_k q(x + (u_k - \tfrac12)\,\text{step}) + \sum_{lattices} \log \text{step}

    Args:
        flow: over the cells.
        layout: the supports of its D columns.
        x: rows `(N, D)` within the supports.
        context: rows `(N, C)`, or None.
        points: u `(K, lattices)` of `cell_points`; without lattices it plays no part.

    Returns:
        `(N,)` in float64.
    """
    if not len(x):
        return x.new_zeros(0)
    if not layout.lattices:
        return log_prob(flow, x, context)
    count = len(points)
    u = torch.full((count, x.shape[1]), 0.5, dtype=torch.float64)
    u[:, layout.lattice] = points
    found = []
    for rows in torch.arange(len(x)).split(max(1, _POINTS // (count * x.shape[1]))):
        y = layout.spread(x[rows].unsqueeze(1), u).flatten(0, 1)
        c = None if context is None else context[rows].repeat_interleave(count, 0)
        found.append(log_prob(flow, y, c).reshape(-1, count).logsumexp(1))
    return torch.cat(found) - math.log(count) + layout.log_cell


@torch.no_grad()
def draw(flow: Flow, layout: Layout, num_samples: int, context: Tensor | None, seed: int) -> Tensor:
    """Draws `(num_samples, D)` as values of the columns; whitening and supports are undone in float64.

    Args:
        context: `(num_samples, C)`: one draw for each row; or None.
    """
    front = Front(flow)
    generator = torch.Generator(front.device).manual_seed(seed)
    found = []
    for rows in torch.arange(num_samples).split(_DRAWN):
        c = None if context is None else context[rows].to(front.device)
        if c is not None and front.context_layer is not None:
            c = front.context_layer(c)
        c = None if c is None else c.to(front.dtype)
        shape = (len(rows),) if c is None else ()
        z = front.inner.sample(shape, c, generator=generator).double()
        for t in reversed(front.layers):
            z = t._inverse(z, None)[0]
        found.append(layout.settle(z.cpu()))
    return torch.cat(found)
