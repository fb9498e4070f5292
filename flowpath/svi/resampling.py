"""Rows chosen by importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpath.diagnostics import psis


def smoothed(log_w: Tensor) -> Tensor:
    """Pareto-smoothed normalised weights `(n,)` on the CPU, in float64; draws off the support get none."""
    return psis(torch.where(torch.isfinite(log_w), log_w, -torch.inf))[0].exp().cpu()


def resampled(log_w: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Row numbers `(count,)` by systematic resampling with smoothed weights, shuffled."""
    weights, cpu = smoothed(log_w), on_cpu(generator)
    places = (torch.arange(count, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=cpu)) / count
    rows = torch.searchsorted(weights.cumsum(0), places).clamp_max(len(weights) - 1)
    return rows[torch.randperm(count, generator=cpu)]


def on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator of the same seed for row numbers, which are drawn on the CPU."""
    return None if generator is None else torch.Generator().manual_seed(generator.initial_seed())
