"""Bases made of torch distributions: one rebuilt from its parameters, or one a module gives for each context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, constraints

from flowpath.bases import Base
from flowpath.registry import register


@register("TorchBase")
class TorchBase(Base):
    """A torch distribution as a base: rebuilt, at each use, from its parameters, which are kept as buffers.

    Args:
        distribution: a torch or Pyro distribution without batch dims (wrap a batch as an event by
            `torch.distributions.Independent`) whose constructor takes its parameters.

    Raises:
        ValueError: a batch shape, a discrete distribution, or one that cannot be rebuilt from its parameters; pass a
            `ConditionalBase` instead.
    """

    def __init__(self, distribution: Distribution) -> None:
        inner, self._reinterpreted = distribution, 0
        while isinstance(inner, Independent):
            self._reinterpreted += inner.reinterpreted_batch_ndims
            inner = inner.base_dist
        names = ["loc", "scale_tril"] if isinstance(inner, MultivariateNormal) else list(inner.arg_constraints)
        given = {n: getattr(inner, n) for n in names} if isinstance(inner, MultivariateNormal) else inner.__dict__
        tensors = {n: given[n] for n in names if isinstance(given.get(n), Tensor)}
        title = type(inner).__name__
        if distribution.batch_shape or not distribution.event_shape:
            raise ValueError(
                f"a base needs an event and no batch; this {title} has batch shape {tuple(distribution.batch_shape)} "
                f"and event shape {tuple(distribution.event_shape)}; wrap it as torch.distributions.Independent(d, 1)"
            )
        super().__init__(distribution.event_shape)
        self._kind = type(inner)
        try:
            self._kind(**tensors)
        except (TypeError, ValueError):
            raise ValueError(
                f"flowpath cannot rebuild a {title} from its parameters {names}; pass "
                "fp.ConditionalBase(module, features), a module that returns the distribution"
            ) from None
        self.has_rsample = inner.has_rsample
        self._names = list(tensors)
        for name, value in tensors.items():
            self.register_buffer(f"arg_{name}", value.detach().clone())

    def _build(self) -> Distribution:
        d = self._kind(**{n: getattr(self, f"arg_{n}") for n in self._names})
        return Independent(d, self._reinterpreted) if self._reinterpreted else d

    @property
    def support(self) -> constraints.Constraint:
        return self._build().support  # type: ignore[return-value]

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return _score(self._build(), z)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return _draw(self._build(), shape, generator)


@register("ConditionalBase")
class ConditionalBase(Base):
    """The base given by a module that maps a context to a torch distribution.

    Args:
        module: called with the context `(*batch, C)`, or with nothing where `context` is 0; returns a distribution of
            batch shape `(*batch,)`.
        features: width of the event.
        context: width C of the context, 0 for none.
        has_rsample: whether the distribution's draws carry gradients.

    Example:
        >>> import torch, flowpath as fp
        >>> class Head(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(3, 2)
        ...     def forward(self, c):
        ...         return torch.distributions.Independent(torch.distributions.Normal(self.net(c), 1.0), 1)
        >>> base = fp.ConditionalBase(Head(), 2, context=3)
        >>> base.log_prob(torch.zeros(5, 2), torch.randn(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, module: nn.Module, features: int, *, context: int = 0, has_rsample: bool = True) -> None:
        super().__init__([features], context)
        self.module, self.has_rsample = module, has_rsample

    def _build(self, context: Tensor | None) -> Distribution:
        return self.module(context) if self.context else self.module()

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return _score(self._build(context), z)

    def rsample(
        self, shape: Sequence[int], context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        d = self._build(context)
        return _draw(d, tuple(shape)[: len(shape) - len(d.batch_shape)], generator)


def _score(d: Distribution, z: Tensor) -> Tensor:
    """Its log_prob; torch's sum over an event refuses an empty batch."""
    return d.log_prob(z) if z.numel() else z.new_zeros(z.shape[: z.dim() - len(d.event_shape)])


def _draw(d: Distribution, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    draw = d.rsample if d.has_rsample else d.sample
    if generator is None:
        return draw(torch.Size(shape))
    with _as_global(generator):
        return draw(torch.Size(shape))


@contextmanager
def _as_global(generator: torch.Generator) -> Iterator[None]:
    """torch's distributions draw from the global generator only: let this one stand in for it, and move on with it."""
    cuda = generator.device.type == "cuda"
    with torch.random.fork_rng(devices=[generator.device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(generator.get_state(), generator.device)
            yield
            generator.set_state(torch.cuda.get_rng_state(generator.device))
        else:
            torch.set_rng_state(generator.get_state())
            yield
            generator.set_state(torch.get_rng_state())
