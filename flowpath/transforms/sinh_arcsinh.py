"""The sinh-arcsinh map: skewness and the weight of the tails, two numbers a feature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowpath.registry import register


@register("SinhArcsinh")
class SinhArcsinh(nn.Module):
    r"""z = sinh(d asinh(x) - e): Gaussian noise becomes skew (e) and of heavier (d < 1) or lighter tails (d > 1).

    With raw numbers (a, c), :math:`\log d = b \tanh(a / b)` and :math:`e = 3 \tanh(c / 3)`. Far out x grows as
    :math:`|z|^{1/d}`, so tails remain those of powers of the noise.
    :math:`\text{ladj} = \log\cosh(d \operatorname{asinh} x - e) + \log d - \tfrac12 \log(1 + x^2)`; both directions
    are exact, zero numbers are the identity.

    "Sinh-arcsinh distributions" (Jones, Pewsey 2009, Biometrika 96).

    Args:
        log_bound: b, the bound on |log d|.

    Raises:
        ValueError: a bound that is not positive.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.Elementwise(2, fp.SinhArcsinh())
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(t(x)[0], x, atol=1e-6)
        True
    """

    num_params = 2

    def __init__(self, *, log_bound: float = 1.0) -> None:
        super().__init__()
        if not log_bound > 0.0:
            raise ValueError(f"SinhArcsinh expects log_bound > 0, got {log_bound}")
        self.log_bound = log_bound

    def _numbers(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """log d and e."""
        return self.log_bound * torch.tanh(params[0] / self.log_bound), 3.0 * torch.tanh(params[1] / 3.0)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, params (a, c) `(2, *batch, d)` -> (z, ladj), each `(*batch, d)`."""
        log_d, e = self._numbers(params)
        inner = log_d.exp() * _asinh(x) - e
        return torch.sinh(inner), _log_cosh(inner) + log_d - _log_hypot(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: x = sinh((asinh(y) + e) / d)."""
        log_d, e = self._numbers(params)
        inner = (_asinh(y) + e) * (-log_d).exp()
        return torch.sinh(inner), _log_cosh(inner) - log_d - _log_hypot(y)


def _asinh(x: Tensor) -> Tensor:
    """asinh by its odd symmetry: the negative branch of the direct formula cancels."""
    return torch.copysign(torch.asinh(x.abs()), x)


def _log_cosh(x: Tensor) -> Tensor:
    size = x.abs()
    return size + torch.log1p(torch.exp(-2.0 * size)) - math.log(2.0)


def _log_hypot(x: Tensor) -> Tensor:
    """log sqrt(1 + x^2)."""
    return torch.log(torch.hypot(torch.ones_like(x), x))
