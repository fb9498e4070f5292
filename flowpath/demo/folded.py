"""A density that is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal


class Folded:
    r"""A density in five dimensions that is known in closed form: a chain of conditionals.

    .. math:: x_1 \sim \tfrac12 N(-1.5, 0.5^2) + \tfrac12 N(1.5, 0.5^2), \quad x_2 \sim N(x_1^2 - 2, 0.5^2), \quad
              x_3 \sim N(2 \sin x_2, 0.4^2), \\ x_4 \sim N(0, e^{x_1}), \quad
              x_5 \sim \tfrac12 N(x_4, 0.5^2) + \tfrac12 N(-x_4, 0.5^2)
    """

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Tensor:
        """Rows `(count, 5)` in float64."""
        e = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        sign = 2.0 * torch.randint(2, (2, count), generator=generator) - 1.0
        x1 = 1.5 * sign[0] + 0.5 * e[:, 0]
        x2 = x1.square() - 2.0 + 0.5 * e[:, 1]
        x3 = 2.0 * x2.sin() + 0.4 * e[:, 2]
        x4 = (0.5 * x1).exp() * e[:, 3]
        return torch.stack([x1, x2, x3, x4, sign[1] * x4 + 0.5 * e[:, 4]], 1)

    @staticmethod
    def log_prob(x: Tensor) -> Tensor:
        """Log density in nats of x `(N, 5)`: `(N,)`."""
        x1, x2, x3, x4, x5 = x.unbind(1)
        modes = torch.logaddexp(Normal(-1.5, 0.5).log_prob(x1), Normal(1.5, 0.5).log_prob(x1))
        cross = torch.logaddexp(Normal(x4, 0.5).log_prob(x5), Normal(-x4, 0.5).log_prob(x5))
        bend = Normal(x1.square() - 2.0, 0.5).log_prob(x2) + Normal(2.0 * x2.sin(), 0.4).log_prob(x3)
        return modes + bend + Normal(0.0, (0.5 * x1).exp()).log_prob(x4) + cross - 2.0 * math.log(2.0)
