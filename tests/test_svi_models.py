"""Flows inside Pyro models: as prior, likelihood and guide site; registered, or noticed when they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, JitTrace_ELBO, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule
from registry import normal, rough_flow, small_flow
from torch import Tensor, nn

import flowpath as fp

pytestmark = pytest.mark.usefixtures("pyro_store")

X = normal(30, 2) * torch.tensor([0.5, 2.0], dtype=torch.float64) + 1.0
ELBOS: dict[str, Callable[[], Any]] = {
    "path": lambda: fp.svi.PathELBO(num_particles=2),
    "graph": lambda: fp.svi.PathGraphELBO(num_particles=2),
    "dreg": lambda: fp.svi.DRegELBO(2),
}
each_elbo = pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)


def fresh(features: int = 2, context: int = 0) -> fp.Flow:
    return small_flow("realnvp", features, context, whiten="none").double()


def moved(flow: nn.Module, start: nn.Module) -> bool:
    return any(not torch.equal(p, s) for p, s in zip(flow.parameters(), start.parameters(), strict=True))


def prior_model(flow: fp.Flow) -> Callable[[], None]:
    """A fitted flow as the prior of z, and one observation of it."""

    def model() -> None:
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([0.4, -0.2]).double())

    return model


# --- where a flow may stand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [None, 10], ids=["all", "subsampled"])
def test_flow_as_a_likelihood_is_fitted(shown: int | None) -> None:
    """Maximum likelihood by SVI: as good as the Gaussian that made the data."""
    flow = fresh()

    def model(x: Tensor) -> None:
        fp.svi.module("likelihood", flow)
        with pyro.plate("rows", len(x), subsample_size=shown) as i:
            pyro.sample("x", flow(), obs=x[i])

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.02}), fp.svi.PathELBO())
    for _ in range(150):
        svi.step(X)
    truth = dist.Normal(X.mean(0), X.std(0)).to_event(1).log_prob(X).mean()
    assert float(flow.log_prob(X).mean().detach()) > float(truth) - 0.1


def test_conditional_likelihood_with_a_latent() -> None:
    """p(x | z) a flow whose context is a latent of AutoFlow: both are trained."""
    flow = rough_flow("realnvp", 2, 1)
    start = copy.deepcopy(flow)

    def model(x: Tensor) -> None:
        fp.svi.module("likelihood", flow)
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "x", flow(z.unsqueeze(-1).expand(*z.shape[:-1], len(x), 1) if z.dim() else z.expand(len(x), 1)), obs=x
            )

    guide = fp.svi.AutoFlow(model, transforms=2, hidden_features=(8,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=2))
    losses = [svi.step(X) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10]) and moved(flow, start)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "loop"])
def test_flow_prior_and_flow_guide(vectorize: bool) -> None:
    """The guide comes nearer the posterior; the frozen prior stays."""
    prior = rough_flow("nsf", 2).requires_grad_(False)
    model, kept = prior_model(prior), copy.deepcopy(prior)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = fresh()

        def forward(self) -> None:
            pyro.sample("z", self.flow())

    guide = Guide()
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=vectorize)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-15:]) < sum(losses[:15]) - 1.0 and not moved(prior, kept)


def test_nuts_over_a_flow_prior() -> None:
    model = prior_model(rough_flow("realnvp", 2).requires_grad_(False))
    mcmc = MCMC(NUTS(model, max_tree_depth=3), 5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].shape == (5, 2)


def test_neutra_over_a_flow_prior() -> None:
    model = prior_model(rough_flow("realnvp", 2).requires_grad_(False))
    guide = fp.svi.AutoFlow(model, transforms=2, hidden_features=(8,)).setup().requires_grad_(False)
    mcmc = MCMC(NUTS(NeuTraReparam(guide).reparam(model), max_tree_depth=2), 3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z_shared_latent"].shape == (3, 2)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive_from_a_flow_prior(parallel: bool) -> None:
    draws = Predictive(prior_model(rough_flow("iaf", 2)), num_samples=6, parallel=parallel)()
    assert draws["z"].shape[0] == 6 and draws["z"].shape[-1] == 2


def test_importance_with_a_flow_guide_gives_the_evidence() -> None:
    """A conjugate model, its evidence known; the guide is the wider prior, a flow."""
    flow = fp.Flow(fp.TriangularAffine(2), fp.StandardNormal(2)).double().requires_grad_(False)
    y = torch.tensor([0.4, -0.2]).double()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    found = Importance(model, guide=lambda: pyro.sample("z", flow()), num_samples=2000).run()
    log_z = torch.logsumexp(torch.stack(found.log_weights), 0) - torch.tensor(2000.0).log()
    want = dist.Normal(torch.zeros(2).double(), 2.0**0.5).to_event(1).log_prob(y)
    assert float(log_z) == pytest.approx(float(want), abs=0.1)


def test_condition_on_a_flow_site() -> None:
    flow = rough_flow("maf", 2)
    z = normal(2)
    trace = poutine.trace(poutine.condition(prior_model(flow), {"z": z})).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["is_observed"]
    assert torch.allclose(trace.nodes["z"]["log_prob"], flow.log_prob(z))


def test_enumeration_beside_a_flow() -> None:
    """TraceEnum_ELBO sums a discrete site out while a flow is guide: the loss is that of the summed model."""
    flow = rough_flow("nsf", 2)

    def model(summed: bool) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        p = torch.sigmoid(z[..., 0])
        if summed:
            logs = torch.stack([dist.Normal(k + z[..., 1], 1.0).log_prob(torch.tensor(0.5)) for k in (0.0, 1.0)])
            pyro.factor("y", torch.logsumexp(logs + torch.stack([1 - p, p]).log(), 0))
        else:
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(k + z[..., 1], 1.0), obs=torch.tensor(0.5).double())

    def guide(summed: bool) -> None:
        fp.svi.module("guide", flow)
        pyro.sample("z", flow())

    losses = []
    for elbo, summed in ((TraceEnum_ELBO(max_plate_nesting=0), False), (Trace_ELBO(), True)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(4)
            losses.append(elbo.loss_and_grads(model, guide, summed))
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["realnvp", "iaf"])
def test_jit_elbo_with_a_flow_guide(name: str) -> None:
    """Flows on both sides, registered: Pyro's JIT follows no other global tensors, so none of a frozen flow."""
    flow, prior = rough_flow(name, 2), rough_flow("realnvp", 2)
    start = copy.deepcopy(flow)

    def guide() -> None:
        fp.svi.module("guide", flow)
        pyro.sample("z", flow())

    def model() -> None:
        fp.svi.module("prior", prior)
        prior_model(prior)()

    elbo = JitTrace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0, ignore_jit_warnings=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(4)) and moved(flow, start)


# --- registering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "a part frozen"])
def test_module_trains_the_flow(frozen: bool) -> None:
    flow = fresh()
    if frozen:
        next(flow.parameters()).requires_grad_(False)
    start = copy.deepcopy(flow)

    def guide() -> None:
        assert fp.svi.module("guide", flow) is flow
        pyro.sample("z", flow())

    svi = SVI(
        prior_model(rough_flow("nsf", 2).requires_grad_(False)), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()
    )
    for _ in range(2):
        svi.step()
    assert moved(flow, start)
    assert torch.equal(next(flow.parameters()), next(start.parameters())) == frozen


def test_module_of_an_occupied_name_raises() -> None:
    """pyro.module would train the first flow and leave the second as it is, without a word."""
    first, second = fresh(), fresh()
    fp.svi.module("guide", first)
    fp.svi.module("guide", first)
    with pytest.raises(ValueError, match=r"svi.module\('guide'\).*another tensor.*clear_param_store"):
        fp.svi.module("guide", second)
    fp.svi.module("other", second)
    pyro.clear_param_store()
    fp.svi.module("guide", second)


def test_module_takes_modules() -> None:
    with pytest.raises(TypeError, match="svi.module expects a flow, got int"):
        fp.svi.module("guide", 3)  # type: ignore[arg-type]


def test_two_flows_train_apart() -> None:
    flows = {"a": fresh(), "b": fresh()}
    start = copy.deepcopy(flows)

    def guide(name: str) -> None:
        fp.svi.module(name, flows[name])
        pyro.sample("z", flows[name]())

    model = prior_model(rough_flow("nsf", 2).requires_grad_(False))
    svi = SVI(lambda _: model(), guide, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO())
    svi.step("a")
    assert moved(flows["a"], start["a"]) and not moved(flows["b"], start["b"])
    svi.step("b")
    assert moved(flows["b"], start["b"])


@each_elbo
@pytest.mark.parametrize("where", ["model", "guide"])
@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: q.mask(True)], ids=["plain", "masked"])
def test_unregistered_flow_is_named(elbo: Callable, where: str, wrap: Callable) -> None:
    """Pyro trains nothing there, silently."""
    flow = fresh()
    model = prior_model(flow if where == "model" else rough_flow("nsf", 2).requires_grad_(False))

    def guide() -> None:
        m = pyro.param("m", torch.zeros(2).double())
        pyro.sample("z", dist.Normal(m, 1.0).to_event(1) if where == "model" else wrap(flow()))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    with pytest.raises(ValueError, match="flow at site 'z' has trainable parameters that are not registered"):
        svi.step()
    assert isinstance(svi.evaluate_loss(), float)
    flow.requires_grad_(False)
    svi.step()


@each_elbo
def test_registered_once_but_outside_is_named(elbo: Callable) -> None:
    """In the store, yet no param site of the step: SVI would not hand it to the optimiser."""
    flow = fresh()
    fp.svi.module("guide", flow)
    model = prior_model(rough_flow("nsf", 2).requires_grad_(False))
    svi = SVI(model, lambda: pyro.sample("z", flow()), pyro.optim.Adam({"lr": 0.01}), elbo())
    with pytest.raises(ValueError, match="in the model or guide"):
        svi.step()


@each_elbo
def test_stale_name_is_noticed_behind_pyro_module(elbo: Callable) -> None:
    pyro.module("guide", fresh())
    flow = fresh()

    def guide() -> None:
        pyro.module("guide", flow)
        pyro.sample("z", flow())

    svi = SVI(prior_model(rough_flow("nsf", 2).requires_grad_(False)), guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    with pytest.raises(ValueError, match="flow at site 'z'"):
        svi.step()


@each_elbo
def test_module_form_reaches_plain_modules(elbo: Callable) -> None:
    """A torch optimiser has the parameters of an nn.Module guide; a flow outside of it is named."""

    class Model(nn.Module):
        def __init__(self, flow: fp.Flow) -> None:
            super().__init__()
            self.run = prior_model(flow)

        def forward(self) -> None:
            self.run()

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = fresh()

        def forward(self) -> None:
            pyro.sample("z", self.flow())

    guide = Guide()
    elbo()(Model(rough_flow("nsf", 2).requires_grad_(False)), guide)().backward()
    assert all(p.grad is not None for p in guide.parameters())
    with pytest.raises(ValueError, match="flow at site 'z'"):
        elbo()(Model(fresh()), guide)()
