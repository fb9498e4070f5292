"""locate: where a density is and how wide, found with few evaluations, without a mode if need be."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import normal
from torch import Tensor

import flowpath as fp
from flowpath.svi import locating
from flowpath.svi.locating import Gaussian, locate

LOC = torch.tensor([3.0, -2.0, 1e3], dtype=torch.float64)
MIX = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)


def starts(dim: int, count: int = 3) -> Tensor:
    return normal(count, dim, seed=2)


class Counting:
    """A log density that knows how many points it was asked at."""

    def __init__(self, log_density: locating.LogDensity) -> None:
        self.log_density, self.points, self.widest = log_density, 0, 0

    def __call__(self, u: Tensor) -> Tensor:
        self.points += len(u)
        self.widest = max(self.widest, len(u))
        return self.log_density(u)


def gaussian(u: Tensor) -> Tensor:
    """N(LOC, MIX MIX^T), with log Z of 5."""
    z = torch.linalg.solve_triangular(MIX, (u - LOC).T, upper=False)
    return 5.0 - 0.5 * z.square().sum(0) - 1.5 * math.log(2 * math.pi) - MIX.diagonal().log().sum()


def funnel(u: Tensor) -> Tensor:
    """Neal's funnel with a flat top: log p grows without bound as the first number falls."""
    log_scale = u[:, 0]
    rest = (u[:, 1:] * torch.exp(-log_scale).unsqueeze(-1)).square().sum(-1)
    return -0.5 * (log_scale / 3.0).square() - 0.5 * rest - (u.shape[1] - 1) * log_scale


def log_mean(q: Gaussian, log_density: locating.LogDensity) -> float:
    """The ELBO from many draws."""
    noise = normal(20_000, len(q.loc), seed=7)
    log_q = -0.5 * noise.square().sum(-1) - 0.5 * len(q.loc) * math.log(2 * math.pi) - q.log_scale()
    return float((log_density(q.draw(noise)) - log_q).mean())


def test_a_gaussian_is_found_exactly() -> None:
    q = locate(gaussian, starts(3))[0]
    assert torch.allclose(q.loc, LOC, atol=1e-6)
    assert torch.allclose(q.scale @ q.scale.T, MIX @ MIX.T, rtol=1e-8)
    assert q.elbo == pytest.approx(5.0, abs=1e-6)


def test_a_gaussian_takes_few_evaluations() -> None:
    count = Counting(gaussian)
    locate(count, starts(3, 1))
    assert count.points < 1000


@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_scales_may_differ_widely(ratio: float) -> None:
    scale = torch.tensor([ratio, 1.0, 5.0], dtype=torch.float64)
    loc = scale * torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64)

    def log_density(u: Tensor) -> Tensor:
        return -0.5 * ((u - loc) / scale).square().sum(-1)

    q = locate(log_density, starts(3))[0]
    assert torch.allclose((q.loc - loc) / scale, torch.zeros(3).double(), atol=1e-3)
    assert torch.allclose(q.scale.diagonal() / scale, torch.ones(3).double(), rtol=1e-2)


def test_a_funnel_without_a_mode_gets_a_gaussian_of_sense() -> None:
    """The normaliser of this funnel is known; a Gaussian at its neck or none at all would be tens of nats off."""
    dim = 6
    q = locate(funnel, starts(dim))[0]
    log_z = 0.5 * dim * math.log(2 * math.pi) + math.log(3.0)
    assert bool(torch.isfinite(q.loc).all() and torch.isfinite(q.scale).all())
    assert log_z - 6.0 < log_mean(q, funnel) < log_z


def test_starts_off_the_support_are_left_out() -> None:
    def log_density(u: Tensor) -> Tensor:
        inside = u[:, 0] > 0
        return torch.where(inside, -0.5 * (u.clamp_min(1e-3).log()).square().sum(-1), -torch.inf)

    rows = torch.tensor([[-1.0], [-5.0], [2.0]], dtype=torch.float64)
    q = locate(log_density, rows)[0]
    assert math.isfinite(q.elbo) and float(q.loc) > 0.0
    with pytest.raises(ValueError, match="not finite at any of 2 starting points; pass init="):
        locate(log_density, rows[:2])


def test_a_density_that_is_nan_in_places_does_not_crash() -> None:
    def log_density(u: Tensor) -> Tensor:
        return -(u[:, 0] - 1.0).square() + 0.0 * (u[:, 0] + 0.5).sqrt() - 0.5 * u[:, 1].square()

    q = locate(log_density, torch.tensor([[0.3, 0.2], [-3.0, 0.0]], dtype=torch.float64))[0]
    assert bool(torch.isfinite(q.loc).all()) and math.isfinite(q.elbo)


def test_a_singular_hessian_does_not_crash() -> None:
    def log_density(u: Tensor) -> Tensor:
        return -u.sum(-1).square()

    q = locate(log_density, starts(3))[0]
    assert bool(torch.isfinite(q.loc).all()) and bool(torch.isfinite(q.scale).all())


def test_a_linear_density_does_not_crash() -> None:
    q = locate(lambda u: u.sum(-1), starts(2))[0]
    assert bool(torch.isfinite(q.loc).all())


def test_many_latents_go_without_a_dense_hessian() -> None:
    dim = 400
    scale = torch.logspace(-1, 1, dim, dtype=torch.float64)
    count = Counting(lambda u: -0.5 * ((u - 1.0) / scale).square().sum(-1))
    q = locate(count, starts(dim, 2))[0]
    log_z = 0.5 * dim * math.log(2 * math.pi) + float(scale.log().sum())
    assert q.scale.shape == (dim,) and count.widest < dim
    assert log_z - 0.05 * dim < log_mean(q, count.log_density) <= log_z


def test_draws_and_log_scale_agree_for_both_shapes() -> None:
    loc, scale = torch.zeros(2).double(), torch.tensor([2.0, 0.5]).double()
    noise = normal(5, 2)
    dense, slim = Gaussian(loc, torch.diag(scale), 0.0), Gaussian(loc, scale, 0.0)
    assert torch.equal(dense.draw(noise), slim.draw(noise))
    assert torch.equal(dense.log_scale(), slim.log_scale())


def test_nothing_is_drawn_from_the_global_generator(keeps_rng: object) -> None:
    with keeps_rng():  # type: ignore[operator]
        locate(gaussian, starts(3))


def test_a_mode_left_out_is_named(pyro_store: None) -> None:
    """Two narrow modes far apart: the flow takes the heavier one, and the verdict says what it saw of the other."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
        pyro.factor("two", torch.logaddexp(-8.0 * (x - 2.0) ** 2, -8.0 * (x + 2.0) ** 2 + 1.0))

    posterior = fp.svi.fit_posterior(model, seed=0, max_steps=60, draws=1000)
    assert posterior.missed == pytest.approx(math.exp(-1.0), rel=0.1)
    assert "another mode with about 0.37 times" in posterior.verdict()
    assert fp.svi.fit_posterior(_unimodal, seed=0, max_steps=60, draws=1000).missed == 0.0


def _unimodal() -> None:
    pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 3.0))
