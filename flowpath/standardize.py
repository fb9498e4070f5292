"""Location and scale of rows in float64, and the embedding that standardises contexts with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.registry import register


class Float64Scale(nn.Module):
    """A module whose buffers `loc` and `scale` stay float64 whatever dtype it is moved to."""

    loc: Tensor
    scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float64Scale:
        loc, scale = self.loc, self.scale
        super()._apply(fn, recurse)
        if self.loc.dtype != torch.float64:  # .float() or .half(): follow the device, keep the digits
            self.loc, self.scale = loc.to(self.loc.device), scale.to(self.scale.device)
        return self


@register("Standardize")
class Standardize(Float64Scale):
    """(c - mean) / sd of each context feature: the embedding that `fp.fit` sets from the training rows.

    The identity until `set_from(context)`; a constant column keeps the scale 1. Like `Whiten` it keeps its numbers and
    does its arithmetic in float64; the result has the context's dtype.

    Args:
        features: width of the context.

    Example:
        >>> import torch, flowpath as fp
        >>> c = 100 + 5 * torch.randn(1000, 2)
        >>> bool((fp.Standardize(2).set_from(c)(c).mean(0).abs() < 1e-4).all())
        True
    """

    loc: Tensor
    scale: Tensor
    is_set: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        check_count("Standardize", "features", features)
        self.in_features = features
        self.register_buffer("loc", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(features, dtype=torch.float64))
        self.register_buffer("is_set", torch.tensor(False))

    @torch.no_grad()
    def set_from(self, context: Tensor) -> Standardize:
        """Take mean and scale from rows `(N, features)`; returns self."""
        rows = context.detach().to(self.loc.device, torch.float64).reshape(-1, self.in_features)
        mean = rows.mean(0)
        sd = (rows - mean).square().mean(0).sqrt()
        self.loc.copy_(mean)
        self.scale.copy_(torch.where(sd > 1e-14 * mean.abs(), sd, torch.ones_like(sd)))
        self.is_set.fill_(True)
        return self

    def forward(self, context: Tensor) -> Tensor:
        """`(*batch, features)` to the same shape."""
        return ((context.double() - self.loc) / self.scale).to(context.dtype)
