"""`Flow(context)` as a Pyro distribution: shapes, plates, wrappers, score_parts, and training under SVI."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from registry import HIDDEN, each_architecture, normal, rough_flow, roughen, small_flow
from torch import Tensor, nn
from torch.distributions import constraints

import flowpath as fp

# --- shapes ------------------------------------------------------------------------------------------------------

BATCHES = {"()": (), "(3,)": (3,), "(2,3)": (2, 3)}
each_batch = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


@each_architecture
@each_batch
def test_shapes_follow_the_context(name: str, batch: tuple[int, ...]) -> None:
    d = rough_flow(name, context=2)(normal(*batch, 2))
    assert d.batch_shape == batch and d.event_shape == (3,) and d.has_rsample
    x = d.rsample((4,))
    assert x.shape == (4, *batch, 3) and d.log_prob(x).shape == (4, *batch)
    assert d().shape == (*batch, 3) and not d.sample().requires_grad


def test_log_prob_broadcasts_value_and_batch() -> None:
    flow, c = rough_flow("nsf", context=2), normal(3, 2)
    d = flow(c)
    for value in (normal(3), normal(1, 3), normal(4, 1, 3), normal(4, 3, 3)):
        assert torch.allclose(d.log_prob(value), flow.log_prob(value, c))


def test_expand_draws_independently() -> None:
    d = rough_flow("nsf", context=2)(normal(3, 2)).expand((4, 3))
    x = d.rsample()
    assert x.shape == (4, 3, 3) and len({tuple(row) for row in x.flatten(0, 1).tolist()}) == 12
    assert d.log_prob(x).shape == (4, 3) and d.batch_shape == (4, 3)
    assert d.expand((2, 4, 3)).rsample((5,)).shape == (5, 2, 4, 3, 3)


@pytest.mark.parametrize("old", [(), (1,), (3,), (1, 3), (4, 1)], ids=str)
def test_expand_of_a_singleton_batch(old: tuple[int, ...]) -> None:
    flow, c = rough_flow("nsf", context=2), normal(*old, 2)
    d = flow(c).expand((4, 3))
    x, log_q = d.rsample_and_log_prob((5,))
    assert x.shape == (5, 4, 3, 3) and log_q.shape == (5, 4, 3)
    assert torch.allclose(d.log_prob(x), log_q, atol=1e-9)
    assert torch.allclose(flow.log_prob(x, c), log_q, atol=1e-9)
    assert len({tuple(row) for row in x.flatten(0, 2).tolist()}) == 60


def test_expand_without_context() -> None:
    d = rough_flow("maf")().expand((4,))
    x = d.rsample((2,))
    assert x.shape == (2, 4, 3) and d.log_prob(x).shape == (2, 4)
    assert len({tuple(row) for row in x.flatten(0, 1).tolist()}) == 8


def test_mask_hides_log_prob() -> None:
    d = rough_flow("nsf", context=2)(normal(3, 2))
    mask = torch.tensor([True, False, True])
    x = d.sample()
    assert torch.allclose(d.mask(mask).log_prob(x), d.log_prob(x) * mask)
    assert bool((d.mask(False).log_prob(x) == 0).all())


def test_to_event_sums_the_batch() -> None:
    d = rough_flow("nsf", context=2)(normal(2, 3, 2))
    x = d.rsample()
    assert d.to_event(1).event_shape == (3, 3) and d.to_event(1).batch_shape == (2,)
    assert torch.allclose(d.to_event(1).log_prob(x), d.log_prob(x).sum(-1))
    assert d.to_event(2).rsample((4,)).shape == (4, 2, 3, 3)


def test_support() -> None:
    assert rough_flow("nsf")().support.event_dim == 1
    positive = fp.from_torch(torch.distributions.biject_to(constraints.positive))
    d = fp.Flow(fp.Chain([positive, fp.LU(2)]), fp.StandardNormal(2))()
    assert d.support.check(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).tolist() == [True, False]


def test_mean_and_stddev_by_sampling(keeps_rng: Callable) -> None:
    flow = fp.Flow(fp.TriangularAffine(2), fp.StandardNormal(2))
    with torch.no_grad():
        flow.transform.numbers.copy_(torch.tensor([1.0, -2.0, 1.0, 0.0, 0.5]))
    lower = flow.transform._parts(None)[1].detach()
    with keeps_rng():
        assert torch.allclose(flow().mean, torch.tensor([1.0, -2.0]), atol=0.1)
        assert torch.allclose(flow().stddev, lower.square().sum(-1).sqrt(), rtol=0.05)
        assert torch.allclose(flow().variance, flow().stddev ** 2)


@pytest.mark.parametrize("base", ["student", "mixture", "torch"])
def test_mean_over_any_base(base: str) -> None:
    made = {
        "student": lambda: fp.StudentT(2, df=6.0),
        "mixture": lambda: fp.NormalMixture(2, 3),
        "torch": lambda: dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1),
    }[base]()
    d = fp.Flow(fp.LU(2), made)()
    assert d.mean.shape == (2,) and bool((d.stddev > 0).all())


def test_validation_switch() -> None:
    """With validate_args=False a value outside the support is scored (-inf), as Pyro's distributions do."""
    d = fp.Flow(fp.from_torch(dist.transforms.ExpTransform()), fp.StandardNormal(2))
    assert float(d().log_prob(torch.tensor([-1.0, 1.0]))) == float("-inf")


# --- a live view -------------------------------------------------------------------------------------------------


def test_view_serves_two_steps() -> None:
    """Embedding and base run at each use: no graph is shared, no value goes stale."""
    flow = rough_flow("nsf", context=2)
    d, x = flow(normal(3, 2)), normal(3, 3)
    optimizer = torch.optim.SGD(flow.parameters(), 0.01)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = -d.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[1] < seen[0]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_no_stale_density_after_an_optimizer_step(fused: bool) -> None:
    flow = rough_flow("nsf")
    d = flow()
    x = d.rsample((4,)).detach()
    before = d.log_prob(x)
    optimizer = torch.optim.Adam(flow.parameters(), 0.1, fused=fused)
    before.sum().backward()
    optimizer.step()
    assert not torch.allclose(d.log_prob(x), before)
    assert torch.equal(d.log_prob(x), flow.log_prob(x))


def test_log_prob_is_differentiable_in_its_value() -> None:
    d = rough_flow("maf", context=2)(normal(3, 2))
    z = normal(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(d.log_prob, z)
    drawn = d.rsample()
    (score,) = torch.autograd.grad(d.log_prob(drawn).sum(), drawn)
    assert bool((score != 0).any())


# --- score_parts -------------------------------------------------------------------------------------------------


def counted(flow: fp.Flow) -> list[int]:
    """Grows by one each time the flow scores values."""
    calls: list[int] = []
    score = flow.log_prob

    def log_prob(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return score(*args, **kwargs)

    flow.log_prob = log_prob  # type: ignore[method-assign]
    return calls


@each_architecture
def test_score_parts_of_a_fresh_draw_are_reused_once(name: str) -> None:
    flow = rough_flow(name)
    calls = counted(flow)
    d = flow()
    x = d.rsample((4,))
    first = d.score_parts(x)
    assert calls == []
    second = d.score_parts(x)
    assert calls == [1]
    assert torch.allclose(first.log_prob, second.log_prob, atol=1e-9)
    assert first.score_function == 0 and torch.equal(first.entropy_term, first.log_prob)
    assert torch.allclose(d.log_prob(x), first.log_prob, atol=1e-9)


@pytest.mark.parametrize("change", ["in place", "through a view", "a copy", "another draw", "grad mode", "new view"])
def test_score_parts_of_anything_else_are_computed(change: str) -> None:
    flow = rough_flow("nsf")
    calls = counted(flow)
    d = flow()
    with torch.set_grad_enabled(change != "grad mode"):
        x = d.rsample((4,))
    with torch.no_grad():
        if change == "in place":
            x.add_(1.0)
        elif change == "through a view":
            x[0].mul_(2.0)
    if change == "a copy":
        x = x.clone()
    elif change == "another draw":
        d.rsample((4,))
    elif change == "new view":
        d = flow()
    parts = d.score_parts(x)
    assert calls == [1]
    assert torch.allclose(parts.log_prob, flow.log_prob(x), atol=1e-9)


def test_score_parts_do_not_outlive_their_use() -> None:
    d = rough_flow("nsf")()
    x = d.rsample()
    assert d._drawn is not None
    d.score_parts(x)
    assert d._drawn is None


def test_score_parts_of_a_masked_draw() -> None:
    flow, mask = rough_flow("nsf", context=2), torch.tensor([True, False, True])
    d = flow(normal(3, 2)).mask(mask)
    x = d.rsample()
    assert torch.allclose(d.score_parts(x).log_prob, d.log_prob(x), atol=1e-9)


def test_flow_without_rsample_asks_for_the_score_function() -> None:
    flow = roughen(fp.Flow(fp.LU(2), fp.NormalMixture(2, 3)))
    d = flow()
    assert not d.has_rsample
    x = d()
    parts = d.score_parts(x)
    assert not x.requires_grad and parts.entropy_term == 0 and torch.equal(parts.score_function, parts.log_prob)


def test_gradient_through_score_parts_is_that_of_log_prob() -> None:
    flow = rough_flow("maf")
    grads = []
    for reuse in (True, False):
        d = flow()
        with torch.random.fork_rng(devices=[]):
            x = d.rsample((4,))
        log_q = d.score_parts(x).log_prob if reuse else d.log_prob(x)
        grads.append(torch.autograd.grad(log_q.sum(), list(flow.parameters()), materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


# --- in models and guides ----------------------------------------------------------------------------------------


def test_sample_site_in_plates() -> None:
    flow, c = rough_flow("nsf", context=2), normal(4, 2)

    def model() -> Tensor:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", flow(c))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (3, 4, 3) and site["log_prob"].shape == (3, 4)
    assert len({tuple(row) for row in site["value"].flatten(0, 1).tolist()}) == 12


def test_observed_in_a_subsampling_plate() -> None:
    flow, data = rough_flow("nsf"), normal(10, 3)

    def model() -> None:
        with pyro.plate("data", 10, subsample_size=5) as rows:
            pyro.sample("x", flow(), obs=data[rows])

    trace = poutine.trace(model).get_trace()
    rows = trace.nodes["data"]["value"]
    assert torch.allclose(trace.log_prob_sum(), 2.0 * flow.log_prob(data[rows]).sum())


def test_guide_pays_one_pass_a_draw() -> None:
    """A traced and scored draw of an IAF costs one call of each conditioner."""
    flow = rough_flow("iaf")
    calls: list[int] = []
    for m in flow.modules():
        if isinstance(m, fp.MaskedMLP):
            m.register_forward_hook(lambda *_: calls.append(1))

    def guide() -> None:
        with pyro.plate("particles", 5):
            pyro.sample("x", flow())

    poutine.trace(guide).get_trace().compute_score_parts()
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["nsf", "iaf", "gaussian"])
@pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])
def test_svi_moves_the_parameters(name: str, context: int, pyro_store: None) -> None:
    """A flow held by a PyroModule is trained by pyro.optim, and comes nearer its target."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = small_flow(name, 3, context, whiten="none")

        def forward(self) -> None:
            pyro.sample("x", self.flow(torch.ones(context)) if context else self.flow())

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor([1.0, -1.0, 2.0]), 0.5).to_event(1))

    guide = Guide()
    start = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    losses = [svi.step() for _ in range(60)]
    assert all(not torch.equal(p, s) for p, s in zip(guide.flow.parameters(), start, strict=True) if p.numel() > 16)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
def test_svi_leaves_frozen_parameters_alone(pyro_store: None) -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = small_flow("nsf", 2)
            self.flow.transform.transforms[1].requires_grad_(False)

        def forward(self) -> None:
            pyro.sample("x", self.flow())

    guide = Guide()
    frozen = [p.detach().clone() for p in guide.flow.transform.transforms[1].parameters()]
    svi = SVI(
        lambda: pyro.sample("x", dist.Normal(torch.ones(2), 1.0).to_event(1)),
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(),
    )
    svi.step()
    for p, start in zip(guide.flow.transform.transforms[1].parameters(), frozen, strict=True):
        assert torch.equal(p, start) and not p.requires_grad


def test_flow_as_a_prior() -> None:
    """A fitted flow in the model: NUTS and autoguides need its support and a differentiable density."""
    flow = rough_flow("nsf", 2).float().requires_grad_(False)

    def model() -> None:
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.zeros(2))

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model, max_tree_depth=2), 3, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].shape == (3, 2)


def test_embedding_network_is_trained_through_the_view(pyro_store: None) -> None:
    flow = fp.Flow(fp.TriangularAffine(2, context=3, hidden_features=HIDDEN), fp.StandardNormal(2), nn.Linear(5, 3))
    roughen(flow)
    flow(torch.randn(4, 5)).rsample((2,)).sum().backward()
    assert flow.embedding is not None and flow.embedding.weight.grad is not None
