"""Targets whose log Z is 0 and which can be sampled exactly, so that KL, ESS and marginals have a truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal


@dataclass(frozen=True)
class Target:
    """A normalised density: `log_prob` maps `(*batch, D)` to `(*batch,)`; `from_noise` maps standard normal rows."""

    log_prob: Callable[[Tensor], Tensor]
    from_noise: Callable[[Tensor], Tensor]


def gaussian(features: int) -> Target:
    """Correlation .9^|i - j|, unit variances."""
    i = torch.arange(features, dtype=torch.float64)
    low = torch.linalg.cholesky(0.9 ** (i[:, None] - i).abs()).float()
    inverse = torch.linalg.inv(low.double()).float()
    constant = -0.5 * features * math.log(2 * math.pi) - float(low.diagonal().log().sum())
    return Target(lambda z: constant - 0.5 * (z @ inverse.T).square().sum(-1), lambda u: u @ low.T)


def funnel(features: int) -> Target:
    """Neal's funnel: v ~ N(0, 3^2), the others N(0, exp v)."""

    def log_prob(z: Tensor) -> Tensor:
        v, x = z[..., 0], z[..., 1:]
        width = (0.5 * v).exp().unsqueeze(-1)
        return Normal(0.0, 3.0).log_prob(v) + Normal(0.0, width, validate_args=False).log_prob(x).sum(-1)

    return Target(log_prob, lambda u: torch.cat([3 * u[..., :1], (1.5 * u[..., :1]).exp() * u[..., 1:]], -1))


def banana(features: int) -> Target:
    """A bent Gaussian: x1 ~ N(0, 3^2), x2 ~ N(0.2 (x1^2 - 9), 1), the others N(0, 1)."""

    def bend(x: Tensor, sign: float) -> Tensor:
        first, second, rest = x[..., :1], x[..., 1:2], x[..., 2:]
        return torch.cat([first, second + sign * 0.2 * (first.square() - 9.0), rest], -1)

    def log_prob(z: Tensor) -> Tensor:
        y = bend(z, -1.0)
        return Normal(0.0, 3.0).log_prob(y[..., 0]) + Normal(0.0, 1.0).log_prob(y[..., 1:]).sum(-1)

    return Target(log_prob, lambda u: bend(torch.cat([3 * u[..., :1], u[..., 1:]], -1), 1.0))


TARGETS: dict[str, Callable[[int], Target]] = {"gaussian": gaussian, "funnel": funnel, "banana": banana}
