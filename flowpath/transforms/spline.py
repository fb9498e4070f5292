"""Monotone rational-quadratic splines: on an interval with identity tails, and on a circle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowpath.layout import features_first, features_last, numbers_first
from flowpath.registry import register
from flowpath.transforms.rational_quadratic import rational_quadratic
from flowpath.transforms.spline_box import Box


class _Element(nn.Module):
    """What both splines share: the checks, and the way to N flat elements and back."""

    def __init__(self, box: Box, num_params: int) -> None:
        super().__init__()
        self.bins, self.box, self.num_params = (bins := box.bins), box, num_params
        title = type(self).__name__
        if not isinstance(bins, int) or isinstance(bins, bool) or bins < 2:
            raise ValueError(f"{title} expects bins to be a whole number of at least 2, got {bins!r}")
        if not (math.isfinite(box.low) and 0.0 < box.high - box.low < math.inf):
            ends = f"[{box.low}, {box.high}]"
            raise ValueError(f"{title} expects an interval of finite, positive length, got {ends}")
        for name, floor in (("min_width", box.min_width), ("min_height", box.min_height)):
            if not 1e-5 <= floor < 1.0 / bins:  # knots closer than that may meet in float32
                raise ValueError(f"{title} expects 1e-5 <= {name} < 1 / bins = {1.0 / bins:g}, got {floor}")
        if not 0.0 < box.min_slope < 1.0:
            raise ValueError(f"{title} expects 0 < min_slope < 1, got {box.min_slope}")

    def features_first(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """x `(d, *batch)`, numbers `(P, d, *batch)` -> value and ladj, each `(d, *batch)`: views only."""
        dtype = x.dtype
        if numbers.dtype != dtype or dtype not in (torch.float32, torch.float64):
            wide = torch.promote_types(dtype, torch.float32)
            x, numbers = x.to(wide), numbers.to(wide)
        y, ladj = rational_quadratic(x, numbers, self.box, inverse)
        return (y, ladj) if y.dtype == dtype else (y.to(dtype), ladj.to(dtype))

    def _map(self, x: Tensor, numbers: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, numbers `(P, d, *batch)`, broadcast against each other."""
        first = features_first(x)
        if numbers.shape[1:] != first.shape:
            shape = torch.broadcast_shapes(x.shape, (*numbers.shape[2:], numbers.shape[1]))
            size, fill = (shape[-1], *shape[:-1]), (1,) * (len(shape) + 1 - numbers.dim())
            numbers = numbers.reshape(*numbers.shape[:2], *fill, *numbers.shape[2:]).expand(-1, *size)
            first = x.expand(shape).movedim(-1, 0)
        y, ladj = self.features_first(first, numbers, inverse)
        return features_last(y), features_last(ladj)

    def _rows(self, params: Tensor) -> Tensor:
        if params.dim() < 2 or params.shape[0] != self.num_params:
            raise ValueError(
                f"{type(self).__name__} expects params of shape ({self.num_params}, *batch, d), "
                f"parameter axis first, got shape {tuple(params.shape)}"
            )
        return numbers_first(params)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, low={self.box.low:g}, high={self.box.high:g}"


@register("RationalQuadratic")
class RationalQuadratic(_Element):
    r"""Monotone rational-quadratic spline on [-bound, bound], the identity outside, with continuous slope.

    K bins of widths and heights :math:`2B(m + (1 - K m) \operatorname{softmax})`, interior slopes
    :math:`m + \operatorname{softplus}(a + c)`, c such that a = 0 gives 1, end slopes 1; the curve in a bin
    is in `rational_quadratic`. Zero params are the identity. Both directions are exact and cost the same; for
    params up to 1e15 in size they and their gradients are finite at any finite x.

    In float32, however rough the params, |T(T^-1(y)) - y| is at most 1e-5 B or 8 eps B (1 + slope), the
    rounding of x; x comes back within 8 eps B (1 + 1 / slope), or gives the same y to 1e-5 B. `inverse`
    returns minus the ladj that `forward` gives at its x. Where a bin is so flat that y cannot tell the x of a
    range apart, neither can the ladj after a round trip.

    "Neural Spline Flows" (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Args:
        bins: K, at least 2. `num_params` is 3 K - 1: K widths, K heights, K - 1 slopes at the interior knots.
        bound: B, half the side of the box.
        min_width, min_height: m, the least share of the side a bin may have, in [1e-5, 1 / K).
        min_slope: the least slope of a knot, in (0, 1). Between knots the curve may be flatter.

    Raises:
        ValueError: an argument out of range; in a call, params that are not `(num_params, *batch, d)`.

    Example:
        >>> import torch, flowpath as fp
        >>> spline = fp.RationalQuadratic(8)
        >>> params = torch.ones(spline.num_params, 2)  # d = 2
        >>> y, ladj = spline.forward(torch.tensor([1.0, 7.0]), params)
        >>> y
        tensor([0.9286, 7.0000])
        >>> spline.inverse(y, params)[0]
        tensor([1., 7.])
    """

    def __init__(
        self,
        bins: int = 8,
        *,
        bound: float = 5.0,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        super().__init__(Box(bins, -bound, bound, min_width, min_height, min_slope), 3 * bins - 1)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, params `(num_params, *batch, d)` -> (y, ladj), each `(*batch, d)`."""
        return self._map(x, self._rows(params), inverse=False)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: (x, ladj), ladj of this direction."""
        return self._map(y, self._rows(params), inverse=True)


@register("CircularRationalQuadratic")
class CircularRationalQuadratic(_Element):
    r"""Rational-quadratic spline of the circle [start, start + period): a smooth bijection of angles.

    .. math:: y = S(x \bmod \text{period}) + \text{shift} \bmod \text{period}

    S is the spline of `RationalQuadratic` on the period, with one free slope for both ends; the shift turns
    the circle, so that no point of it is fixed. Inputs are wrapped into the period first (infinities give
    NaN), outputs lie in it. Zero params are the identity of the circle. Both directions are exact.

    "Normalizing Flows on Tori and Spheres" (Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan,
    Cranmer 2020, arXiv:2002.02428).

    Args:
        bins: K, at least 2. `num_params` is 3 K + 1: K widths, K heights, K slopes (of the knot that starts
            each bin), and the shift, in the units of x.
        period, start: the circle's length and where it is cut.
        min_width, min_height, min_slope: as in `RationalQuadratic`.

    Raises:
        ValueError: an argument out of range; in a call, params that are not `(num_params, *batch, d)`.

    Example:
        >>> import torch, flowpath as fp
        >>> spline = fp.CircularRationalQuadratic(4)
        >>> y, ladj = spline.forward(torch.tensor([1.0, 1.0 + 2 * torch.pi]), torch.zeros(13, 2))
        >>> bool((y - 1.0).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        bins: int = 8,
        *,
        period: float = 2.0 * math.pi,
        start: float = -math.pi,
        min_width: float = 1e-3,
        min_height: float = 1e-3,
        min_slope: float = 1e-3,
    ) -> None:
        box = Box(bins, start, start + period, min_width, min_height, min_slope, unit_ends=False)
        super().__init__(box, 3 * bins + 1)
        self.period, self.start = period, start

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*batch, d)`, params `(num_params, *batch, d)` -> (y, ladj), each `(*batch, d)`."""
        rows, shift = self._rows(params).split((3 * self.bins, 1))
        y, ladj = self._map(self._wrap(x), rows, inverse=False)
        return self._wrap(y + shift[0].movedim(0, -1).to(x.dtype)), ladj

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: (x, ladj), ladj of this direction."""
        rows, shift = self._rows(params).split((3 * self.bins, 1))
        x, ladj = self._map(self._wrap(y - shift[0].movedim(0, -1).to(y.dtype)), rows, inverse=True)
        return self._wrap(x), ladj

    def _wrap(self, x: Tensor) -> Tensor:
        z = self.start + torch.remainder(x - self.start, self.period)
        return torch.where(z >= self.box.high, self.start, z)  # remainder may round up to the period
