"""PathELBO, PathGraphELBO, DRegELBO: two gradient channels, on every kind of guide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from registry import normal, rough_flow, small_flow
from torch import Tensor, nn

import flowpath as fp
from flowpath.svi.replay import Recording

pytestmark = pytest.mark.usefixtures("pyro_store")

DATA, PLACE = normal(12), normal(3)


# --- guides and models -------------------------------------------------------------------------------------------


class Problem(PyroModule):
    """A model beside a guide with parameters; `exact` says that the guide is the posterior, up to a constant."""

    nesting = 0

    def model(self) -> None:
        raise NotImplementedError


class Joint(Problem):
    """One flow, and a model of another density."""

    def __init__(self, name: str = "iaf") -> None:
        super().__init__()
        self.flow = rough_flow(name)

    def forward(self) -> None:
        pyro.sample("z", self.flow())

    def model(self) -> None:
        pyro.sample("z", dist.Normal(PLACE, 1.5).to_event(1))


class Hierarchical(Problem):
    """q(a) q(b | a), both flows: the second's context moves with the first's draw."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = rough_flow("iaf", 2), rough_flow("realnvp", 2, 2)

    def forward(self) -> None:
        a = pyro.sample("a", self.first())
        pyro.sample("b", self.second(a))

    def model(self) -> None:
        a = pyro.sample("a", dist.Normal(PLACE[:2], 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a.sin(), 0.7).to_event(1))


class Plated(Problem):
    """A global, and local latents amortised under a subsampled plate, in Pyro's own distributions."""

    nesting = 1

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self) -> None:
        mu = pyro.sample("mu", dist.Normal(self.m[0], self.m[1].exp()))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            out = self.net(torch.stack(torch.broadcast_tensors(DATA[rows], mu), -1))
            pyro.sample("z", dist.Normal(out[..., 0], out[..., 1].exp()))

    def model(self) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 2.0))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.StudentT(4.0, z, 0.5), obs=DATA[rows])


class Amortised(Problem):
    """A conditional flow in a subsampled plate, fed by data, under a scale and a mask."""

    nesting = 1

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2).double()
        self.flow = rough_flow("nsf", 2, 2)

    def forward(self) -> None:
        with pyro.plate("data", 12, subsample_size=4) as rows, poutine.scale(scale=0.5), poutine.mask(mask=rows > 3):
            pyro.sample("z", self.flow(self.net(DATA[rows].unsqueeze(-1))))

    def model(self) -> None:
        with pyro.plate("data", 12, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=DATA[rows])


class Discrete(Problem):
    """A reparameterised draw on which a discrete one depends, and a flow that depends on both."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64))
        self.flow = rough_flow("realnvp", 2, 2)

    def forward(self) -> None:
        a = pyro.sample("a", dist.Normal(self.m[0], self.m[1].exp()))
        k = pyro.sample("k", dist.Bernoulli(logits=self.m[2] * a))
        pyro.sample("b", self.flow(torch.stack([a, k], -1)))

    def model(self) -> None:
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0).double(), 1.0))
        k = pyro.sample("k", dist.Bernoulli(logits=0.5 * a))
        pyro.sample("b", dist.Normal(torch.stack([a, k], -1), 1.0).to_event(1))


class Deterministic(Problem):
    """A draw that a Delta site moves and scales by parameters of its own, with the volume it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))

    def forward(self) -> None:
        u = pyro.sample("u", dist.Normal(torch.tensor(0.0).double(), 1.0), infer={"is_auxiliary": True})
        volume = -self.m[1] + 0.0 * u
        pyro.sample("z", dist.Delta(self.m[0] + self.m[1].exp() * u, log_density=volume))

    def model(self) -> None:
        pyro.sample("z", dist.Normal(torch.tensor(1.0).double(), 2.0))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "iaf": Joint,
    "nsf": lambda: Joint("nsf"),
    "maf": lambda: Joint("maf"),
    "hierarchical": Hierarchical,
    "plated": Plated,
    "amortised": Amortised,
}
each_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
PARTICLES: dict[str, dict[str, Any]] = {
    "one": {},
    "loop": {"num_particles": 3},
    "vectorised": {"num_particles": 8, "vectorize_particles": True},
}
each_way = pytest.mark.parametrize("way", PARTICLES)
each_base = pytest.mark.parametrize(
    ("base", "stock"), [(fp.svi.PathELBO, Trace_ELBO), (fp.svi.PathGraphELBO, TraceGraph_ELBO)], ids=["trace", "graph"]
)


def options(way: str, problem: Problem) -> dict[str, Any]:
    return PARTICLES[way] | ({"max_plate_nesting": problem.nesting} if way == "vectorised" else {})


def grads(elbo: Any, problem: Problem, seed: int = 1) -> tuple[float, Tensor]:
    """Loss and flat gradient on seeded noise."""
    problem.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        loss = elbo.loss_and_grads(problem.model, problem)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters()]
    return loss, torch.cat([g.flatten() for g in found])


# --- identities --------------------------------------------------------------------------------------------------


@each_problem
@each_way
@each_base
def test_total_is_path_plus_score(make: Callable, way: str, base: type, stock: type) -> None:
    """On the same noise: Pyro's gradient less the path gradient is that of the mean log q at held draws."""
    problem = make()
    kwargs = options(way, problem)
    loss, total = grads(stock(**kwargs), problem)
    path_loss, path = grads(base(**kwargs, estimator=fp.Pathwise(0.0)), problem)
    half_loss, half = grads(base(**kwargs, estimator=fp.Pathwise(0.5)), problem)
    one_loss, one = grads(base(**kwargs, estimator=fp.Pathwise(1.0)), problem)
    assert path_loss == pytest.approx(loss, abs=1e-9) and half_loss == pytest.approx(loss, abs=1e-9)
    assert one_loss == pytest.approx(loss, abs=1e-9)
    scale = float(total.abs().max())
    assert float((one - total).abs().max()) < 1e-10 * scale
    assert float((0.5 * (total + path) - half).abs().max()) < 1e-10 * scale
    score = held_score(problem, kwargs)
    assert float((total - path - score).abs().max()) < 1e-10 * scale
    assert float(score.abs().max()) > 1e-3


def held_score(problem: Problem, kwargs: dict[str, Any]) -> Tensor:
    """The gradient of the mean log q of the reparameterised draws, all draws held, on the noise of `grads`."""
    elbo = Trace_ELBO(**kwargs)
    problem.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        many = kwargs.get("num_particles", 1)
        runs = 1 if elbo.vectorize_particles else many
        guide = elbo._vectorized_num_particles(problem) if elbo.vectorize_particles else problem
        for _ in range(runs):
            trace = poutine.trace(guide).get_trace()
            for _, site in trace.iter_stochastic_nodes():
                site["value"] = site["value"].detach()
            again = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
            again.compute_log_prob(lambda _, s: getattr(s["fn"], "has_rsample", False))
            terms = [s["log_prob_sum"] for s in again.nodes.values() if "log_prob_sum" in s]
            (sum(terms) / many).backward()  # type: ignore[union-attr, operator]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters()]
    return torch.cat([g.flatten() for g in found])


def test_delta_sites_keep_their_volume() -> None:
    """What a Delta site adds to log q has no score: dropping it would bias the gradient."""
    problem = Deterministic()
    _, total = grads(Trace_ELBO(num_particles=4), problem)
    _, path = grads(fp.svi.PathELBO(num_particles=4, estimator=fp.Pathwise(0.0)), problem)
    assert torch.allclose(total, path, atol=1e-12)


# --- the landing -------------------------------------------------------------------------------------------------


class Exact(PyroModule):
    """A guide and, with copies of its parameters, the model whose posterior it is; log Z is log Z0."""

    nesting = 1

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = rough_flow("iaf", 2), rough_flow("nsf", 2, 2)
        self.target = (
            copy.deepcopy(self.first).requires_grad_(False),
            copy.deepcopy(self.second).requires_grad_(False),
        )

    def run(self, first: fp.Flow, second: fp.Flow) -> None:
        a = pyro.sample("a", first())
        if self.kind == "hierarchical":
            pyro.sample("b", second(a.tanh()))
        elif self.kind == "plated":
            with pyro.plate("data", 12, subsample_size=4) as rows:
                c = torch.stack(torch.broadcast_tensors(DATA[rows], a[..., :1]), -1)
                pyro.sample("b", second(c))

    def forward(self) -> None:
        self.run(self.first, self.second)

    def model(self) -> None:
        self.run(*self.target)
        pyro.factor("evidence", torch.tensor(-3.0).double())


@pytest.mark.parametrize("kind", ["joint", "hierarchical", "plated"])
@each_way
@each_base
def test_gradient_vanishes_at_the_posterior(kind: str, way: str, base: type, stock: type) -> None:
    problem = Exact(kind)
    kwargs = options(way, problem)  # type: ignore[arg-type]
    _, total = grads(stock(**kwargs), problem)  # type: ignore[arg-type]
    _, path = grads(base(**kwargs, estimator=fp.Pathwise(0.0)), problem)  # type: ignore[arg-type]
    assert float(path.abs().max()) < 1e-10 and float(total.abs().max()) > 1e-2


@each_base
def test_gradient_vanishes_with_discrete_draws(base: type, stock: type) -> None:
    """The discrete draw's density is a cost of the draws it depends on; without evidence nothing is left to learn."""
    problem = Discrete()
    target = copy.deepcopy(problem).requires_grad_(False)
    problem.model = target.forward  # type: ignore[method-assign]
    _, total = grads(stock(num_particles=3), problem)
    _, path = grads(base(num_particles=3, estimator=fp.Pathwise(0.0)), problem)
    assert float(path.abs().max()) < 1e-10 and float(total.abs().max()) > 1e-2


@pytest.mark.parametrize("make", [Plated, Discrete], ids=["plated", "discrete"])
@each_base
def test_the_mean_is_that_of_pyro(make: Callable, base: type, stock: type) -> None:
    """Unbiased: over many seeds the two mean gradients agree within their errors."""
    problem = make()
    kwargs = options("vectorised", problem) if make is Plated else {"num_particles": 2}
    elbos = (stock(**kwargs), base(**kwargs, estimator=fp.Pathwise(0.0)))
    gap = torch.stack([grads(elbos[0], problem, seed)[1] - grads(elbos[1], problem, seed)[1] for seed in range(150)])
    z = gap.mean(0) / (gap.var(0) / 150).sqrt().clamp_min(1e-12)
    assert float(z.abs().max()) < 4.5 and float(gap.abs().max()) > 1e-3


# --- one pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Joint, Amortised], ids=["free", "amortised"])
def test_flows_are_not_scored_again(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(fp.Flow, "log_prob", lambda *_: calls.append(1))
    problem = make()
    fp.svi.PathELBO(**options("vectorised", problem), estimator=fp.Pathwise(0.0)).loss_and_grads(problem.model, problem)
    assert calls == []


def test_evaluation_runs_the_guide_once() -> None:
    calls: list[int] = []
    problem = Joint()
    problem.register_forward_hook(lambda *_: calls.append(1))
    svi = SVI(problem.model, problem, pyro.optim.Adam({}), fp.svi.PathELBO(estimator=fp.Pathwise(0.0)))
    svi.evaluate_loss()
    assert len(calls) == 1


# --- the weight --------------------------------------------------------------------------------------------------


def test_auto_weight_falls_towards_the_landing() -> None:
    problem = Exact("joint")
    elbo = fp.svi.PathELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1, update_every=1)
    assert elbo.auto and elbo.weight == 1.0
    for _ in range(12):
        grads(elbo, problem)  # type: ignore[arg-type]
    assert elbo.updates == 12 and float(elbo.weight) < 0.35


def test_auto_weight_is_that_of_reverse_kl() -> None:
    """The same estimate as the objective's, on the same noise."""
    flow = rough_flow("realnvp")
    objective = fp.ReverseKL(flow, lambda z: -0.5 * z.square().sum(-1), num_samples=16)
    problem = Joint("realnvp")
    problem.flow = flow
    problem.model = lambda: pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))  # type: ignore[method-assign]
    elbo = fp.svi.PathELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    found = []
    for estimate in (objective._update_weight, lambda: elbo.update_weight(problem.model, problem)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            estimate()
        found.append(float(objective.score_weight))
    assert float(elbo.weight) == pytest.approx(found[0], abs=1e-9)


def test_auto_weight_is_estimated_on_draws_of_its_own() -> None:
    """The step after an estimate uses fresh noise: its gradient is that of a fixed weight from there on."""
    problem = Joint()
    elbo = fp.svi.PathELBO(num_particles=4, update_every=100)
    elbo.update_weight(problem.model, problem)
    elbo._count = 1
    _, got = grads(elbo, problem)
    _, want = grads(elbo.at(elbo.weight), problem)
    assert torch.equal(got, want)


def test_weight_may_be_a_tensor() -> None:
    problem = Joint()
    _, one = grads(fp.svi.PathELBO(estimator=fp.Pathwise(torch.tensor(0.25).double())), problem)
    _, other = grads(fp.svi.PathELBO(estimator=fp.Pathwise(0.25)), problem)
    assert torch.allclose(one, other, atol=1e-12)


# --- importance weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Joint, lambda: Joint("maf"), Hierarchical], ids=["iaf", "maf", "hierarchical"])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "loop"])
def test_dreg_of_one_sample_is_the_path_gradient(make: Callable, vectorize: bool) -> None:
    problem = make()
    loss, want = grads(fp.svi.PathELBO(estimator=fp.Pathwise(0.0)), problem)
    bound, got = grads(fp.svi.DRegELBO(1, vectorize_particles=vectorize, max_plate_nesting=0), problem)
    assert bound == pytest.approx(loss, abs=1e-9) and torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "loop"])
def test_dreg_is_the_bound_of_a_flow(vectorize: bool) -> None:
    """Value and gradient of `fp.IWBound`, whose algebra is another, on the same noise."""
    problem = Joint("realnvp")
    objective = fp.IWBound(
        problem.flow, lambda z: dist.Normal(PLACE, 1.5).to_event(1).log_prob(z), num_samples=6 if vectorize else 1
    )
    elbo = fp.svi.DRegELBO(6 if vectorize else 1, vectorize_particles=vectorize, max_plate_nesting=0)
    loss, got = grads(elbo, problem)
    problem.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        value = objective()
    value.backward()
    want = torch.cat([p.grad.flatten() for p in problem.parameters() if p.grad is not None])
    assert loss == pytest.approx(value.item(), abs=1e-9) and torch.allclose(got, want, atol=1e-10)


class Learned(Problem):
    """A hierarchical guide and a model with a parameter of its own, in a plate."""

    nesting = 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = rough_flow("iaf", 2), rough_flow("realnvp", 2, 2)
        self.noise = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self) -> None:
        a = pyro.sample("a", self.first())
        with pyro.plate("data", 3):
            pyro.sample("b", self.second(a))

    def model(self) -> None:
        a = pyro.sample("a", dist.Normal(PLACE[:2], 1.0).to_event(1))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Normal(a.sin(), self.noise.exp()).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), self.noise.exp()), obs=PLACE)


def test_dreg_estimates_the_gradient_of_the_bound() -> None:
    """Against Pyro's plain one over the same draws: the guide's parameters w^2, the model's w."""
    problem = Learned()
    kwargs: dict[str, Any] = {"max_plate_nesting": 1, "vectorize_particles": True}
    plain = RenyiELBO(alpha=0.0, num_particles=4, **kwargs)
    ours = fp.svi.DRegELBO(4, **kwargs)
    loop = fp.svi.DRegELBO(4, vectorize_particles=False)
    gaps, found = [], []
    for seed in range(200):
        (want, g), (bound, ours_g) = grads(plain, problem, seed), grads(ours, problem, seed)
        assert bound == pytest.approx(want, abs=1e-9)
        gaps.append(g - ours_g)
        found.append(ours_g)
    gap = torch.stack(gaps)
    z = gap.mean(0) / (gap.var(0) / len(gap)).sqrt().clamp_min(1e-12)
    assert float(z.abs().max()) < 4.5 and float(gap.abs().max()) > 1e-2
    many = torch.stack([grads(loop, problem, 1000 + seed)[1] for seed in range(100)])
    z = (many.mean(0) - torch.stack(found).mean(0)) / (
        many.var(0) / len(many) + torch.stack(found).var(0) / len(found)
    ).sqrt().clamp_min(1e-12)
    assert float(z.abs().max()) < 4.5


def test_dreg_model_parameters_get_weights_not_their_squares() -> None:
    """With the guide held, the gradient of the model's parameter is that of Renyi's bound, draw for draw."""
    problem = Learned()
    kwargs: dict[str, Any] = {"max_plate_nesting": 1, "vectorize_particles": True}
    found = []
    for elbo in (RenyiELBO(alpha=0.0, num_particles=4, **kwargs), fp.svi.DRegELBO(4, **kwargs)):
        grads(elbo, problem)
        assert problem.noise.grad is not None
        found.append(problem.noise.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("kind", ["joint", "hierarchical"])
def test_dreg_vanishes_at_the_posterior(kind: str) -> None:
    problem = Exact(kind)
    loss, got = grads(fp.svi.DRegELBO(5, max_plate_nesting=0), problem)  # type: ignore[arg-type]
    assert float(got.abs().max()) < 1e-10 and loss == pytest.approx(3.0)


def test_dreg_trains_and_evaluates_by_module_and_svi() -> None:
    problem = Joint("realnvp")
    svi = SVI(problem.model, problem, pyro.optim.Adam({"lr": 0.01}), fp.svi.DRegELBO(8))
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) and abs(svi.evaluate_loss()) < 5.0


@pytest.mark.parametrize("make", [Plated, Amortised], ids=["plated", "amortised"])
def test_dreg_refuses_subsampling(make: Callable) -> None:
    problem = make()
    with pytest.raises(ValueError, match="plate 'data' shows a part"):
        fp.svi.DRegELBO(4, max_plate_nesting=1).loss_and_grads(problem.model, problem)


def test_dreg_refuses_discrete_draws() -> None:
    problem = Discrete()
    with pytest.raises(ValueError, match="site 'k' .Bernoulli. has no rsample"):
        fp.svi.DRegELBO(4, vectorize_particles=False).loss_and_grads(problem.model, problem)


# --- ways in -----------------------------------------------------------------------------------------------------


@each_base
def test_module_form_gives_the_gradient_of_svi(base: type, stock: type) -> None:
    class Model(PyroModule):
        def forward(self) -> None:
            pyro.sample("z", dist.Normal(PLACE, 1.5).to_event(1))

    problem = Joint()
    elbo = base(num_particles=4, estimator=fp.Pathwise(0.0))
    loss, want = grads(elbo, problem)
    problem.zero_grad()
    module = elbo(Model(), problem)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        value = module()
    value.backward()
    got = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in problem.parameters()]
    )
    assert value.item() == pytest.approx(loss, abs=1e-9) and torch.allclose(got, want, atol=1e-12)


def test_svi_trains() -> None:
    class Guide(Joint):
        def __init__(self) -> None:
            super().__init__()
            self.flow = small_flow("realnvp", whiten="none").double()

    problem = Guide()
    elbo = fp.svi.PathELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(problem.model, problem, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(150)]
    assert sum(losses[-20:]) / 20 < 0.1 < sum(losses[:20]) / 20


@pytest.mark.parametrize("make", [Joint, Plated], ids=["flow", "plated"])
@each_base
def test_make_fx_traces_it(make: Callable, base: type, stock: type) -> None:
    """No value is read and no branch taken on data: the trace gives the eager gradient on the same noise."""
    from torch.fx.experimental.proxy_tensor import make_fx

    problem = make()
    elbo = base(**options("vectorised", problem), estimator=fp.Pathwise(0.3))
    params = list(problem.parameters())

    def step(_: Tensor) -> list[Tensor]:
        loss, surrogate = elbo.loss_and_surrogate(problem.model, problem)
        return [loss.detach(), *torch.autograd.grad(surrogate, params, materialize_grads=True)]

    with pyro.validation_enabled(False):
        traced = make_fx(step)(torch.zeros(()))
        loss, want = grads(elbo, problem)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            got = traced(torch.zeros(()))
    assert float(got[0]) == pytest.approx(loss, abs=1e-9)
    assert torch.allclose(torch.cat([g.flatten() for g in got[1:]]), want, atol=1e-10)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [TraceEnum_ELBO, RenyiELBO, TraceMeanField_ELBO], ids=lambda c: c.__name__)
def test_an_elbo_that_cannot_honour_it_raises(other: type) -> None:
    with pytest.raises(TypeError, match=f"{other.__name__} cannot take path gradients"):
        type("Mine", (fp.svi.PathMixin, other), {})


def test_own_elbos_may_take_it() -> None:
    class Mine(fp.svi.PathELBO):
        pass

    assert Mine(estimator=fp.Pathwise(0.0)).weight == 0.0


def test_other_estimators_are_refused() -> None:
    with pytest.raises(TypeError, match="expects estimator=fp.Pathwise"):
        fp.svi.PathELBO(estimator=fp.Score())  # type: ignore[arg-type]


def test_enumerated_guide_is_refused() -> None:
    def guide() -> None:
        pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'k' of the guide is to be enumerated"):
        fp.svi.PathELBO().loss_and_grads(guide, guide)


def test_dropout_is_refused() -> None:
    problem = Joint()
    problem.flow = small_flow("realnvp", dropout=0.5).double()
    with pytest.raises(ValueError, match="flow at site 'z' has dropout"):
        fp.svi.PathELBO(estimator=fp.Pathwise(0.0)).loss_and_grads(problem.model, problem)
    problem.flow.eval()
    fp.svi.PathELBO(estimator=fp.Pathwise(0.0)).loss_and_grads(problem.model, problem)


def test_messenger_guides_are_refused() -> None:
    problem = Joint()
    guide = pyro.infer.autoguide.AutoNormalMessenger(problem.model)
    with pytest.raises(TypeError, match="AutoNormalMessenger is a Messenger"):
        fp.svi.PathELBO().loss_and_grads(problem.model, guide)


def test_partial_reparameterisation_is_refused() -> None:
    from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma

    def guide() -> None:
        pyro.sample("z", RejectionStandardGamma(pyro.param("a", torch.tensor(2.0))))

    def model() -> None:
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    with pytest.raises(ValueError, match="site 'z'.*in part"):
        fp.svi.PathELBO(estimator=fp.Pathwise(0.0)).loss_and_grads(model, guide)


def test_recording_leaves_param_sites_alone() -> None:
    """The second run of the guide shows SVI no parameter twice, and keeps plates' rows."""
    problem = Plated()
    recording = Recording(problem)
    recording()
    rows = recording.trace.nodes["data"]["value"]
    with poutine.trace() as outer:
        trace, leaves = recording.again((), {})
    assert torch.equal(trace.nodes["data"]["value"], rows) and set(leaves) == {"mu", "z"}
    assert len(outer.trace.nodes) == 0
