"""flowpath's transforms as torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import transforms as tt

from flowpath.checks import check_context
from flowpath.transform import Transform

_COSTS = ("parallel", "sequential", "iterative")


def to_torch(transform: Transform, context: Tensor | None = None) -> TransformForTorch:
    r"""A flowpath transform as a `torch.distributions` one, for TransformedDistribution and Pyro.

    torch's transforms map noise to data, so with t = `to_torch(transform)`, t(z) is `transform.inverse(z)`, t.inv(x) is
    `transform.forward(x)`, and

    .. math:: \texttt{t.log\_abs\_det\_jacobian(z, x)} = \log\left|\det \frac{\partial x}{\partial z}\right|.

    It holds the transform itself, so training one trains the other; register the transform, or a flow around it, where
    an optimiser should find its parameters. Nothing is cached, so no density is ever of parameters gone by; the log-det
    takes a pass of its own, in the cheaper direction. `flow(context)` is a distribution already, and needs one pass for
    a draw and its density.

    Args:
        transform: any Transform.
        context: `(*batch, C)`, for one that needs it; its batch broadcasts against that of z, and a
            TransformedDistribution takes it for its batch shape.

    Returns:
        A bijective torch transform whose event dims are those of the transform.

    Raises:
        TypeError: no Transform; a Flow is one already turned into a distribution by calling it.
        ValueError: a context missing, superfluous, or of another width.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.to_torch(fp.LU(2))
        >>> normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> d = torch.distributions.TransformedDistribution(normal, [t])
        >>> d.log_prob(d.rsample((5,))).shape
        torch.Size([5])
    """
    return TransformForTorch(transform, context)


class TransformForTorch(tt.Transform):
    """What `to_torch` returns.

    Args:
        transform: any Transform.
        context: the context it needs, or None.
    """

    bijective = True
    __hash__ = object.__hash__  # torch's __eq__, identity, takes it away

    def __init__(self, transform: Transform, context: Tensor | None = None) -> None:
        if not isinstance(transform, Transform):
            hint = "; pass flow.transform, or use flow(context), a distribution" if hasattr(transform, "base") else ""
            raise TypeError(f"to_torch expects a flowpath Transform, got {type(transform).__name__}{hint}")
        title = type(transform).__name__
        if context is None and transform.context:
            raise ValueError(f"to_torch: {title} expects a context with {transform.context} features, got none")
        if context is not None:
            check_context(transform, context, transform.context or None)
            if not transform.context:
                raise ValueError(f"to_torch: {title} takes no context, got one of shape {tuple(context.shape)}")
        super().__init__()
        self.transform, self.context = transform, context

    @property
    def domain(self) -> Any:  # type: ignore[override]
        """Where noise lives."""
        return self.transform.noise_support or _whole(self.transform.noise_shape)

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        """Where data live."""
        return self.transform.data_support or _whole(self.transform.data_shape)

    def with_cache(self, cache_size: int = 1) -> TransformForTorch:
        """Itself: it never caches, for a cache cannot see that parameters have changed."""
        return self

    def _call(self, x: Tensor) -> Tensor:
        return self.transform.inverse(x, self.context)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform.forward(y, self.context)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |det dy / dx| of noise x and data y, `(*batch,)`."""
        forward, inverse = (_COSTS.index(c) for c in (self.transform.forward_cost, self.transform.inverse_cost))
        if forward < inverse:
            return -self.transform.forward(y, self.context)[1]
        return self.transform.inverse(x, self.context)[1]

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the data made of noise of a shape, the batch of the context included."""
        return self._shape(shape, self.domain.event_dim, "inverse")

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Shape of the noise behind data of a shape."""
        return self._shape(shape, self.codomain.event_dim, "forward")

    def _shape(self, shape: Sequence[int], dims: int, direction: Any) -> torch.Size:
        batch, event = tuple(shape)[: len(shape) - dims], tuple(shape)[len(shape) - dims :]
        if self.context is not None:
            batch = torch.broadcast_shapes(batch, self.context.shape[:-1])
        return torch.Size((*batch, *self.transform.shape_after(direction, event)))


def _whole(shape: torch.Size | None) -> constraints.Constraint:
    """Every event of that shape."""
    return constraints.independent(constraints.real, 1 if shape is None else len(shape))
