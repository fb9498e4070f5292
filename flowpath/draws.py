"""Draws with three views of log q: total, through the sample only (path), through the parameters only (score)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowpath.bases import Base
from flowpath.distribution import FlowDistribution, as_shape
from flowpath.flow import Flow


class Sobol:
    """Scrambled Sobol noise, freshly scrambled at each draw: randomised quasi-Monte Carlo.

    Unbiased, with an error that falls faster than n^(-1/2) for smooth costs in few dimensions; use a power of two of
    samples. Points are made in float64 on the CPU and then cast. Each row of a context batch gets the same points under
    a random shift of its own. "Quasi-Monte Carlo Variational Inference" (Buchholz, Wenzel, Mandt 2018,
    arXiv:1807.01604).

    Example:
        >>> import torch, flowpath as fp
        >>> d = fp.draw(fp.realnvp(2)(), 64, noise=fp.Sobol())
        >>> d.value.shape
        torch.Size([64, 2])
    """

    def __call__(self, base: Base, num_samples: int, batch: torch.Size) -> Tensor:
        """Standard noise `(num_samples, *batch, *base.noise_shape)` of the base's kind."""
        if base.noise_shape is None:
            raise ValueError(
                f"Sobol expects a base that is a fixed map of noise; {type(base).__name__} is none: drop noise="
            )
        width = base.noise_shape.numel()
        if width > torch.quasirandom.SobolEngine.MAXDIM:
            raise ValueError(f"Sobol offers {torch.quasirandom.SobolEngine.MAXDIM} dimensions, the base needs {width}")
        seed = int(torch.randint(2**31 - 1, ()))
        points = torch.quasirandom.SobolEngine(width, scramble=True, seed=seed).draw(num_samples, dtype=torch.float64)
        points = points.reshape(num_samples, *(1,) * len(batch), width)
        if batch:
            points = (points + torch.rand(*batch, width, dtype=torch.float64)) % 1.0
        tiny = torch.finfo(torch.float64).eps
        u = points.clamp(tiny, 1.0 - tiny)
        noise = u if base.noise_kind == "uniform" else torch.special.ndtri(u)
        return noise.reshape(num_samples, *batch, *base.noise_shape).to(base.like)


Noise = Tensor | Sobol | None


class Draw:
    r"""Samples z ~ q and three views of log q(z), equal in value, different in gradient:

    - `log_prob`: all of it;
    - `log_prob_path`: only the part that travels through z, grad_z log q(z) dz/dphi at a fixed density;
    - `log_prob_score`: only the part of the density's parameters at fixed z, whose expectation is zero.

    total = path + score, exactly. Views are made on demand; shapes are `(num_samples, *batch)`, value
    `(num_samples, *batch, *event)`. Made by `fp.draw`.
    """

    def __init__(self, value: Tensor, make: Callable[[str], Tensor]) -> None:
        self.value, self._make = value, make

    @cached_property
    def log_prob(self) -> Tensor:
        """log q(z) with its whole gradient."""
        return self._make("total")

    @cached_property
    def log_prob_path(self) -> Tensor:
        """log q(z) whose gradient goes through z only. Differentiable once."""
        return _PathView.apply(self.value, self._make("path"), self._make("value"))

    @cached_property
    def log_prob_score(self) -> Tensor:
        """log q(z) whose gradient goes through the density's parameters only."""
        return self._make("score")


def draw(q: Distribution | Flow, num_samples: int, noise: Noise = None) -> Draw:
    """Draw z ~ q with the three views of log q.

    For a flow the path view comes beside the sample in one pass (`Transform.pull_score`); for another distribution with
    `rsample` the density is scored again at a copy of z. Distributions without `rsample` (discrete ones, a
    `NormalMixture` base) have the score view only.

    Args:
        q: a flow, `flow(context)`, or a torch or Pyro distribution.
        num_samples: how many draws.
        noise: None for independent noise, `fp.Sobol()`, or standard noise `(num_samples, *batch, *noise_shape)`;
            the latter two for flows over a base that is a fixed map of noise.

    Raises:
        TypeError: q is no distribution. ValueError: noise that q cannot take; a view that q does not have, which names
        `Score`.

    Example:
        >>> import torch, flowpath as fp
        >>> d = fp.draw(torch.distributions.Normal(torch.zeros(3), 1.0), 10)
        >>> d.value.shape, d.log_prob_path.shape
        (torch.Size([10, 3]), torch.Size([10, 3]))
    """
    (count,) = as_shape(num_samples)
    q = q() if isinstance(q, Flow) else q
    if not isinstance(q, Distribution):
        raise TypeError(f"draw expects a flow or a torch distribution, got {type(q).__name__}")
    if not q.has_rsample:
        return _draw_fixed(q, count)
    if isinstance(q, FlowDistribution):
        return _draw_flow(q, count, noise)
    if noise is not None:
        raise ValueError(f"draw: {type(q).__name__} draws its own noise; noise= is for flows")
    return _draw_torch(q, count)


def _draw_torch(q: Distribution, count: int) -> Draw:
    value = q.rsample(torch.Size([count]))

    def path() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            log_q = q.log_prob(leaf)
        return torch.autograd.grad(log_q.sum(), leaf)[0], log_q.detach()

    return _with_views(value, lambda: q.log_prob(value), path, lambda: q.log_prob(value.detach()))


def _draw_flow(q: FlowDistribution, count: int, noise: Noise) -> Draw:
    given = noise(q.flow.base, count, q.batch_shape) if isinstance(noise, Sobol) else noise
    shape, context = q.request(count)
    with torch.enable_grad():
        r = q.flow.record_draws(shape, context, given)
        total = r.log_base + r.ladj

    def path() -> tuple[Tensor, Tensor]:
        return q.flow.transform.pull_score(r.record, r.at_held_noise()[1]), total.detach()

    return _with_views(r.x, lambda: total, path, lambda: q.log_prob(r.x.detach()))


def _draw_fixed(q: Distribution, count: int) -> Draw:
    value = q.sample(torch.Size([count]))

    def make(view: str) -> Tensor:
        if view == "score":
            return q.log_prob(value)
        raise ValueError(
            f"{type(q).__name__} has no rsample, so no gradient can travel through its draws; use the estimator Score()"
        )

    return Draw(value, make)


def _with_views(
    value: Tensor,
    total: Callable[[], Tensor],
    path: Callable[[], tuple[Tensor, Tensor]],
    score: Callable[[], Tensor],
) -> Draw:
    held: dict[str, Tensor] = {}

    def make(view: str) -> Tensor:
        if view in ("total", "score"):
            return total() if view == "total" else score()
        if not held:
            held["path"], held["value"] = path()
        return held[view]

    return Draw(value, make)


class _PathView(torch.autograd.Function):
    """log q whose gradient in the sample is the given score, a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, score: Tensor, log_q: Tensor) -> Tensor:
        ctx.save_for_backward(value, score)
        return log_q.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        value, score = ctx.saved_tensors
        out = grad.reshape(*grad.shape, *(1,) * (score.dim() - grad.dim())) * score
        return (_OnlyOnce.apply(out, value) if torch.is_grad_enabled() else out), None, None


class _OnlyOnce(torch.autograd.Function):
    """A gradient that must not be differentiated: the score inside it was held constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            "the path view of log q is differentiable once; for second derivatives use Pathwise(score_weight=1.0)"
        )
