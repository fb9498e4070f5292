"""Three posteriors to time steps of SVI on: eight schools, a logistic regression, a hierarchy of 1,000 groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch import Tensor

import flowpath as fp

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclass(frozen=True)
class Problem:
    """A model, endless arguments for it, and two guides of equal size.

    Args:
        model: the model.
        batches: the arguments of each step.
        theirs, ours: Pyro's guide and flowpath's, functions of the model. The same where no flow is asked for.
        size: the guide in words.
    """

    model: Callable[..., None]
    batches: Iterator[tuple[Tensor, ...]]
    theirs: Callable[[Any], Any]
    ours: Callable[[Any], Any]
    size: str


def schools(device: torch.device, seed: int) -> Problem:
    """Eight schools, not centred, D = 10 (Rubin 1981)."""

    def model(y: Tensor, s: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, s), obs=y)

    data = torch.tensor(EFFECTS, device=device), torch.tensor(ERRORS, device=device)
    return Problem(model, iter(lambda: data, None), *_iaf(2, 64, 2), "IAF 2 x (64, 64)")


def logistic(device: torch.device, seed: int, rows: int = 10_000, columns: int = 50, batch: int = 256) -> Problem:
    """A logistic regression on 10,000 made rows of 50 columns, in minibatches of 256."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    y = torch.bernoulli((x @ torch.randn(columns, generator=generator) / 3).sigmoid(), generator=generator)
    x, y = x.to(device), y.to(device)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(columns), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        logits = (w @ x.T if w.dim() == 1 else (w.squeeze(-2) @ x.T)) + b
        with pyro.plate("rows", rows, subsample_size=len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        while True:
            chosen = torch.randint(rows, (batch,), generator=generator).to(device)
            yield x[chosen], y[chosen]

    return Problem(model, batches(), *_iaf(1, 128, 1), "IAF 1 x (128)")


def hierarchy(device: torch.device, seed: int, groups: int = 1_000, rows: int = 10) -> Problem:
    """1,000 groups of 10 rows each: a mean and a spread of group means, D = 1,002."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(groups, 1, generator=generator) + torch.randn(groups, rows, generator=generator)
    data = (y.to(device),)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(()) * 5.0))
        with pyro.plate("groups", groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1).expand(*theta.shape, rows), 1.0).to_event(1), obs=y)

    return Problem(model, iter(lambda: data, None), AutoNormal, AutoNormal, "mean-field Gaussian")


def _iaf(transforms: int, width: int, depth: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Pyro's IAF guide and flowpath's, of one size."""

    def theirs(model: Any) -> Any:
        return AutoIAFNormal(model, hidden_dim=[width] * depth, num_transforms=transforms)

    def ours(model: Any) -> Any:
        return fp.svi.AutoFlow(model, "iaf", transforms=transforms, hidden_features=(width,) * depth)

    return theirs, ours


PROBLEMS = {"schools": schools, "logistic": logistic, "hierarchy": hierarchy}
