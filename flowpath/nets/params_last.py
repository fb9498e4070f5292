"""Conditioners from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.registry import register


@register("ParamsLast")
class ParamsLast(nn.Module):
    """Adapter for a foreign conditioner, one that emits params last: `(*batch, out_features * num_params)`.

    Args:
        net: a module that maps `(*batch, in_features + C)`, x beside the context, to that shape.
        num_params: numbers a feature needs; the net gives them feature by feature.

    Example:
        >>> import torch, flowpath as fp
        >>> net = fp.ParamsLast(torch.nn.Linear(2, 3 * 5), num_params=5)
        >>> net(torch.randn(7, 2)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, net: nn.Module, *, num_params: int) -> None:
        super().__init__()
        check_count("ParamsLast", "num_params", num_params)
        self.net, self.num_params = net, num_params

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        out = self.net(x if context is None else torch.cat([x, context], -1))
        return out.unflatten(-1, (-1, self.num_params)).movedim(-1, 0)
