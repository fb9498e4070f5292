"""The nflows Flow behind `to_nflows`. It imports nflows, so nothing imports it before it is needed."""

from __future__ import annotations

from typing import Any

import torch
from nflows.distributions.base import Distribution
from nflows.flows.base import Flow as Theirs
from nflows.transforms.base import Transform as TheirTransform
from torch import Tensor, nn

from flowpath.bases import Base
from flowpath.flow import Flow
from flowpath.transform import Transform

_PARTS = ("_transform", "_distribution", "_embedding_net")


class NflowsFlow(Theirs):
    """What `to_nflows` returns: nflows' interface, and the methods that nessai asks of a flow beside it.

    Args:
        flow: the Flow that does the work.
    """

    device: torch.device | None = None  # for nessai, which keeps it here

    def __init__(self, flow: Flow) -> None:
        nn.Module.__init__(self)
        self.flow = flow

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARTS:
            raise AttributeError(f"{name} is read from the flow; build an fp.Flow with another part, and to_nflows it")
        super().__setattr__(name, value)

    @property
    def _transform(self) -> TheirTransform:
        return _TransformPart(self.flow.transform)

    @property
    def _distribution(self) -> Distribution:
        return _BasePart(self.flow.base)

    @property
    def _embedding_net(self) -> nn.Module:
        return nn.Identity() if self.flow.embedding is None else self.flow.embedding

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(inputs, context)

    def sample(self, num_samples: int, context: Any = None, batch_size: int | None = None) -> Tensor:
        """Draws `(num_samples, *event)`, or `(C, num_samples, *event)` for C rows of context, with gradients."""
        _check_positive("num_samples", num_samples)
        if batch_size is None:
            return self.sample_and_log_prob(num_samples, context)[0]
        _check_positive("batch_size", batch_size)
        counts = [min(batch_size, num_samples - done) for done in range(0, num_samples, batch_size)]
        parts = [self.sample_and_log_prob(n, context)[0] for n in counts]
        return torch.cat(parts, dim=0 if context is None else 1)

    def sample_and_log_prob(self, num_samples: int, context: Any = None) -> tuple[Tensor, Tensor]:
        """Draws as `sample` gives them, and their log densities, of the same leading shape."""
        _check_positive("num_samples", num_samples)
        given = None if context is None else torch.as_tensor(context)
        x, log_prob = self.flow.rsample_and_log_prob(num_samples, given)
        return (x, log_prob) if given is None else (x.transpose(0, 1), log_prob.transpose(0, 1))

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise behind data `(N, *event)`."""
        return self.flow.to_noise(inputs, context)

    # What nessai calls on its flows (nessai.flows.base.BaseFlow).

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise and ladj `(N,)` of data."""
        return self._transform(x, self._embedded(context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data and ladj `(N,)` of noise."""
        return self._transform.inverse(z, self._embedded(context))

    def forward_and_log_prob(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise of data, and the data's log density."""
        z, ladj = self.forward(x, context)
        return z, self.base_distribution_log_prob(z, context) + ladj

    def sample_latent_distribution(self, n: int, context: Tensor | None = None) -> Tensor:
        """Draws of the base."""
        return self._distribution.sample(n, self._embedded(context))

    def base_distribution_log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of noise under the base."""
        return self._distribution.log_prob(z, self._embedded(context))

    def finalise(self) -> None:
        """Nothing is left to do after training."""

    def end_iteration(self) -> None:
        """Nothing is left to do after an epoch."""

    def freeze_transform(self) -> None:
        """Train the base alone."""
        self.flow.transform.requires_grad_(False)

    def unfreeze_transform(self) -> None:
        """Train the transform again."""
        self.flow.transform.requires_grad_(True)

    def _embedded(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self._embedding_net(context)


class _TransformPart(TheirTransform):
    """A transform of ours that is handed a context whether it wants one or not."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(inputs, context if self.transform.context else None)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(inputs, context if self.transform.context else None)


class _BasePart(Distribution):
    """A base of ours; as in nflows, a context it does not use still says how many rows of draws there are."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self._shape = base.event_shape

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        return self.base.log_prob(inputs, context if self.base.context else None)

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        if context is None:
            return self.base.rsample((num_samples,))
        wide = context.expand(num_samples, *context.shape) if self.base.context else None
        return self.base.rsample((num_samples, len(context)), wide).transpose(0, 1)


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError(f"{name} must be a positive integer, got {value!r}")
