"""Weighted draws in numbers: means, standard deviations, quantiles, Monte Carlo errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_QUANTILES = (0.05, 0.5, 0.95)


class Summary(dict[str, dict[str, Tensor]]):
    """site -> {mean, sd, 5%, 50%, 95%, mcse}, each of the site's shape; prints as a table."""

    def __str__(self) -> str:
        lines = [f"{'':24s}" + "".join(f"{key:>11s}" for key in next(iter(self.values()), {}))]
        for name, columns in self.items():
            for place in _places(next(iter(columns.values())).shape):
                label = name + (f"[{','.join(map(str, place))}]" if place else "")
                lines.append(f"{label:24s}" + "".join(f"{float(v[place]):11.4g}" for v in columns.values()))
        return "\n".join(lines)


def _places(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    for flat in range(shape.numel()):
        place = []
        for size in reversed(shape):
            flat, i = divmod(flat, size)
            place.append(i)
        yield tuple(reversed(place))


def summarise(values: Mapping[str, Tensor], weights: Tensor) -> Summary:
    """Weighted mean, sd, quantiles and Monte Carlo standard error of draws, site by site.

    Args:
        values: site -> draws `(n, *shape)`.
        weights: `(n,)`, summing to one.
    """
    w = weights.double().cpu()
    return Summary({name: _columns(v, w) for name, v in values.items()})


def _columns(v: Tensor, weights: Tensor) -> dict[str, Tensor]:
    flat, w = v.detach().double().cpu().reshape(len(v), -1), weights.unsqueeze(-1)
    mean = (w * flat).sum(0)
    squares = (flat - mean).square()
    ordered, order = flat.sort(0)
    mass = weights[order].cumsum(0)
    columns = {"mean": mean, "sd": (w * squares).sum(0).sqrt()}
    for q in _QUANTILES:
        row = (mass < q).sum(0, keepdim=True).clamp_max(len(flat) - 1)
        columns[f"{q:.0%}"] = ordered.gather(0, row).squeeze(0)
    columns["mcse"] = (w.square() * squares).sum(0).sqrt()
    return {key: c.reshape(v.shape[1:]) for key, c in columns.items()}


def apart(one: Summary, other: Summary) -> float:
    """The largest difference of two summaries' means, in units of the first's sd."""
    worst = 0.0
    for name, columns in one.items():
        difference = (columns["mean"] - other[name]["mean"]).abs() / columns["sd"].clamp_min(1e-300)
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst if math.isfinite(worst) else math.inf
