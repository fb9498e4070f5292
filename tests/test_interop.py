"""torch's and Pyro's transforms in flowpath, and flowpath's in torch and Pyro."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pt
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution, biject_to, constraints
from torch.distributions import transforms as tt

import flowpath as fp
from tests.registry import Case, each_case, normal, rough_flow, roughen

D = 3


def base(*batch: int, features: int = D, dtype: torch.dtype = torch.float64) -> Independent:
    zeros = torch.zeros(*batch, features, dtype=dtype)
    return Independent(Normal(zeros, torch.ones_like(zeros)), 1)


# Into torch.


@each_case
def test_torch_transform_is_the_inverse(case: Case) -> None:
    t, x, c = case.ready(), case.x(), case.c()
    ours = fp.to_torch(t, c)
    with torch.no_grad():
        z, ladj = t(x, c)
        back, down = t.inverse(z, c)
        assert torch.equal(ours(z), back) and torch.equal(ours.inv(x), z)
        assert torch.allclose(ours.log_abs_det_jacobian(z, back), down, atol=1e-7)
        assert torch.allclose(ours.inv.log_abs_det_jacobian(x, z), ladj, atol=1e-7)
    assert ours.forward_shape(z.shape) == x.shape and ours.inverse_shape(x.shape) == z.shape
    assert ours.domain.check(z).all() and ours.codomain.check(x).all()
    assert (ours.domain.event_dim, ours.codomain.event_dim) == (1, 1)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["nsf", "maf", "iaf", "gaussian"])
def test_transformed_distribution_is_the_flow(name: str, context: int) -> None:
    flow = rough_flow(name, D, context)
    c = normal(4, context) if context else None
    d = TransformedDistribution(base(), [fp.to_torch(flow.transform, c)])
    assert d.batch_shape == (() if c is None else (4,)) and d.event_shape == (D,)
    x = d.rsample((2,))
    assert x.shape == (2, *d.batch_shape, D) and x.requires_grad
    assert torch.allclose(d.log_prob(x), flow.log_prob(x, c), atol=1e-8)
    if c is not None:
        assert not torch.allclose(d.base_dist.sample()[0], d.base_dist.sample()[1])  # noise of its own for each context


def test_log_prob_has_the_flow_s_gradients() -> None:
    flow = rough_flow("maf", D)
    d, x = TransformedDistribution(base(), [fp.to_torch(flow.transform)]), normal(5, D).requires_grad_()
    leaves = [x, *flow.transform.parameters()]
    a = torch.autograd.grad(d.log_prob(x).sum(), leaves)
    b = torch.autograd.grad(flow.log_prob(x).sum(), leaves)
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(a, b, strict=True))


def test_log_det_takes_the_cheaper_direction() -> None:
    calls = []
    flow = rough_flow("maf", D)
    t = flow.transform
    t._inverse = lambda *args: calls.append("inverse")  # type: ignore[method-assign, assignment]
    fp.to_torch(t).log_abs_det_jacobian(normal(4, D), normal(4, D))
    assert not calls


def test_nothing_is_stale_after_an_update() -> None:
    t = roughen(fp.LU(D).double())
    d = TransformedDistribution(base(), [fp.to_torch(t).with_cache(1)])
    x = d.rsample((5,))
    before = d.log_prob(x)
    for p in t.parameters():
        p.data.add_(0.1)  # such a write bumps no version
    want = TransformedDistribution(base(), [fp.to_torch(t)]).log_prob(x.detach().clone())
    assert torch.allclose(d.log_prob(x), want) and not torch.allclose(before, want)


def test_composes_with_torch_s_own() -> None:
    flow = rough_flow("nsf", D)
    t = tt.ComposeTransform([fp.to_torch(flow.transform), tt.ExpTransform()])
    d = TransformedDistribution(base(), [t])
    x = d.sample((5,))
    assert torch.allclose(d.log_prob(x), flow.log_prob(x.log()) - x.log().sum(-1), atol=1e-8)
    t = fp.to_torch(flow.transform)
    assert t.inv.inv is t and len({t, t.inv.inv}) == 1


def test_there_and_back() -> None:
    t = fp.LU(D)
    assert fp.from_torch(fp.to_torch(t)) is t


def test_copies_and_pickles() -> None:
    t = fp.to_torch(roughen(fp.LU(D).double()))
    z = normal(4, D)
    t(z)
    for again in (copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert torch.equal(again(z), t(z)) and again.transform is not t.transform


@pytest.mark.usefixtures("pyro_store")
def test_trains_in_pyro() -> None:
    t = fp.LU(2)

    def guide() -> None:
        module = pyro.module("t", t)
        pyro.sample("x", dist.TransformedDistribution(base(features=2, dtype=torch.float32), [fp.to_torch(module)]))

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.tensor([3.0, -3.0]), 1.0).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=8))
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


class Guide(AutoContinuous):
    """The least a guide must be for NeuTra: a transform of a base."""

    def __init__(self, model: Callable, t: fp.Transform) -> None:
        super().__init__(model)
        self.t = t

    def get_base_dist(self) -> dist.Distribution:
        return dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)

    def get_transform(self, *args: object, **kwargs: object) -> tt.Transform:
        return fp.to_torch(self.t)

    def get_posterior(self, *args: object, **kwargs: object) -> dist.Distribution:
        return dist.TransformedDistribution(self.get_base_dist(), [self.get_transform()])


@pytest.mark.usefixtures("pyro_store")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_neutra() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 0.1))

    guide = Guide(model, roughen(fp.TriangularAffine(2)))
    guide()
    neutra = NeuTraReparam(guide)
    warped = pyro.poutine.reparam(model, config=lambda _: neutra)
    trace = pyro.poutine.trace(warped).get_trace()
    trace.compute_log_prob()
    z = trace.nodes["x_shared_latent"]["value"]
    values = neutra.transform_sample(z)
    x = torch.stack([values["x"], values["y"]])
    want = dist.Normal(0.0, 1.0).log_prob(x[0]) + dist.Normal(x[0], 0.1).log_prob(x[1]) + guide.t.inverse(z)[1]
    assert torch.allclose(trace.log_prob_sum(), want, atol=1e-4)
    mcmc = MCMC(NUTS(warped), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x_shared_latent"].shape == (3, 2)


# From Pyro: learned transforms.

LEARNED: dict[str, Callable[[], tt.Transform]] = {
    "affine-autoregressive": lambda: pt.affine_autoregressive(D, hidden_dims=[8]),
    "affine-autoregressive-stable": lambda: pt.affine_autoregressive(D, hidden_dims=[8], stable=True),
    "affine-coupling": lambda: pt.affine_coupling(D, hidden_dims=[8]),
    "spline": lambda: pt.spline(D, count_bins=4),
    "spline-quadratic": lambda: pt.spline(D, count_bins=4, order="quadratic"),
    "spline-coupling": lambda: pt.spline_coupling(D, hidden_dims=[8], count_bins=4),
    "spline-autoregressive": lambda: pt.spline_autoregressive(D, hidden_dims=[8], count_bins=4),
    "householder": lambda: pt.householder(D, 2),
    "matrix-exponential": lambda: pt.matrix_exponential(D),
    "batchnorm": lambda: pt.batchnorm(D),
    "permute": lambda: pt.permute(D, torch.tensor([2, 0, 1])),
    "elu": lambda: pt.ELUTransform(),
    "composed": lambda: tt.ComposeTransform([pt.spline(D, count_bins=4), pt.affine_coupling(D, hidden_dims=[8])]),
    "composed-module": lambda: dist.torch_transform.ComposeTransformModule([pt.householder(D, 2), pt.spline(D)]),
    "inverse": lambda: pt.affine_coupling(D, hidden_dims=[8]).inv,
    "columns": lambda: tt.CatTransform([pt.spline(1), tt.ExpTransform()], dim=-1, lengths=[1, 2]),
}


def learned(name: str) -> tt.Transform:
    """In eval mode, with rough parameters, after a call that filled its caches."""
    t = LEARNED[name]()
    if isinstance(t, nn.Module):
        roughen(t, 0.2).eval()
    t(torch.rand(4, D) + 0.5)
    return t


@pytest.mark.parametrize("name", LEARNED)
def test_learned_transform_keeps_its_map_and_log_det(name: str) -> None:
    theirs = learned(name)
    t = fp.from_torch(theirs).eval()
    z = torch.rand(2, 4, D) + 0.5
    x, down = t.inverse(z)
    assert torch.allclose(x, theirs(z), atol=1e-6)
    again, up = t(x)
    assert torch.allclose(again, z, atol=2e-3) and torch.allclose(up, -down, atol=2e-3)
    slogdet = torch.linalg.slogdet(torch.autograd.functional.jacobian(lambda v: t.inverse(v)[0], z[0, 0]))[1]
    assert torch.allclose(down[0, 0], slogdet, atol=1e-4)
    assert down.shape == (2, 4) and t(x[:, :0])[1].shape == (2, 0)


@pytest.mark.parametrize("name", ["affine-autoregressive-stable", "spline-coupling", "composed", "inverse", "columns"])
def test_learned_transform_trains_and_is_a_copy(name: str) -> None:
    theirs = learned(name)
    flow = fp.Flow(fp.from_torch(theirs), fp.StandardNormal(D))
    held = [p for part in _modules(theirs) for p in part.parameters()]
    assert len(list(flow.parameters())) == len(held) > 0
    assert not {p.data_ptr() for p in held} & {p.data_ptr() for p in flow.parameters()}
    x = torch.rand(5, D) + 0.5
    before = flow.log_prob(x)
    (-before.sum()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    with torch.no_grad():
        for p in flow.parameters():
            p -= 1e-2 * p.grad
    assert not torch.equal(flow.log_prob(x), before)
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))
    fresh = fp.Flow(fp.from_torch(LEARNED[name]()), fp.StandardNormal(D))
    assert fresh.state_dict().keys() == flow.state_dict().keys()


def _modules(t: tt.Transform) -> list[nn.Module]:
    from flowpath.interop.torch_transforms import _all

    return [part for part in _all(t) if isinstance(part, nn.Module)]


@pytest.mark.parametrize("name", ["spline", "affine-coupling", "householder", "matrix-exponential", "composed"])
def test_learned_transform_follows_the_dtype(name: str) -> None:
    t = fp.from_torch(learned(name)).double().eval()
    x, down = t.inverse(normal(4, D))
    assert x.dtype == down.dtype == torch.float64
    assert torch.allclose(t(x)[0], normal(4, D), atol=1e-6)


def test_learned_transform_under_a_support() -> None:
    t = fp.Chain([fp.from_torch(biject_to(constraints.positive)), fp.from_torch(learned("affine-coupling"))])
    flow = fp.Flow(t, fp.StandardNormal(D))
    assert (flow.sample(20) > 0).all() and flow.log_prob(-torch.ones(D)) == -torch.inf


# What is refused, and in which words.


class OneWay(tt.Transform):
    domain = codomain = constraints.real
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x


def conditioned() -> tt.Transform:
    return pt.conditional_spline(D, 2, hidden_dims=[8]).condition(torch.zeros(2))


NO_INVERSE = "it has no inverse, so it cannot both sample and score new points"
REFUSED: dict[str, tuple[Callable[[], object], type, str]] = {
    **{
        name: (lambda t=t: fp.from_torch(t()), ValueError, f"from_torch cannot take {name}: {NO_INVERSE}")
        for name, t in {
            "BlockAutoregressive": lambda: pt.block_autoregressive(D),
            "NeuralAutoregressive": lambda: pt.neural_autoregressive(D, hidden_dims=[8]),
            "Planar": lambda: pt.planar(D),
            "Radial": lambda: pt.radial(D).inv,
            "Polynomial": lambda: tt.ComposeTransform([tt.ExpTransform(), pt.polynomial(D, hidden_dims=[8])]),
            "Sylvester": lambda: pt.sylvester(D),
            "OneWay": OneWay,
            "ConditionedPlanar": lambda: pt.conditional_planar(D, 2, hidden_dims=[8]).condition(torch.zeros(2)),
        }.items()
    },
    "conditional": (
        lambda: fp.from_torch(pt.conditional_spline(D, 2, hidden_dims=[8])),
        TypeError,
        "from_torch expects a transform, got ConditionalSpline, which makes one for each context; build it in flowpath",
    ),
    "conditioned": (
        lambda: fp.from_torch(conditioned()),
        ValueError,
        "from_torch cannot take ConditionedSpline: its parameters come from a module beside it",
    ),
    "conditioned-module": (
        lambda: fp.from_torch(pt.conditional_affine_autoregressive(D, 2, hidden_dims=[8]).condition(torch.zeros(2))),
        ValueError,
        "from_torch cannot take AffineAutoregressive: its parameters come from a module beside it",
    ),
    "to-torch-flow": (
        lambda: fp.to_torch(rough_flow("maf")),
        TypeError,
        "to_torch expects a flowpath Transform, got Flow; pass flow.transform, or use flow(context)",
    ),
    "to-torch-torch": (
        lambda: fp.to_torch(tt.ExpTransform()),
        TypeError,
        "to_torch expects a flowpath Transform, got ExpTransform",
    ),
    "context-missing": (
        lambda: fp.to_torch(rough_flow("gaussian", 3, 2).transform),
        ValueError,
        "to_torch: Chain expects a context with 2 features, got none",
    ),
    "context-superfluous": (
        lambda: fp.to_torch(fp.LU(3), torch.zeros(2)),
        ValueError,
        "to_torch: LU takes no context, got one of shape (2,)",
    ),
    "context-width": (
        lambda: fp.to_torch(rough_flow("gaussian", 3, 2).transform, torch.zeros(5, 3)),
        ValueError,
        "Chain expects a context with 2 features, got shape (5, 3)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_data_outside_a_support_of_columns_have_density_zero() -> None:
    parts = [biject_to(constraints.interval(0.0, 1.0)), biject_to(constraints.positive)]
    columns = torch.distributions.transforms.CatTransform(parts, dim=-1, lengths=[1, 1])
    flow = fp.Flow(fp.Chain([fp.from_torch(columns), fp.LU(2)]), fp.StandardNormal(2))
    rows = torch.tensor([[0.5, 1.0], [1.5, 1.0], [0.5, -1.0]])
    assert flow.log_prob(rows).isfinite().tolist() == [True, False, False]
    assert flow.log_prob(rows)[1:].tolist() == [-torch.inf, -torch.inf]
