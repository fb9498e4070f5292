"""NUTS in the noise space of a fitted flow, where the posterior is nearly a standard normal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.autograd import Function

from flowpath.checks import check_count
from flowpath.scope import random
from flowpath.svi.summaries import Summary, summarise
from flowpath.tracing import TracingError, trace

if TYPE_CHECKING:
    from flowpath.svi.posterior import Posterior

_LEAST = 20  # transitions of warm-up; 100 where time allows, since the target is nearly N(0, I)


@dataclass
class Refined:
    """Draws of NUTS in a flow's noise space.

    Attributes:
        values: site -> `(chains, draws, *shape)`.
        noise: the chains' points z `(chains, draws, D)`.
        rhat: the largest split r-hat over the noise and log p; below 1.01 the chains agree.
        ess: the least effective sample size over the noise, in draws.
        divergences: how many transitions diverged.
        seconds: what it took.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = fp.svi.fit_posterior(model, torch.tensor(2.0), max_steps=20, seed=0)
        >>> refined = posterior.refine(time_limit=60.0, chains=2, draws=100, seed=0)
        >>> refined.rhat < 1.1, refined.values["mu"].shape
        (True, torch.Size([2, 100]))
    """

    values: dict[str, Tensor] = field(repr=False)
    noise: Tensor = field(repr=False)
    rhat: float
    ess: float
    divergences: int
    seconds: float

    def verdict(self) -> str:
        """One line in plain words."""
        count = self.noise.shape[0] * self.noise.shape[1]
        if not self.rhat < 1.05:
            return f"r-hat {self.rhat:.3f}: the chains do not agree; refine for longer"
        word = "agree" if self.rhat < 1.01 else "nearly agree"
        return f"{self.noise.shape[0]} chains {word}: r-hat {self.rhat:.3f}, {self.ess:.0f} effective of {count} draws"

    def sample(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """All draws, or every so many: site -> `(num_samples, *shape)`."""
        flat = {name: v.flatten(0, 1) for name, v in self.values.items()}
        count = self.noise.shape[0] * self.noise.shape[1]
        if num_samples is None:
            return flat
        if num_samples > count:
            raise ValueError(f"sample: there are {count} draws, {num_samples} were asked for; refine for longer")
        rows = torch.linspace(0, count - 1, num_samples).round().long()
        return {name: v[rows.to(v.device)] for name, v in flat.items()}

    def summary(self) -> Summary:
        """Mean, sd, quantiles and Monte Carlo error of each latent."""
        draws = self.sample()
        count = len(next(iter(draws.values())))
        return summarise(draws, torch.full((count,), 1.0 / count, dtype=torch.float64))


def refine(
    posterior: Posterior, time_limit: float, *, chains: int = 4, draws: int = 1000, seed: int | None = None
) -> Refined:
    r"""Run NUTS on z = T(u), where the target is log p(T^{-1}(z)) + log |det dT^{-1}/dz|.

    Chains start at corrected draws of the flow, so that they need hardly any warm-up; each has its share of the time,
    and all are cut to the length of the shortest.
    "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport" (Hoffman et al. 2019,
    arXiv:1903.03704).

    Args:
        posterior: of `fit_posterior`, with its model.
        time_limit: seconds in all, at most.
        chains: how many chains, at least 2.
        draws: of each chain, at most; at least 4.
        seed: of the chains; torch's generator is put back afterwards.

    Raises:
        ValueError: settings out of range; no model; a model that subsamples, whose density changes at each call.
    """
    check_count("refine", "chains", chains, least=2)
    check_count("refine", "draws", draws, least=4)
    if not time_limit > 0.0:
        raise ValueError(f"refine expects a time_limit above 0, got {time_limit}")
    density = posterior._model()
    if density.subsampled:
        raise ValueError("refine: the model subsamples its data, so its density changes at each call; pass all rows")
    began = time.monotonic()
    with random(seed, False, density.device):
        starts = _starts(posterior, chains)
        potential = _potential(posterior)
        cost = _cost(potential, starts[0])
        share = (began + time_limit - time.monotonic()) / chains
        warmup = int(min(100, max(_LEAST, 0.3 * share / cost)))
        found = [_chain(potential, z, warmup, draws, time.monotonic() + share) for z in starts]
    length = min(len(points) for points, _ in found)
    if length < 4:
        raise ValueError(f"refine: {time_limit:g} s gave {length} draws a chain after warm-up; allow it more time")
    noise = torch.stack([points[-length:] for points, _ in found])
    u = posterior.flow.to_data(noise.flatten(0, 1)).detach()
    watched = torch.cat([noise, density(u).detach().reshape(chains, length, 1)], -1)
    return Refined(
        values={n: v.unflatten(0, (chains, length)) for n, v in posterior.values(u).items()},
        noise=noise,
        rhat=float(split_gelman_rubin(watched, 0, 1).max()),
        ess=float(effective_sample_size(watched, 0, 1).min()),
        divergences=sum(count for _, count in found),
        seconds=time.monotonic() - began,
    )


def _starts(posterior: Posterior, chains: int) -> Tensor:
    rows = torch.multinomial(posterior.weights().to(torch.float64), chains)
    u = posterior.held.u[rows.to(posterior.held.u.device)]
    return posterior.flow.to_noise(u).detach()


def _potential(posterior: Posterior) -> Any:
    """-log of the target at z `(D,)`, with its gradient from one traced graph where the model allows."""
    flow, density = posterior.flow, posterior._model()

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            u, ladj = flow.transform.inverse(leaf.unsqueeze(0))
            value = -(density(u) + ladj).sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    example = posterior.flow.base.like.new_zeros(flow.event_shape)
    try:
        call: Any = trace(value_and_grad, [example], live=flow.state_dict(keep_vars=True).values())
    except TracingError:
        call = value_and_grad

    return potential_of(call)


def potential_of(value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[dict[str, Tensor]], Tensor]:
    """For NUTS over a site "z": the potential of a function that gives -log p and its gradient at z together."""

    def potential(params: dict[str, Tensor]) -> Tensor:
        return _Held.apply(params["z"], *value_and_grad(params["z"].detach()))

    return potential


class _Held(Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        del z
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _cost(potential: Any, z: Tensor) -> float:
    """Seconds of a transition, which takes about ten gradients."""
    z = z.clone().requires_grad_()
    began = time.monotonic()
    for _ in range(10):
        torch.autograd.grad(potential({"z": z}), z)
    return time.monotonic() - began


class _TimeUp(Exception):
    pass


def _chain(potential: Any, start: Tensor, warmup: int, draws: int, deadline: float) -> tuple[Tensor, int]:
    """Points `(n, D)` of one chain, `draws` of them or fewer by the deadline, and its number of divergences."""
    kernel = NUTS(potential_fn=potential, step_size=0.5, max_tree_depth=8)
    points: list[Tensor] = []

    def look(kernel: Any, params: dict[str, Tensor], stage: str, i: int) -> None:
        del kernel, i
        if stage.startswith("Sample"):
            points.append(params["z"].detach().clone())
        if time.monotonic() > deadline:
            raise _TimeUp

    mcmc = MCMC(
        kernel,
        num_samples=draws,
        warmup_steps=warmup,
        initial_params={"z": start},
        disable_progbar=True,
        hook_fn=look,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(_TimeUp):
            mcmc.run()
    found = torch.stack(points) if points else start.new_zeros(0, len(start))
    return found, len(getattr(kernel, "_divergences", ()))
