"""`Flow(context)` as a Pyro distribution."""

from __future__ import annotations

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

from flowpath.checks import check_context

if TYPE_CHECKING:
    from flowpath.draws import Draw, Noise
    from flowpath.flow import Flow

Shape = int | Sequence[int]


class FlowDistribution(TorchDistribution):
    """`Flow(context)`: the flow given a context, for `pyro.sample` and wherever a torch distribution goes.

    batch_shape is the context's batch shape, event_shape the flow's. `log_prob` always recomputes, and its gradient
    reaches the value, the parameters and the context. `expand`, `mask`, `to_event` are Pyro's.

    Args:
        flow: the flow.
        context: `(*batch, C)` or None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, flow: Flow, context: Tensor | None = None, *, validate_args: bool | None = None) -> None:
        self.flow, self.context = flow, context
        self._drawn: tuple[Tensor, int, bool, Tensor] | None = None
        if context is None and flow.context:
            raise ValueError(f"Flow expects a context with {flow.context} features, got none; pass flow(context)")
        if context is not None:
            check_context(flow, context, None)
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, flow.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.has_rsample

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.flow.support

    def expand(self, batch_shape: Sequence[int], _instance: FlowDistribution | None = None) -> FlowDistribution:
        """The same distribution over a larger batch shape; draws are independent along the new dims."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context, new._drawn = self.flow, self.context, None
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample_and_log_prob(
        self, sample_shape: Shape = (), *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws `(*sample_shape, *batch_shape, *event)` and their log density, from one pass."""
        shape, context = self.request(sample_shape)
        return self.flow.rsample_and_log_prob(shape, context, generator=generator, noise=noise)

    def draw(self, num_samples: int, noise: Noise = None) -> Draw:
        """`fp.draw(self, num_samples, noise)`: draws with the three views of log q."""
        from flowpath.draws import draw

        return draw(self, num_samples, noise)

    def request(self, sample_shape: Shape) -> tuple[tuple[int, ...], Tensor | None]:
        """What to ask of the flow for draws of `sample_shape`: a shape and the context, expanded to the batch shape."""
        held = () if self.context is None else self.context.shape[:-1]
        new = self.batch_shape[: len(self.batch_shape) - len(held)]
        context = self.context
        if context is not None and self.batch_shape[len(new) :] != held:
            context = context.expand(*self.batch_shape[len(new) :], context.shape[-1])
        return (*as_shape(sample_shape), *new), context

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws whose gradients travel the path."""
        value, log_prob = self.rsample_and_log_prob(sample_shape)
        self._drawn = value, value._version, torch.is_grad_enabled(), log_prob
        return value

    def rsample_and_score(self) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """A draw a batch entry, its log density, and a function for d log q(x) / dx from the same pass, a constant."""
        shape, context = self.request(())
        r = self.flow.record_draws(shape, context)
        log_prob = r.log_base + r.ladj
        self._drawn = r.x, r.x._version, torch.is_grad_enabled(), log_prob
        return r.x, log_prob, lambda: self.flow.transform.pull_score(r.record, r.at_held_noise()[1])

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, `(*batch,)` of value and batch_shape broadcast together."""
        lead = value.dim() - len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[: max(lead, 0)], self.batch_shape)
        return self.flow.log_prob(value.expand(*batch, *value.shape[max(lead, 0) :]), self.context)

    def score_parts(self, x: Tensor, *args: object, **kwargs: object) -> ScoreParts:
        """Pyro's log q and its two gradient terms; the draw just made is not scored a second time."""
        drawn, self._drawn = self._drawn, None
        same = drawn is not None and x is drawn[0] and x._version == drawn[1] and torch.is_grad_enabled() == drawn[2]
        log_prob = drawn[3] if same and drawn is not None else self.log_prob(x)
        return ScoreParts(log_prob, 0, log_prob) if self.has_rsample else ScoreParts(log_prob, log_prob, 0)  # type: ignore[arg-type]

    def _moments(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.flow.base.like.device).manual_seed(0)
        with torch.no_grad():
            x, _ = self.rsample_and_log_prob(4096, generator=generator)
        return x.mean(0), x.std(0)

    @property
    def mean(self) -> Tensor:
        """Mean of 4096 seeded draws, `(*batch_shape, *event)`."""
        return self._moments()[0]

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of 4096 seeded draws."""
        return self._moments()[1]

    @property
    def variance(self) -> Tensor:
        """Square of `stddev`."""
        return self.stddev.square()


def as_shape(num_samples: Shape) -> torch.Size:
    """A count or a shape as a shape."""
    counts = num_samples if isinstance(num_samples, Iterable) else (num_samples,)
    try:
        shape = torch.Size([operator.index(n) for n in counts])
    except TypeError:
        raise TypeError(f"num_samples expects a count or a shape, got {num_samples!r}") from None
    if any(n < 0 for n in shape):
        raise ValueError(f"num_samples expects counts of at least 0, got {tuple(shape)}")
    return shape
