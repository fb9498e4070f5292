"""A flow: a transform over a base; as a module it trains and scores, called it is a Pyro distribution."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from flowpath.bases import Base
from flowpath.checks import check_context, check_inputs, check_like
from flowpath.distribution import FlowDistribution, Shape, as_shape
from flowpath.foreign_bases import TorchBase
from flowpath.recompute import run
from flowpath.registry import register
from flowpath.transform import Chain, Cost, Record, Transform

_MANY_DRAWS = 10_000  # draws from which on a sequential sampler is worth a word
_MANY_FEATURES = 16


class Layer(NamedTuple):
    """One step of `Flow.trace`: a layer's name, its output `(*batch, *event)` and its ladj `(*batch,)`."""

    name: str
    value: Tensor
    ladj: Tensor


@dataclass(frozen=True)
class Recorded:
    """A pass of a flow with what path gradients need: z, x, log q0(z), the forward ladj and the transform's record."""

    z: Tensor
    x: Tensor
    log_base: Tensor
    ladj: Tensor
    record: Record
    base: Base
    context: Tensor | None

    def at_held_noise(self) -> tuple[Tensor, Tensor]:
        """log q0 with z held, and its score d log q0 / dz there, a constant."""
        with torch.enable_grad():
            held = self.z.detach().requires_grad_()
            log_base = self.base.log_prob(held, self.context)
            (score,) = torch.autograd.grad(log_base.sum(), held, retain_graph=True, materialize_grads=True)
        return log_base, score


@register("Flow")
class Flow(nn.Module):
    r"""The distribution of x = T^{-1}(z), z ~ base: a density model, a reparameterised sampler, a Pyro distribution.

    .. math:: \log q(x \mid c) = \log q_0(T(x; e)) + \log|\det \partial T / \partial x|, \qquad e = \text{embedding}(c)

    Shapes: x `(*batch, *event)`, context `(*batch, C)` broadcasts against it; samples come first,
    `(*num_samples, *context_batch, *event)`.

    Args:
        transform: data to noise.
        base: a `Base`, or a torch distribution with an event and no batch.
        embedding: a module applied to the context before anything sees it, or None.

    Set `flow.checkpoint_layers = True` to compute layers anew in the backward pass of `log_prob` and of draws: the
    graph then keeps the input of each layer alone, for one more forward pass; gradients are the same bit for bit.

    Raises:
        TypeError, ValueError: parts of the wrong kind or of shapes that do not fit.

    Example:
        >>> import torch, flowpath as fp
        >>> flow = fp.nsf(features=3)
        >>> flow.log_prob(torch.randn(8, 3)).shape, flow.sample(5).shape
        (torch.Size([8]), torch.Size([5, 3]))
        >>> x, log_q = flow.rsample_and_log_prob((4, 2))
        >>> flow().batch_shape, flow().event_shape
        (torch.Size([]), torch.Size([3]))
    """

    def __init__(self, transform: Transform, base: Base | Distribution, embedding: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(
                f"Flow expects a Transform, got {type(transform).__name__}; see fp.from_nflows, fp.from_torch"
            )
        base = TorchBase(base) if isinstance(base, Distribution) else base
        if not isinstance(base, Base):
            raise TypeError(
                f"Flow expects a Base or a torch distribution, got {type(base).__name__}; wrap a module that returns a "
                "distribution as fp.ConditionalBase(module, features)"
            )
        if transform.noise_shape not in (None, base.event_shape):
            raise ValueError(
                f"Flow: the transform gives noise of shape {tuple(transform.noise_shape or ())}, the base has "
                f"{tuple(base.event_shape)}"
            )
        self.transform, self.base, self.embedding = transform, base, embedding
        widths = sorted({w for w in (transform.context, base.context) if w})
        if len(widths) > 1:
            raise ValueError(f"Flow: transform and base expect contexts of different widths {widths}")
        self._embedded = widths[0] if widths else 0
        self.context = self._embedded if embedding is None else _input_width(embedding)
        self.checkpoint_layers = False
        self._warned: set[str] = set()

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one x."""
        return self.transform.shape_after("inverse", self.base.event_shape)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients to the parameters."""
        return self.base.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """Where x lives."""
        if self.transform.data_support is not None:
            return self.transform.data_support
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow given a context, as a Pyro distribution: a live view, nothing runs until it is used."""
        return FlowDistribution(self, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density in nats of x `(*batch, *event)`: `(*batch,)`."""
        x, context = check_inputs(self, "x", x, self.event_shape, *self._context(context))
        z, ladj = run(self.transform, "forward", x, context, checkpoint_layers=self.checkpoint_layers)
        return self.base.log_prob(z, context if self.base.context else None) + ladj

    @torch.no_grad()
    def sample(
        self,
        num_samples: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draws `(*num_samples, *context_batch, *event)` without gradients. Arguments as `rsample_and_log_prob`."""
        return self.rsample_and_log_prob(num_samples, context, generator=generator, noise=noise)[0]

    def rsample(
        self,
        num_samples: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Draws whose gradients travel the path x = T^{-1}(z). Arguments as `rsample_and_log_prob`."""
        return self.rsample_and_log_prob(num_samples, context, generator=generator, noise=noise)[0]

    def rsample_and_log_prob(
        self,
        num_samples: Shape = (),
        context: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log density from one pass.

        Args:
            num_samples: a count or a shape.
            context: `(*context_batch, C)`.
            generator: draws from it instead of torch's global one.
            noise: standard noise `(*num_samples, *context_batch, *base.noise_shape)` to use instead of fresh draws, as
                `flow.base.draw_noise` gives: common random numbers.

        Returns:
            x `(*num_samples, *context_batch, *event)` and log q(x) `(*num_samples, *context_batch)`.
        """
        z, context = self._draw_base(as_shape(num_samples), context, generator, noise)
        x, ladj = run(self.transform, "inverse", z, context, checkpoint_layers=self.checkpoint_layers)
        return x, self.base.log_prob(z, context if self.base.context else None) - ladj

    def record_draws(self, num_samples: Shape, context: Tensor | None = None, noise: Tensor | None = None) -> Recorded:
        """`rsample_and_log_prob` with what `Transform.pull_score` needs: draws for path gradients."""
        z, context = self._draw_base(as_shape(num_samples), context, None, noise)
        x, ladj, record = self.transform.record("inverse", z, context if self.transform.context else None)
        return self._recorded(z, x, -ladj, record, context)

    def record_noise(self, x: Tensor, context: Tensor | None = None) -> Recorded:
        """`log_prob` with what `Transform.pull_score` needs to carry the score of another density of x to the noise."""
        x, context = check_inputs(self, "x", x, self.event_shape, *self._context(context))
        z, ladj, record = self.transform.record("forward", x, context if self.transform.context else None)
        return self._recorded(z, x, ladj, record, context)

    def _recorded(self, z: Tensor, x: Tensor, ladj: Tensor, record: Record, context: Tensor | None) -> Recorded:
        given = context if self.base.context else None
        return Recorded(z, x, self.base.log_prob(z, given), ladj, record, self.base, given)

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise z = T(x) behind data x."""
        x, context = check_inputs(self, "x", x, self.event_shape, *self._context(context))
        return self.transform._forward(x, context if self.transform.context else None)[0]

    def to_data(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data x = T^{-1}(z) made of noise z."""
        z, context = check_inputs(self, "z", z, self.base.event_shape, *self._context(context))
        return self.transform._inverse(z, context if self.transform.context else None)[0]

    def trace(self, x: Tensor, context: Tensor | None = None) -> list[Layer]:
        """Value and ladj after each layer on the way from x to noise, for people who debug."""
        x, context = check_inputs(self, "x", x, self.event_shape, *self._context(context))
        layers = []
        for name, t in leaves("transform", self.transform):
            x, ladj = t._forward(x, context if t.context else None)
            layers.append(Layer(f"{name} {type(t).__name__}", x, ladj))
        return layers

    def warn_if_slow(self, job: str, cost: Cost, why: str) -> None:
        """Say once per flow and job that a direction is used in which the transform is not parallel."""
        if cost != "parallel" and job not in self._warned:
            self._warned.add(job)
            warnings.warn(why, stacklevel=3)

    def _context(self, context: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The embedded context and the width that must be its; a wrong raw one is reported here."""
        if self.embedding is None or context is None:
            return context, self._embedded if self.embedding is None else (self.context or self._embedded)
        check_context(self, context, self.context)
        check_like(self, "context", context, dtype=False)  # an embedding may take integers
        return self.embedding(context), self._embedded

    def _draw_base(
        self,
        shape: torch.Size,
        context: Tensor | None,
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """z `(*shape, *context_batch, *event)` and the embedded context, expanded to the same batch."""
        embedded, width = self._context(context)
        rows = shape if embedded is None else torch.Size((*shape, *embedded.shape[:-1]))
        if self.transform.inverse_cost != "parallel" and rows.numel() >= _MANY_DRAWS:
            self._warn_slow_draws(rows.numel())
        like = self.base.like.new_zeros(()).expand(*rows, *self.base.event_shape)
        _, wide = check_inputs(self, "z", like, self.base.event_shape, embedded, width)
        given = wide if self.base.context else None
        if noise is None:
            return self.base.rsample(rows, given, generator), wide
        check_like(self, "noise", noise)
        want = (*rows, *(self.base.noise_shape or ()))
        if self.base.noise_shape is not None and tuple(noise.shape) != want:
            raise ValueError(f"Flow expects noise of shape {want}, got {tuple(noise.shape)}")
        return self.base.from_noise(noise, given), wide

    def _warn_slow_draws(self, draws: int) -> None:
        d = self.event_shape.numel()
        if d >= _MANY_FEATURES:
            self.warn_if_slow(
                "draw",
                self.transform.inverse_cost,
                f"this flow samples one feature after another: {draws} draws of {d} features cost about "
                f"{sequential_factor(d):.0f} times their log_prob; for much sampling use a coupling flow (fp.nsf, "
                "fp.realnvp) or fp.iaf",
            )


def sequential_factor(features: int) -> float:
    """About how many log_probs a large batch of draws costs with the incremental autoregressive inverse.

    Measured by `python -m experiments.bench.ar_inverse` at 4,096 rows: 1.5 at 2 features, 3.7 at 64 (affine).
    """
    return 1.5 + features / 30


def leaves(name: str, t: Transform) -> list[tuple[str, Transform]]:
    """The chain's layers in order, nested chains opened, with their names in the module."""
    if not isinstance(t, Chain):
        return [(name, t)]
    return [leaf for i, part in enumerate(t.transforms) for leaf in leaves(f"{name}.transforms.{i}", part)]  # type: ignore[arg-type]


def _input_width(embedding: nn.Module) -> int | None:
    """Width of what the embedding takes, where its first sized layer tells."""
    widths = (getattr(m, "in_features", None) for m in embedding.modules())
    return next((w for w in widths if isinstance(w, int)), None)
