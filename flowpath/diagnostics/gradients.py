"""Gradient estimators compared on the user's own problem."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowpath.tracing.plain import cuda_indices


@dataclass(frozen=True)
class GradientRow:
    """What one estimator does on the user's problem, over repeats.

    variance: trace of the gradient's covariance. bias: norm of its mean minus the reference's mean, in units of the
    standard error of that difference. snr: |mean| / sqrt(variance). milliseconds: CPU time of one gradient.
    """

    name: str
    variance: float
    bias: float
    snr: float
    milliseconds: float


class GradientTable(list[GradientRow]):
    """The rows of `gradient_variance`; prints as a table."""

    def __str__(self) -> str:
        head = f"{'estimator':24s} {'variance':>12s} {'bias / se':>10s} {'SNR':>10s} {'ms':>8s}"
        lines = [f"{r.name:24s} {r.variance:12.4g} {r.bias:10.2f} {r.snr:10.3g} {r.milliseconds:8.2f}" for r in self]
        return "\n".join([head, *lines])

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict a row."""
        return [asdict(r) for r in self]


def gradient_variance(
    losses: Mapping[str, Callable[[], Tensor]],
    parameters: Iterable[Tensor],
    *,
    repeats: int = 100,
    seed: int = 0,
    reference: str | None = None,
) -> GradientTable:
    """Variance, bias, signal-to-noise ratio and cost of gradient estimators on the user's own problem.

    Args:
        losses: estimator name -> a function that draws and returns a scalar loss, such as
            `lambda: fp.expectation(f, q(), fp.Score(), num_samples=16)`.
        parameters: with respect to which gradients are taken; their `.grad` is not touched.
        repeats: gradients per estimator, at least 2.
        seed: torch's generator is seeded by it and restored afterwards; all estimators share it.
        reference: the name whose mean counts as unbiased; by default the one of least variance.

    Raises:
        ValueError: no estimator, no parameter, fewer than 2 repeats or an unknown reference.

    Example:
        >>> import torch, flowpath as fp
        >>> mu = torch.tensor([1.0], requires_grad=True)
        >>> def loss(e):
        ...     q = torch.distributions.Normal(mu, 1.0)
        ...     return lambda: fp.expectation(lambda z: z**2, q, e, num_samples=4).sum()
        >>> table = fp.gradient_variance({"pathwise": loss(fp.Pathwise()), "score": loss(fp.Score())}, [mu], repeats=50)
        >>> table[0].variance < table[1].variance
        True
    """
    params = list(parameters)
    if not losses or not params:
        raise ValueError("gradient_variance expects at least one loss and one parameter")
    if repeats < 2:
        raise ValueError(f"gradient_variance expects at least 2 repeats, got {repeats}")
    if reference is not None and reference not in losses:
        raise ValueError(f"gradient_variance: no loss is named {reference!r}; there are {list(losses)}")
    found = {name: _gradients(loss, params, repeats, seed) for name, loss in losses.items()}
    spread = {name: g.var(0) for name, (g, _) in found.items()}
    best = reference or min(spread, key=lambda name: float(spread[name].sum()))
    return GradientTable(_row(name, g, found[best][0], seconds, name == best) for name, (g, seconds) in found.items())


def _row(name: str, g: Tensor, reference: Tensor, seconds: float, same: bool) -> GradientRow:
    variance = float(g.var(0).sum())
    difference = float((g.mean(0) - reference.mean(0)).norm())
    error = math.sqrt(float((g.var(0) + reference.var(0)).sum()) / len(g))
    bias = 0.0 if same or error == 0.0 else difference / error
    snr = float(g.mean(0).norm()) / math.sqrt(variance) if variance > 0 else math.inf
    return GradientRow(name, variance, bias, snr, 1e3 * seconds)


def _gradients(loss: Callable[[], Tensor], params: list[Tensor], repeats: int, seed: int) -> tuple[Tensor, float]:
    rows = []
    with torch.random.fork_rng(cuda_indices(params)):
        torch.manual_seed(seed)
        start = time.process_time()
        for _ in range(repeats):
            grads = torch.autograd.grad(loss(), params, materialize_grads=True)
            rows.append(torch.cat([g.detach().flatten().double() for g in grads]))
        seconds = (time.process_time() - start) / repeats
    return torch.stack(rows), seconds
