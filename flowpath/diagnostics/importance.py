"""Importance weights judged: effective sample size, PSIS k-hat, log evidence."""

from __future__ import annotations

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

_EQUAL = 1e-5  # weights whose shares of the largest differ by less are equal: rounding may do as much
_FEWEST = 5  # draws to fit a tail to, as in the paper's software


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
        Smoothed normalised log weights `(n,)` and k-hat: -inf where the largest weights are equal (to 1e-5), +inf where
        fewer than 5 stand out, too few to judge a tail by.

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
    if float(exceed[-1]) <= _EQUAL:  # nothing to smooth
        return lw - torch.logsumexp(lw, 0), -math.inf
    above = exceed > 0.0  # ties with the cutoff are no part of the tail
    largest, exceed, tail = largest[above], exceed[above], int(above.sum())
    if tail < _FEWEST:
        return lw - torch.logsumexp(lw, 0), math.inf
    k, sigma = (float(v) for v in fit_generalized_pareto(exceed))
    k = k * tail / (tail + 10) + 0.5 * 10 / (tail + 10)  # a weak prior towards 0.5, as in the paper's software
    if math.isfinite(k):
        u = (torch.arange(1, tail + 1, dtype=lw.dtype) - 0.5) / tail
        quantile = sigma * torch.expm1(-k * torch.log1p(-u)) / k if k != 0 else -sigma * torch.log1p(-u)
        lw[largest] = (quantile + cutoff.exp()).log().clamp_max(0.0)
    return lw - torch.logsumexp(lw, 0), k
