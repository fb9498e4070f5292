"""Flow as a density and a sampler: shapes, common random numbers, one-pass densities, traces, frozen flows."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from registry import HIDDEN, each_architecture, normal, rough_flow, roughen
from torch import Tensor, nn
from torch.distributions import Independent, Normal, biject_to, constraints

import flowpath as fp

COUNTS = {"()": (), "0": 0, "3": 3, "(3,)": (3,), "(2,3)": (2, 3), "(0,2)": (0, 2), "numpy": np.int64(3)}
BATCHES = {"()": (), "(3,)": (3,), "(2,3)": (2, 3), "(0,)": (0,)}


def lead(count: object) -> tuple[int, ...]:
    return tuple(count) if isinstance(count, tuple) else (int(count),)  # type: ignore[call-overload]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each_architecture
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_sample_shape(name: str, count: int | tuple[int, ...]) -> None:
    assert rough_flow(name).sample(count).shape == (*lead(count), 3)


@pytest.mark.parametrize("name", ["nsf", "iaf", "maf"])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_sample_shape_given_contexts(name: str, count: int | tuple[int, ...], batch: tuple[int, ...]) -> None:
    x, log_q = rough_flow(name, context=2).rsample_and_log_prob(count, normal(*batch, 2))
    assert x.shape == (*lead(count), *batch, 3) and log_q.shape == (*lead(count), *batch)


@each_architecture
@pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])
def test_one_pass_density_is_log_prob(name: str, context: int) -> None:
    flow, c = rough_flow(name, context=context), normal(3, context) if context else None
    x, log_q = flow.rsample_and_log_prob((4,), c, generator=generator())
    assert torch.allclose(log_q, flow.log_prob(x, c), atol=1e-9)


@each_architecture
def test_gradients_of_the_two_densities_agree(name: str) -> None:
    """d log q(x(eps)) / d parameters: by the one pass, and by scoring the differentiable draw."""
    flow = rough_flow(name)
    x, log_q = flow.rsample_and_log_prob(5, generator=generator())
    wanted = list(flow.parameters())
    one = torch.autograd.grad(log_q.sum(), wanted, retain_graph=True, materialize_grads=True)
    two = torch.autograd.grad(flow.log_prob(x).sum(), wanted, materialize_grads=True)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("name", ["nsf", "maf", "gaussian"])
def test_density_integrates_to_one(name: str) -> None:
    """A plain sum over a fine grid, in one and in two features."""
    line = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    one = rough_flow(name, 1).requires_grad_(False).log_prob(line.unsqueeze(-1)).exp().sum() * (line[1] - line[0])
    assert abs(float(one) - 1) < 2e-3
    side = torch.linspace(-15, 15, 401, dtype=torch.float64)
    two = (
        rough_flow(name, 2).requires_grad_(False).log_prob(torch.cartesian_prod(side, side)).exp().sum()
        * (side[1] - side[0]) ** 2
    )
    assert abs(float(two) - 1) < 5e-3


def test_generator_makes_common_random_numbers(keeps_rng: Callable) -> None:
    flow = rough_flow("nsf", context=2)
    with keeps_rng():
        a, b = (flow.sample(4, normal(3, 2), generator=generator(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, flow.sample(4, normal(3, 2), generator=generator(2)))


def test_given_noise_is_used(keeps_rng: Callable) -> None:
    flow, c = rough_flow("nsf", context=2), normal(3, 2)
    noise = flow.base.draw_noise((4, 3), generator(1))
    with keeps_rng():
        x = flow.rsample(4, c, noise=noise)
    assert torch.equal(x, flow.rsample(4, c, generator=generator(1)))
    assert torch.equal(x, flow.to_data(noise, c))


def test_sample_has_no_graph_and_rsample_has() -> None:
    flow = rough_flow("nsf")
    assert not flow.sample(2).requires_grad
    assert flow.rsample(2).requires_grad


@each_architecture
def test_to_noise_and_to_data_are_inverse(name: str) -> None:
    flow, x, c = rough_flow(name, context=2), normal(4, 3), normal(4, 2, seed=1)
    assert torch.allclose(flow.to_data(flow.to_noise(x, c), c), x, atol=1e-8)


@each_architecture
def test_trace_follows_log_prob(name: str) -> None:
    flow, x, c = rough_flow(name, context=2), normal(4, 3), normal(4, 2, seed=1)
    layers = flow.trace(x, c)
    assert torch.allclose(layers[-1].value, flow.to_noise(x, c))
    total = flow.base.log_prob(layers[-1].value) + sum(layer.ladj for layer in layers)
    assert torch.allclose(total, flow.log_prob(x, c))
    assert all(layer.name.startswith("transform") for layer in layers)
    assert len({layer.name for layer in layers}) == len(layers)


def test_trace_opens_nested_chains() -> None:
    t = fp.Chain([fp.Chain([fp.LU(2), fp.ActNorm(2)]), fp.Permutation.reverse(2)])
    names = [layer.name for layer in fp.Flow(t, fp.StandardNormal(2)).eval().trace(torch.randn(3, 2))]
    assert names == [
        "transform.transforms.0.transforms.0 LU",
        "transform.transforms.0.transforms.1 ActNorm",
        "transform.transforms.1 Permutation",
    ]


@each_architecture
def test_frozen_flow_stays_frozen(name: str) -> None:
    flow = rough_flow(name).requires_grad_(False)
    x, log_q = flow.rsample_and_log_prob(3)
    assert not x.requires_grad and not log_q.requires_grad
    z = normal(3, 3).requires_grad_()
    (flow.to_data(z).sum() + flow.log_prob(z).sum()).backward()
    assert z.grad is not None
    assert not any(p.requires_grad or p.grad is not None for p in flow.parameters())


@each_architecture
def test_float64_in_float64_out(name: str) -> None:
    """`.double()` before and after use; draws too."""
    flow = rough_flow(name).float()
    assert flow.sample(2).dtype == flow.log_prob(flow.sample(2)).dtype == torch.float32
    x, log_q = flow.double().rsample_and_log_prob(2)
    assert x.dtype == log_q.dtype == torch.float64


def test_default_float64_builds_a_float64_flow() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        flow = fp.nsf_autoregressive(3, 2, hidden_features=HIDDEN, transforms=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert flow.sample(2, normal(2)).dtype == torch.float64


@each_architecture
def test_context_matters_and_reaches_its_gradient(name: str) -> None:
    flow, c = rough_flow(name, context=2), normal(4, 2).requires_grad_()
    log_q = flow.log_prob(normal(3), c)
    assert log_q.shape == (4,) and len(set(log_q.tolist())) == 4
    log_q.sum().backward()
    flow.rsample(2, c, generator=generator()).sum().backward()
    assert c.grad is not None and bool((c.grad != 0).all())


def test_embedding_is_applied_once_and_trained() -> None:
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh())
    inner = rough_flow("nsf", context=2, whiten="none")
    flow = fp.Flow(inner.transform, inner.base, net).double()
    c, x = normal(4, 5), normal(4, 3)
    assert flow.context == 5
    assert torch.allclose(flow.log_prob(x, c), inner.log_prob(x, net(c)))
    assert torch.allclose(flow.rsample(2, c, generator=generator()), inner.rsample(2, net(c), generator=generator()))
    flow.log_prob(x, c).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class Spread(nn.Module):
    """A base for whom only the module knows how: a normal of a width that depends on the context."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, c: Tensor) -> Independent:
        return Independent(Normal(self.net(c), 1.0), 1)


@pytest.mark.parametrize(
    "base",
    [
        lambda: fp.DiagonalNormal(3),
        lambda: fp.DiagonalNormal(3, context=2, hidden_features=HIDDEN),
        lambda: fp.StudentT(3),
        lambda: fp.NormalMixture(3, 4),
        lambda: Independent(Normal(torch.zeros(3), torch.ones(3)), 1),
        lambda: fp.ConditionalBase(Spread(), 3, context=2),
    ],
    ids=["diagonal", "diagonal-context", "student", "mixture", "torch", "module"],
)
def test_any_base_under_a_conditional_transform(base: Callable) -> None:
    transform = rough_flow("nsf", context=2).transform
    flow = roughen(fp.Flow(transform, base()).double())
    x, log_q = flow.rsample_and_log_prob((4,), normal(5, 2))
    assert x.shape == (4, 5, 3) and torch.allclose(log_q, flow.log_prob(x, normal(5, 2)), atol=1e-9)
    assert flow.has_rsample is flow.base.has_rsample


SUPPORTS = {
    "positive": (constraints.positive, [1.0, 2.0, 0.5], [1.0, -1.0, 1.0]),
    "interval": (constraints.interval(-1.0, 2.0), [0.0, 1.0, 1.9], [0.0, 2.5, 1.0]),
    "greater-than": (constraints.greater_than(3.0), [4.0, 3.1, 9.0], [4.0, 2.0, 9.0]),
    "less-than": (constraints.less_than(0.0), [-4.0, -0.1, -9.0], [-4.0, 2.0, -9.0]),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_flow_on_a_bounded_support(name: str) -> None:
    """Draws lie inside, density outside is 0 and never NaN, and `support` says so."""
    constraint, inside, outside = SUPPORTS[name]
    chain = fp.Chain([fp.from_torch(biject_to(constraint)), fp.TriangularAffine(3)])
    flow = roughen(fp.Flow(chain, fp.StandardNormal(3)).double(), 0.2)
    x, log_q = flow.rsample_and_log_prob(50)
    assert bool(flow.support.check(x).all()) and torch.allclose(log_q, flow.log_prob(x), atol=1e-8)
    points = torch.tensor([inside, outside], dtype=torch.float64, requires_grad=True)
    log_q = flow.log_prob(points)
    assert log_q[0].isfinite() and log_q[1].item() == -math.inf
    assert flow.support.check(points).tolist() == [True, False]
    log_q[0].backward()
    assert points.grad is not None and bool(points.grad.isfinite().all())


def test_flow_on_a_simplex() -> None:
    """Three numbers that sum to one come from two of noise."""
    transform = fp.from_torch(biject_to(constraints.simplex))
    for t in (transform, fp.Chain([transform, fp.TriangularAffine(2)])):
        flow = fp.Flow(t, fp.StandardNormal(2)).double()
        assert flow.event_shape == (3,)
        x, log_q = flow.rsample_and_log_prob(20)
        assert x.shape == (20, 3) and torch.allclose(x.sum(-1), torch.ones(20, dtype=torch.float64))
        assert torch.allclose(flow.log_prob(x), log_q, atol=1e-8)
        assert flow().event_shape == (3,) and bool(flow().support.check(x).all())


def test_support_follows_the_dtype_and_stays_with_copies() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.0])
    on = constraints.independent(constraints.interval(low, high), 1)
    flow = copy.deepcopy(fp.Flow(fp.Chain([fp.from_torch(biject_to(on)), fp.LU(2)]), fp.StandardNormal(2))).double()
    x = flow.sample(20)
    assert x.dtype == torch.float64 and bool(flow.support.check(x).all())
    assert flow.log_prob(torch.tensor([0.0, -0.1], dtype=torch.float64)).item() == -math.inf


def test_warns_once_of_a_slow_direction() -> None:
    flow = fp.maf(20, transforms=1, hidden_features=HIDDEN)
    with pytest.warns(UserWarning, match="10000 draws of 20 features cost about .* times their log_prob"):
        flow.sample(10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.sample(10_000)
        fp.iaf(20, transforms=1, hidden_features=HIDDEN).sample(10_000)


def test_state_dict_and_copies_give_the_same_density() -> None:
    flow, other, x = rough_flow("nsf", context=2), rough_flow("nsf", context=2), normal(4, 3)
    roughen(other, seed=9)
    c = normal(4, 2)
    assert not torch.equal(flow.log_prob(x, c), other.log_prob(x, c))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(flow.log_prob(x, c), other.log_prob(x, c))
    assert torch.equal(flow.log_prob(x, c), copy.deepcopy(flow).log_prob(x, c))


def test_flow_fits_by_its_gradient() -> None:
    """A few steps of Adam on the density find a shifted normal."""
    flow = rough_flow("gaussian", 2)
    x = normal(200, 2) * 0.5 + 2.0
    optimizer = torch.optim.Adam(flow.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    best = float(Normal(x.mean(0), x.std(0)).entropy().sum())
    assert loss.item() < best + 0.05
