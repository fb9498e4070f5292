"""Diagnostics: importance weights judged (ESS, PSIS k-hat, log evidence), and gradient estimators compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


def ess(log_weights: Tensor) -> Tensor:
    r"""Effective sample size of n importance weights as a share of n: :math:`(\sum w)^2 / (n \sum w^2)`, in [1/n, 1].

    Args:
        log_weights: `(n, *batch)`, log p(z) - log q(z); -inf counts as weight 0.

    Returns:
        `(*batch,)`.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.ess(torch.zeros(100))
        tensor(1.)
    """
    n = log_weights.shape[0]
    return (2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0) - math.log(n)).exp()


def log_evidence(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""log Z by importance sampling, :math:`\log \frac1n \sum w`, with its delta-method standard error.

    Args:
        log_weights: `(n, *batch)`, unnormalised log p minus log q.

    Returns:
        log Z and its standard error, `(*batch,)` each.
    """
    n = log_weights.shape[0]
    value = torch.logsumexp(log_weights, 0) - math.log(n)
    return value, (log_weights - value).exp().std(0) / math.sqrt(n)


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Pareto-smoothed importance weights and the shape k-hat of their tail.

    The largest :math:`M = \min(n / 5, 3 \sqrt n)` weights are replaced by quantiles of a generalised Pareto
    distribution fitted to them. k-hat below 0.5 is good, 0.5 to 0.7 usable; above 0.7 the weights have no usable
    variance, and no estimate made with them should be trusted. A low k-hat alone does not certify q: it cannot see what
    no draw came near.

    "Pareto Smoothed Importance Sampling" (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646).

    Args:
        log_weights: `(n,)`, n at least 25; -inf counts as weight 0.

    Returns:
        Smoothed normalised log weights `(n,)` and k-hat.

    Raises:
        ValueError: another shape, too few weights, NaN or +inf.

    Example:
        >>> import torch, flowpath as fp
        >>> _, khat = fp.psis(-0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0)).abs())
        >>> khat < 0.5
        True
    """
    if log_weights.dim() != 1 or len(log_weights) < 25:
        raise ValueError(f"psis expects at least 25 log weights, shape (n,), got shape {tuple(log_weights.shape)}")
    if torch.isnan(log_weights).any() or torch.isposinf(log_weights).any():
        raise ValueError("psis expects log weights below +inf and no NaN; drop or fix those draws first")
    lw = log_weights.detach().double()
    lw = lw - lw.max()
    n = len(lw)
    tail = math.ceil(min(0.2 * n, 3.0 * math.sqrt(n)))
    order = lw.argsort()
    largest, cutoff = order[-tail:], lw[order[-tail - 1]]
    exceed = lw[largest].exp() - cutoff.exp()
    if float(exceed[-1]) <= 0.0:  # all weights of the tail are equal: nothing to smooth
        return lw - torch.logsumexp(lw, 0), -math.inf
    k, sigma = (float(v) for v in fit_generalized_pareto(exceed))
    k = k * tail / (tail + 10) + 0.5 * 10 / (tail + 10)  # a weak prior towards 0.5, as in the paper's software
    if math.isfinite(k):
        u = (torch.arange(1, tail + 1, dtype=lw.dtype) - 0.5) / tail
        quantile = sigma * torch.expm1(-k * torch.log1p(-u)) / k if k != 0 else -sigma * torch.log1p(-u)
        lw[largest] = (quantile + cutoff.exp()).log().clamp_max(0.0)
    return lw - torch.logsumexp(lw, 0), k


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
    devices = sorted({p.device.index or 0 for p in params if p.is_cuda})
    rows = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        start = time.process_time()
        for _ in range(repeats):
            grads = torch.autograd.grad(loss(), params, materialize_grads=True)
            rows.append(torch.cat([g.detach().flatten().double() for g in grads]))
        seconds = (time.process_time() - start) / repeats
    return torch.stack(rows), seconds
