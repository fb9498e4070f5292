"""nflows' transforms, distributions and embedding nets behind flowpath's interfaces: any batch shape, clear errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.bases import Base
from flowpath.foreign_bases import _as_global
from flowpath.transform import Cost, Direction, Transform

_COSTS: tuple[Cost, ...] = ("parallel", "sequential", "iterative")


class NflowsTransform(Transform):
    """An nflows transform as it is: what `from_nflows` wraps.

    nflows' `forward` is data to noise, as ours. It takes rows only; here any batch shape goes, the empty one too.

    Args:
        transform: an nflows Transform, or any module with its `forward` and `inverse`.
        data_shape, noise_shape: event shapes; None for one event dim of any width.
        context: width of the context it needs, 0 for none.

    Raises:
        ValueError: in a call: data outside its domain, no inverse, or a log-det that is not one number a row.
    """

    def __init__(
        self,
        transform: nn.Module,
        *,
        data_shape: Sequence[int] | None = None,
        noise_shape: Sequence[int] | None = None,
        context: int = 0,
    ) -> None:
        super().__init__(context=context)
        self.transform = transform
        self.data_shape = None if data_shape is None else torch.Size(data_shape)
        self.noise_shape = None if noise_shape is None else torch.Size(noise_shape)
        self.forward_cost, self.inverse_cost = costs(transform)

    def _apply(self, fn: Any, recurse: bool = True) -> NflowsTransform:
        super()._apply(fn, recurse)
        for m in self.transform.modules():  # some of nflows' constants are neither parameters nor buffers
            for name, value in list(vars(m).items()):
                if isinstance(value, Tensor):
                    setattr(m, name, fn(value))
        return self

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run("forward", x, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._run("inverse", z, context)

    def _run(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = self.data_shape if direction == "forward" else self.noise_shape
        dims = 1 if shape is None else len(shape)
        batch, event = value.shape[: value.dim() - dims], value.shape[value.dim() - dims :]
        if not batch.numel():
            return value.reshape(*batch, *self.shape_after(direction, event)), value.new_zeros(batch)
        call = self.transform if direction == "forward" else self.transform.inverse
        try:
            out, ladj = call(value.reshape(-1, *event), rows(context))  # type: ignore[operator]
        except Exception as error:
            told = _explained(error, direction)
            if told is None:
                raise
            raise told from error
        if ladj.shape != (batch.numel(),):
            raise ValueError(
                f"{type(self.transform).__name__} of nflows should return a log-det of shape ({batch.numel()},), one "
                f"number a row, and returned {tuple(ladj.shape)}"
            )
        return out.reshape(*batch, *out.shape[1:]), ladj.to(value.dtype).reshape(batch)


def _explained(error: Exception, direction: Direction) -> Exception | None:
    """A bare exception of nflows in words that say which layer it was and what to do; None for any other."""
    layer, inputs = _where(error)
    kind, title = type(error).__name__, type(layer).__name__
    if kind == "InputOutsideDomain":
        seen = f"values from {inputs.detach().min():g} to {inputs.detach().max():g}" if inputs is not None else "values"
        return ValueError(
            f"{title} of nflows got {seen}, some of them outside its domain; drop those rows, or put a transform that "
            "maps into the domain before it"
        )
    if kind == "InverseNotAvailable":
        hint = " in training mode; call .eval() first" if getattr(layer, "training", False) else ""
        return ValueError(f"{title} of nflows has no {direction}{hint}")
    if kind == "AssertionError":
        return ValueError(
            f"{title} of nflows failed a check of its own, as its splines do where bins are steep; use "
            "fp.from_nflows(..., native=True), or float64"
        )
    return None


def _where(error: Exception) -> tuple[Any, Tensor | None]:
    """The innermost module that was running, and the last `inputs` that any function was given."""
    layer, inputs, step = None, None, error.__traceback__
    while step is not None:
        held = step.tb_frame.f_locals
        layer = held["self"] if isinstance(held.get("self"), nn.Module) else layer
        inputs = held["inputs"] if isinstance(held.get("inputs"), Tensor) else inputs
        step = step.tb_next
    return layer, inputs


def costs(t: Any) -> tuple[Cost, Cost]:
    """What forward and inverse of an nflows transform cost."""
    if isinstance(t, Transform):
        return t.forward_cost, t.inverse_cost
    inner = getattr(t, "_transform", None)
    if isinstance(inner, nn.Module):  # InverseTransform
        return costs(inner)[::-1]
    parts = getattr(t, "_transforms", None)
    if isinstance(parts, nn.ModuleList) and len(parts):
        forward, inverse = zip(*map(costs, parts), strict=True)
        return max(forward, key=_COSTS.index), max(inverse, key=_COSTS.index)
    return "parallel", "sequential" if hasattr(t, "autoregressive_net") else "parallel"


def rows(context: Tensor | None) -> Tensor | None:
    """A context `(*batch, C)` as rows `(N, C)`."""
    return None if context is None else context.reshape(-1, context.shape[-1])


class NflowsEmbedding(nn.Module):
    """An embedding net that takes rows, for a context of any batch shape.

    Args:
        net: maps `(N, *shape)` to `(N, E)`.
        shape: shape of one context; flowpath passes it flat, `(*batch, C)`.
    """

    def __init__(self, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.net, self.shape, self.in_features = net, tuple(shape), math.prod(shape)

    def forward(self, context: Tensor) -> Tensor:
        """`(*batch, C)` to `(*batch, E)`."""
        out = self.net(context.reshape(-1, *self.shape))
        return out.reshape(*context.shape[:-1], out.shape[-1])


class NflowsBase(Base):
    """Any nflows distribution as a base: its draws carry no gradient, and come in the flow's dtype.

    Args:
        distribution: the nflows Distribution.
        shape: its event shape.
        context: width of the context it needs, 0 for none.
    """

    has_rsample = False

    def __init__(self, distribution: nn.Module, shape: Sequence[int], context: int = 0) -> None:
        super().__init__(shape, context)
        self.distribution = distribution

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        batch = z.shape[: z.dim() - len(self.event_shape)]
        if not batch.numel():
            return z.new_zeros(batch)
        found = self.distribution.log_prob(z.reshape(-1, *self.event_shape), rows(context))  # type: ignore[operator]
        return found.to(z.dtype).reshape(batch)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        count, size = torch.Size(shape).numel(), (*shape, *self.event_shape)
        if not count:
            return self.like.new_zeros(size)
        if generator is None:
            return self._draw(count, context).reshape(size)
        with _as_global(generator):
            return self._draw(count, context).reshape(size)

    @torch.no_grad()
    def _draw(self, count: int, context: Tensor | None) -> Tensor:
        args = (count,) if context is None else (1, rows(context))
        return self.distribution.sample(*args).to(self.like)  # type: ignore[operator]


class NflowsConditionalNormal(Base):
    """nflows' ConditionalDiagonalNormal: z ~ N(m, diag(s^2)) with (m, log s) from a function of the context.

    Args:
        encoder: maps rows `(N, C)` to `(N, 2 d)`.
        shape: event shape, of d numbers.
        context: width C of the context.
    """

    def __init__(self, encoder: Any, shape: Sequence[int], context: int) -> None:
        super().__init__(shape, context)
        self.noise_shape = self.event_shape
        self.encoder = encoder

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and log s, `(*batch, *event)` each."""
        if context is None:
            raise ValueError(f"NflowsConditionalNormal expects a context with {self.context} features, got none")
        given: Any = rows(context)
        m, log_s = self.encoder(given).reshape(*context.shape[:-1], 2, *self.event_shape).unbind(context.dim() - 1)
        return m, log_s

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        m, log_s = self._parts(context)
        u = (z - m) * (-log_s).exp()
        density = -(0.5 * u.square() + log_s + 0.5 * math.log(2.0 * math.pi))
        return density.flatten(density.dim() - len(self.event_shape)).sum(-1)

    def from_noise(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        m, log_s = self._parts(context)
        return m + log_s.exp() * noise
