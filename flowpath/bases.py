"""Base distributions of the noise z: the simple end of a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from flowpath.checks import check_count
from flowpath.nets.mlp import MLP
from flowpath.registry import register

_LOG_TWO_PI = math.log(2.0 * math.pi)


class Base(nn.Module):
    """A distribution of noise z `(*batch, *event_shape)`, possibly given a context `(*batch, C)`.

    A subclass writes `log_prob(z, context)` and either `from_noise(noise, context)`, where z is a fixed differentiable
    map of standard noise, or `rsample(shape, context, generator)`. It declares

    - `event_shape`, `context` (the width it needs, 0 for none), `support`;
    - `has_rsample`: whether its draws carry gradients to its parameters;
    - `noise_shape`: event shape of the standard noise it maps, None where it is no such map;
    - `noise_kind`: "normal" or "uniform", the law of that noise.
    """

    has_rsample: bool = True
    noise_shape: torch.Size | None = None
    noise_kind: Literal["normal", "uniform"] = "normal"
    context: int = 0
    like: Tensor

    def __init__(self, event_shape: Sequence[int], context: int = 0) -> None:
        super().__init__()
        check_count(type(self).__name__, "context", context, least=0)
        self.event_shape = torch.Size(event_shape)
        for size in self.event_shape:
            check_count(type(self).__name__, "features", size)
        self.context = context
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density lives: by default the whole space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density in nats, `(*batch,)`."""
        raise TypeError(f"{type(self).__name__} must define log_prob(z, context)")

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Standard noise `(*batch, *noise_shape)` of `noise_kind` to z."""
        raise ValueError(f"{type(self).__name__} is no fixed map of noise; draw from it without noise=")

    def draw_noise(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Standard noise `(*shape, *noise_shape)` in the module's dtype and device."""
        if self.noise_shape is None:
            raise ValueError(f"{type(self).__name__} is no fixed map of noise; draw from it without noise=")
        draw = torch.randn if self.noise_kind == "normal" else torch.rand
        size = (*shape, *self.noise_shape)
        return draw(size, generator=generator, dtype=self.like.dtype, device=self.like.device)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws `(*shape, *event_shape)`, where `shape` includes the context's batch shape; differentiable where
        `has_rsample`."""
        return self.from_noise(self.draw_noise(shape, generator), context)


@register("StandardNormal")
class StandardNormal(Base):
    """z ~ N(0, I).

    Args:
        features: width of the event.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.StandardNormal(2).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, features: int) -> None:
        super().__init__([features])
        self.noise_shape = self.event_shape

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return -0.5 * (z.square().sum(-1) + self.event_shape[0] * _LOG_TWO_PI)

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return noise


@register("DiagonalNormal")
class DiagonalNormal(Base):
    """z ~ N(m, diag(s^2)), learnable, or with m and s functions of the context; starts at N(0, I).

    Args:
        features: width of the event.
        context: width of the context, 0 for free parameters.
        hidden_features: hidden layers of the net from context to (log s, m).

    Example:
        >>> import torch, flowpath as fp
        >>> fp.DiagonalNormal(2, context=3).log_prob(torch.zeros(5, 2), torch.randn(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, features: int, *, context: int = 0, hidden_features: Sequence[int] = (128, 128)) -> None:
        super().__init__([features], context)
        self.noise_shape = self.event_shape
        self.net: MLP | None = None
        if context:
            self.net = MLP(context, features, num_params=2, hidden_features=hidden_features)
        else:
            self.numbers = nn.Parameter(torch.zeros(2, features))

    def _parts(self, context: Tensor | None) -> Tensor:
        return self.numbers if self.net is None or context is None else self.net(context)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        log_s, m = self._parts(context)
        u = (z - m) * (-log_s).exp()
        return -(0.5 * u.square() + log_s + 0.5 * _LOG_TWO_PI).sum(-1)

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        log_s, m = self._parts(context)
        return m + log_s.exp() * noise


@register("StudentT")
class StudentT(Base):
    """Independent Student t features with learnable degrees of freedom: a base with heavy tails.

    Draws carry gradients to the degrees of freedom by implicit reparameterisation of the chi-square ("Implicit
    Reparameterization Gradients", Figurnov, Mohamed, Mnih 2018, arXiv:1805.08498): the base is no fixed map of noise.

    Args:
        features: width of the event.
        df: where the degrees of freedom start; they stay above 1.

    Raises:
        ValueError: df not above 1.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.StudentT(2, df=4.0).log_prob(torch.zeros(1, 2)).detach()
        tensor([-1.9617])
    """

    def __init__(self, features: int, *, df: float = 5.0) -> None:
        super().__init__([features])
        if not df > 1.0:
            raise ValueError(f"StudentT expects df > 1, got {df}")
        self.raw_df = nn.Parameter(torch.full((features,), math.log(math.expm1(df - 1.0)) if df < 30 else df - 1.0))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom `(features,)`."""
        return 1.0 + F.softplus(self.raw_df)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        df = self.df
        half = 0.5 * (df + 1.0)
        constant = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * (df * math.pi).log()
        return (constant - half * torch.log1p(z.square() / df)).sum(-1)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        size = (*shape, *self.event_shape)
        df = self.df.expand(size)
        normal = torch.randn(size, generator=generator, dtype=df.dtype, device=df.device)
        chi2 = 2.0 * torch._standard_gamma(0.5 * df, generator=generator)
        return normal * (df / chi2.clamp_min(torch.finfo(df.dtype).tiny)).sqrt()


@register("BoxUniform")
class BoxUniform(Base):
    """Uniform on a box; the log density is -inf outside.

    Args:
        low, high: the corners, `(features,)` each, or numbers together with `features`.
        features: width of the event, where low and high are numbers.

    Raises:
        ValueError: corners of different widths, or high not above low.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.BoxUniform(0.0, 2.0, features=2).log_prob(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
        tensor([-1.3863,    -inf])
    """

    noise_kind = "uniform"
    low: Tensor
    high: Tensor

    def __init__(
        self, low: Sequence[float] | Tensor | float, high: Sequence[float] | Tensor | float, *, features: int = 1
    ) -> None:
        ends = [torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in (low, high)]
        low_, high_ = (v.expand(features).clone() if v.dim() == 0 else v for v in ends)
        if low_.shape != high_.shape or low_.dim() != 1 or not bool((high_ > low_).all()):
            raise ValueError(f"BoxUniform expects corners of one width with high > low, got {low} and {high}")
        super().__init__(low_.shape)
        self.noise_shape = self.event_shape
        self.register_buffer("low", low_)
        self.register_buffer("high", high_)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        inside = ((z >= self.low) & (z <= self.high)).all(-1)
        inside = inside | torch.isnan(z).any(-1)
        value = -(self.high - self.low).log().sum() + 0.0 * z.sum(-1).nan_to_num(0.0)
        value = torch.where(torch.isnan(z).any(-1), torch.full_like(value, torch.nan), value)
        return torch.where(inside, value, torch.full_like(value, -torch.inf))

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        return self.low + (self.high - self.low) * noise


@register("NormalMixture")
class NormalMixture(Base):
    """A learnable mixture of diagonal normals.

    Its draws carry no gradient (the component is a discrete choice): density estimation, not pathwise inference.

    Args:
        features: width of the event.
        components: how many.
        spread: the component means start as seeded draws from N(0, spread^2).

    Example:
        >>> import torch, flowpath as fp
        >>> fp.NormalMixture(2, 3).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    has_rsample = False

    def __init__(self, features: int, components: int, *, spread: float = 1.0) -> None:
        super().__init__([features])
        check_count("NormalMixture", "components", components)
        start = torch.randn(components, features, generator=torch.Generator().manual_seed(0))
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(spread * start.to(self.like.dtype))
        self.log_scale = nn.Parameter(torch.zeros(components, features))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        u = (z.unsqueeze(-2) - self.loc) * (-self.log_scale).exp()
        parts = -(0.5 * u.square() + self.log_scale + 0.5 * _LOG_TWO_PI).sum(-1)
        return torch.logsumexp(parts + torch.log_softmax(self.logits, -1), -1)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        count = torch.Size(shape).numel()
        with torch.no_grad():
            weights = torch.softmax(self.logits, -1)
            which = (
                torch.multinomial(weights, count, replacement=True, generator=generator)
                if count
                else weights.new_empty(0, dtype=torch.long)
            )
            noise = torch.randn(
                (count, *self.event_shape), generator=generator, dtype=self.loc.dtype, device=self.loc.device
            )
            return (self.loc[which] + self.log_scale[which].exp() * noise).reshape(*shape, *self.event_shape)
