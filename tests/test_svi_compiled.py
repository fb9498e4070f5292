"""CompiledSVI: Pyro's losses, gradients and fits on the same noise, and a fall back where a graph cannot follow."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import flowpath as fp
from flowpath.svi import CompiledSVI, DRegELBO, PathELBO
from flowpath.tracing.compiler import has_compiler

pytestmark = pytest.mark.usefixtures("pyro_store")
needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
S = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
TABLE = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).reshape(20, 3).sin()
LABELS = (TABLE.sum(-1) > 0).to(torch.float64)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def schools(y: Tensor, s: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, s), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


def subsampled(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=5) as i:
        pyro.sample("y", dist.Bernoulli(logits=(x[i] * w).sum(-1)), obs=y[i])


def hand_guide(*args: Any) -> None:
    loc = pyro.param("loc", torch.zeros(3))
    scale = pyro.param("scale", torch.full((3,), 0.3), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def gamma_guide(*args: Any) -> None:
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("rate", dist.Gamma(a, b))


def coins(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def coin_guide(*args: Any) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))


def rows(x: Tensor) -> None:
    with pyro.plate("rows", len(x), subsample_size=5) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 0.5).to_event(1), obs=x[i])


def amortized() -> Any:
    torch.manual_seed(3)
    return rows, fp.svi.AmortizedFlow(rows, nn.Linear(3, 4), transforms=2, hidden_features=(8,))


def mixture(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(w[k], 1.0), obs=y)


def enumerated_guide(*args: Any) -> None:
    law = dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2)))
    pyro.sample("z", law, infer={"enumerate": "parallel"})


class VAE(PyroModule):
    """A decoder registered by pyro.module in the model, an encoder in the guide, local latents in a plate."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", 20, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", 20, subsample_size=len(x)):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(scale)).to_event(1))


class Hierarchy(PyroModule):
    """A PyroModule guide with constrained parameters of its own, a flow and a conditional law."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = fp.iaf(2, transforms=1, hidden_features=(6,)).double()
        self.spread = PyroParam(torch.full((8,), 0.4), constraint=constraints.positive)
        self.pull = nn.Parameter(torch.tensor(0.1))

    def forward(self, y: Tensor, s: Tensor) -> None:
        z = pyro.sample("z", self.flow(), infer={"is_auxiliary": True})
        mu, tau = z[..., 0], softplus(z[..., 1])
        pyro.sample("mu", dist.Delta(mu))
        pyro.sample("tau", dist.Delta(tau, log_density=-z[..., 1] + softplus(z[..., 1])))
        with pyro.plate("schools", len(y)):
            pyro.sample("theta", dist.Normal(self.pull * tau.unsqueeze(-1), self.spread))


def conditional(y: Tensor, s: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.unsqueeze(-1) + tau.unsqueeze(-1) * theta, s), obs=y)


def vectorised(elbo: Any, n: int = 4, **options: Any) -> Callable[[], Any]:
    return lambda: elbo(num_particles=n, vectorize_particles=True, **options)


def autoguide(kind: Any, model: Any, **options: Any) -> Callable[[], Any]:
    return lambda: (model, kind(model, **options))


def vae() -> Any:
    net = VAE()
    return net.model, net.guide


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[Tensor, ...]]] = {
    "mean field": (autoguide(AutoNormal, schools), vectorised(Trace_ELBO), (Y, S)),
    "particles in a loop": (autoguide(AutoNormal, schools), lambda: Trace_ELBO(num_particles=2), (Y, S)),
    "full rank": (autoguide(AutoMultivariateNormal, schools), vectorised(Trace_ELBO), (Y, S)),
    "delta": (autoguide(AutoDelta, schools), Trace_ELBO, (Y, S)),
    "iaf": (autoguide(AutoIAFNormal, schools, hidden_dim=[16]), vectorised(Trace_ELBO), (Y, S)),
    "analytic KL": (autoguide(AutoNormal, schools), vectorised(TraceMeanField_ELBO), (Y, S)),
    "graph": (autoguide(AutoNormal, schools), vectorised(TraceGraph_ELBO), (Y, S)),
    "constrained parameters": (lambda: (logistic, hand_guide), vectorised(Trace_ELBO), (TABLE[:5], LABELS[:5])),
    "subsampling": (lambda: (subsampled, hand_guide), Trace_ELBO, (TABLE, LABELS)),
    "implicit": (lambda: (counts, gamma_guide), Trace_ELBO, (Y.abs().round(),)),
    "score function": (lambda: (coins, coin_guide), Trace_ELBO, (Y[0] / 10,)),
    "score function, graph": (lambda: (coins, coin_guide), TraceGraph_ELBO, (Y[0] / 10,)),
    "vae": (vae, Trace_ELBO, (TABLE[:5],)),
    "renyi": (autoguide(AutoNormal, schools), vectorised(RenyiELBO, alpha=0.5), (Y, S)),
    "path": (autoguide(AutoNormal, schools), vectorised(PathELBO, estimator=fp.Pathwise(0.0)), (Y, S)),
    "path, vae": (vae, lambda: PathELBO(estimator=fp.Pathwise(0.5)), (TABLE[:5],)),
    "path, auto": (autoguide(AutoNormal, schools), vectorised(PathELBO, update_every=2), (Y, S)),
    "dreg": (autoguide(AutoNormal, schools), lambda: DRegELBO(4), (Y, S)),
    "auto flow": (
        autoguide(fp.svi.AutoFlow, schools, transforms=2, hidden_features=(8,)),
        vectorised(PathELBO, update_every=2),
        (Y, S),
    ),
    "inverse flow": (
        autoguide(fp.svi.AutoFlow, schools, flow="iaf", transforms=1, hidden_features=(12,)),
        vectorised(PathELBO, estimator=fp.Pathwise(0.0)),
        (Y, S),
    ),
    "amortized flow": (amortized, lambda: PathELBO(num_particles=2), (TABLE,)),
    "hierarchy with a flow": (
        lambda: (conditional, Hierarchy()),
        lambda: Trace_ELBO(num_particles=2),
        (Y, S),
    ),
}


def adam(**settings: Any) -> Any:
    return pyro.optim.Adam({"lr": 0.02, **settings})


def fitted(make: Callable[..., Any], case: str, steps: int = 6, optimizer: Any = adam) -> tuple[list[float], Any, Any]:
    """Losses of some steps, the parameters afterwards, and the SVI object; a fresh store and one seed."""
    parts, elbo, args = CASES[case]
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        svi = make(*parts(), optimizer(), elbo())
        losses = [svi.step(*args) for _ in range(steps)]
    store = pyro.get_param_store()
    return losses, {n: p.detach().clone() for n, p in store.named_parameters()}, svi


def plain(*parts: Any) -> CompiledSVI:
    return CompiledSVI(*parts, compile=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_pyros(case: str) -> None:
    losses, params, _ = fitted(SVI, case)
    ours, our_params, svi = fitted(plain, case)
    assert svi.mode == "traced", svi.reason
    assert ours == pytest.approx(losses, rel=1e-9)
    for (name, p), (_, q) in zip(params.items(), our_params.items(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", ["mean field", "path", "vae"])
def test_the_same_in_float32(case: str) -> None:
    torch.set_default_dtype(torch.float32)
    parts, elbo, args = CASES[case]
    args = tuple(a.float() for a in args)
    found = []
    for make in (SVI, plain):
        pyro.clear_param_store()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            svi = make(*parts(), adam(), elbo())
            found.append([svi.step(*args) for _ in range(4)])
    assert svi.mode == "traced"
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def rates(name: str) -> dict[str, float]:
    return {"lr": 0.05 if "loc" in name else 0.01}


OPTIMIZERS = {
    "Adam": adam,
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 1e-2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "clip_norm": 0.5, "lrd": 0.9, "weight_decay": 0.1}),
    "centered": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "centered_variance": True}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "per parameter": lambda: pyro.optim.Adam(rates),
    "clipped norm": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 0.3}),
    "clipped value": lambda: pyro.optim.SGD({"lr": 0.02}, {"clip_value": 0.1}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_pyros_optimisers_step_as_they_do_under_svi(optimizer: str) -> None:
    losses, params, _ = fitted(SVI, "mean field", optimizer=OPTIMIZERS[optimizer])
    ours, our_params, svi = fitted(plain, "mean field", optimizer=OPTIMIZERS[optimizer])
    assert svi.mode == "traced", svi.reason
    assert ours == pytest.approx(losses, rel=1e-9)
    for name, p in params.items():
        torch.testing.assert_close(our_params[name], p, rtol=1e-8, atol=1e-10, msg=name)


def scheduled(make: Callable[..., Any]) -> tuple[list[float], dict[str, Any]]:
    pyro.clear_param_store()
    torch.manual_seed(7)
    optimizer = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    svi = make(schools, AutoNormal(schools), optimizer, Trace_ELBO())
    losses = []
    for _ in range(4):
        losses += [svi.step(Y, S) for _ in range(2)]
        optimizer.step()
    return losses, optimizer.get_state()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")  # Pyro's own, of its own call order
def test_schedules_of_pyro() -> None:
    with torch.random.fork_rng():
        losses, state = scheduled(SVI)
        ours, our_state = scheduled(plain)
    assert ours == pytest.approx(losses, rel=1e-9)
    for name, single in state.items():
        mine = our_state[name]["optimizer"]
        assert mine["param_groups"][0]["lr"] == pytest.approx(single["optimizer"]["param_groups"][0]["lr"])
        torch.testing.assert_close(mine["state"][0]["exp_avg"], single["optimizer"]["state"][0]["exp_avg"])


def test_state_of_an_optimiser_goes_on() -> None:
    """SVI, then CompiledSVI, then SVI again, with one optimiser: as SVI all the way."""
    found = []
    for make in (SVI, plain):
        pyro.clear_param_store()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            parts = schools, AutoNormal(schools), adam(), Trace_ELBO()
            found.append([svi.step(Y, S) for svi in (SVI(*parts), make(*parts), SVI(*parts)) for _ in range(4)])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("kind", ["instance", "factory", "class"])
def test_torch_optimisers(kind: str) -> None:
    guide = AutoNormal(schools)
    guide(Y, S)
    makers = {
        "instance": torch.optim.Adam(guide.parameters(), lr=0.02),
        "factory": lambda params: torch.optim.Adam(params, lr=0.02),
        "class": torch.optim.Adam,
    }
    svi = plain(schools, guide, makers[kind], Trace_ELBO())
    before = [p.detach().clone() for p in guide.parameters()]
    for _ in range(4):
        svi.step(Y, S)
    assert svi.mode == "traced"
    assert all(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))


def test_torch_optimiser_of_some_parameters_trains_these() -> None:
    net = VAE()
    svi = plain(net.model, net.guide, torch.optim.SGD(net.encoder.parameters(), lr=0.01), Trace_ELBO())
    before = [p.detach().clone() for p in net.decoder.parameters()]
    first = net.encoder[0].weight.detach().clone()
    for _ in range(4):
        svi.step(TABLE[:5])
    assert svi.mode == "traced"
    assert all(torch.equal(b, p) for b, p in zip(before, net.decoder.parameters(), strict=True))
    assert not torch.equal(first, net.encoder[0].weight)


def test_batches_take_turns_without_new_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowpath.svi import compiled

    made = []
    monkeypatch.setattr(compiled, "Plan", lambda *a, _plan=compiled.Plan: made.append(1) or _plan(*a))
    svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
    for _ in range(6):
        for rows in torch.arange(20).split(8):  # 8, 8, 4
            svi.step(TABLE[rows], LABELS[rows])
    assert len(made) == 2
    assert svi.mode == "traced"


def test_new_data_are_used() -> None:
    svi = plain(logistic, hand_guide, adam(lr=1e-9), Trace_ELBO())
    for _ in range(3):
        svi.step(TABLE[:5], LABELS[:5])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.step(TABLE[5:10], 1 - LABELS[5:10])
        torch.manual_seed(1)
        theirs = Trace_ELBO().loss(logistic, hand_guide, TABLE[5:10], 1 - LABELS[5:10])
    assert svi.mode == "traced"
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_data_outside_their_support_are_refused_once_traced() -> None:
    svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
    for _ in range(3):
        svi.step(TABLE[:5], LABELS[:5])
    before = pyro.param("loc").detach().clone()
    with pytest.raises(ValueError, match="support"):
        svi.step(TABLE[:5], LABELS[:5] + 0.5)
    assert torch.equal(before, pyro.param("loc"))
    wrong = LABELS[:5].clone()
    svi.step(TABLE[:5], wrong)
    wrong[0] = -3.0
    with pytest.raises(ValueError, match="support"):
        svi.step(TABLE[:5], wrong)


def test_without_validation_data_are_not_checked() -> None:
    with pyro.validation_enabled(False):
        svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
        for _ in range(3):
            svi.step(TABLE[:5], LABELS[:5])
        assert svi.step(TABLE[:5], LABELS[:5] + 0.5) > -1e9
    assert svi.mode == "traced"


def flips(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z > 0 else 2.0
    pyro.sample("y", dist.Normal(z, scale), obs=y)


def tosses(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0 + random.random()), obs=y)


def appears(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z.item() > 0:
        pyro.factor("more", -z.square())
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def z_guide(*args: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))


@pytest.fixture
def keeps_python_rng() -> Any:
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.mark.parametrize(
    ("model", "guide", "y"),
    [(coins, enumerated_guide, Y[0]), (mixture, hand_guide, Y / 10)],
    ids=["in the guide", "in the model"],
)
def test_enumeration_goes_on_as_pyro(model: Any, guide: Any, y: Tensor) -> None:
    svi = plain(model, guide, adam(), TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(y)
    with pytest.warns(UserWarning, match="TraceEnum_ELBO: .* value of a tensor"):
        svi.step(y)


@pytest.mark.usefixtures("keeps_python_rng")
@pytest.mark.parametrize(
    ("model", "reason"),
    [(flips, "value of a tensor"), (tosses, "the traced step differs"), (appears, "value of a tensor")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_graph_cannot_follow_goes_on_as_pyro(model: Any, reason: str) -> None:
    svi = plain(model, z_guide, adam(), Trace_ELBO())
    svi.step(Y[0])
    with pytest.warns(UserWarning, match=f"CompiledSVI goes on as Pyro's SVI: .*{reason}"):
        svi.step(Y[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(Y[0])
    assert svi.mode == "eager"
    assert reason in str(svi.reason)


def test_fallen_back_it_steps_as_pyro() -> None:
    found = []
    for make in (SVI, plain):
        pyro.clear_param_store()
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            svi = make(flips, z_guide, adam(), Trace_ELBO())
            found.append([svi.step(Y[0]) for _ in range(6)])
    assert found[1] == pytest.approx(found[0], rel=1e-12)


class Annealed:
    """A model with a setting that is no argument."""

    beta = 1.0

    def __call__(self, y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0 / self.beta), obs=y)


def test_settings_that_change_are_noticed() -> None:
    model = Annealed()
    svi = plain(model, z_guide, adam(), Trace_ELBO())
    for _ in range(50):
        svi.step(Y[0])
    model.beta = 0.5
    with pytest.warns(UserWarning, match="reads a setting that has changed"):
        for _ in range(60):
            svi.step(Y[0])
    assert svi.mode == "eager"


def test_settings_given_as_arguments_are_traced_again() -> None:
    def model(y: Tensor, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, scale), obs=y)

    svi = plain(model, z_guide, adam(lr=1e-9), Trace_ELBO())
    for scale in (1.0, 1.0, 2.0, 2.0, 1.0):
        svi.step(Y[0], scale)
    assert svi.mode == "traced"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.step(Y[0], 2.0)
        torch.manual_seed(1)
        assert ours == pytest.approx(Trace_ELBO().loss(model, z_guide, Y[0], 2.0), rel=1e-6)


def test_numbers_that_never_repeat_are_not_traced_for_ever() -> None:
    def model(y: Tensor, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, scale), obs=y)

    svi = plain(model, z_guide, adam(), Trace_ELBO())
    with pytest.warns(UserWarning, match="should be given as tensors"):
        for i in range(70):
            svi.step(Y[0], 1.0 + i)


def test_data_in_closures_are_named_once() -> None:
    inner = torch.ones(3)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(z, S), obs=Y)
        pyro.factor("f", (inner * z).sum())

    svi = plain(model, z_guide, adam(), Trace_ELBO())
    svi.step()
    with pytest.warns(UserWarning, match=r"the trace holds S \(8,\), Y \(8,\), inner \(3,\), which are no arguments"):
        svi.step()
    svi.step()
    assert svi.mode == "traced"


def test_buffers_are_no_news() -> None:
    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("y", Y.clone())

        def forward(self) -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("schools", 8):
                pyro.sample("y", dist.Normal(z, 1.0), obs=self.y)

    model = Net()
    svi = plain(model, z_guide, adam(lr=1e-9), Trace_ELBO())
    for _ in range(3):
        svi.step()
    model.y.mul_(3.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.step()
        torch.manual_seed(1)
        assert ours == pytest.approx(Trace_ELBO().loss(model, z_guide), rel=1e-6)
    assert svi.mode == "traced"


def test_training_mode_is_part_of_the_kind() -> None:
    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(self.net(x) * z, 1.0).to_event(1), obs=x)

    model = Net()
    svi = plain(model, z_guide, adam(lr=1e-9), Trace_ELBO())
    for _ in range(3):
        svi.step(TABLE[:4])
    model.eval()
    for _ in range(3):
        svi.step(TABLE[:4])
    assert svi.mode == "traced"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.step(TABLE[:4])
        torch.manual_seed(1)
        assert ours == pytest.approx(Trace_ELBO().loss(model, z_guide, TABLE[:4]), rel=1e-6)


def test_a_cleared_store_starts_anew() -> None:
    svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
    for _ in range(4):
        svi.step(TABLE[:5], LABELS[:5])
    pyro.clear_param_store()
    for _ in range(4):
        svi.step(TABLE[:5], LABELS[:5])
    assert svi.mode == "traced"
    assert not torch.equal(pyro.param("loc"), torch.zeros(3))


def test_run_is_steps() -> None:
    losses = fitted(plain, "mean field", 12)[0]
    parts, elbo, args = CASES["mean field"]
    pyro.clear_param_store()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        svi = plain(*parts(), adam(), elbo())
        assert svi.run(12, *args).tolist() == pytest.approx(losses, rel=1e-12)
    assert svi.run(0, *args).shape == (0,)


def test_evaluate_loss_is_pyros(keeps_rng: Any) -> None:
    svi = fitted(plain, "mean field")[2]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.evaluate_loss(Y, S)
        torch.manual_seed(1)
        assert ours == svi.elbo.loss(svi.model, svi.guide, Y, S)


def test_nan_is_told_and_handed_to_pyro() -> None:
    svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
    for _ in range(3):
        svi.step(TABLE[:5], LABELS[:5])
    with torch.no_grad():
        pyro.param("loc").fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN"):
        svi.step(TABLE[:5], LABELS[:5])
    with pytest.raises(ValueError, match="invalid values|support"):
        svi.step(TABLE[:5], LABELS[:5])


@pytest.mark.parametrize(
    ("elbo", "said"),
    [
        (lambda: JitTrace_ELBO(), "pass Trace_ELBO, not JitTrace_ELBO"),
        (lambda: 3.0, "expects an ELBO of flowpath or Pyro, got float"),
    ],
    ids=["jit", "number"],
)
def test_other_losses_are_refused(elbo: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        CompiledSVI(schools, z_guide, adam(), elbo())


def test_losses_of_several_parts_are_refused() -> None:
    svi = plain(schools, AutoNormal(schools), adam(), ReweightedWakeSleep(num_particles=2))
    with pytest.raises(TypeError, match="ReweightedWakeSleep has a loss of several parts"):
        svi.step(Y, S)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda: torch.optim.LBFGS([torch.zeros(1, requires_grad=True)]), "LBFGS evaluates the loss several times"),
        (lambda: "adam", "expects a torch optimizer, .* got str"),
        (
            lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1),
            "pass its optimizer, and call its step",
        ),
    ],
    ids=["lbfgs", "name", "scheduler"],
)
def test_other_optimisers_are_refused(optimizer: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        CompiledSVI(schools, z_guide, optimizer(), Trace_ELBO())


def test_nothing_to_train_is_an_error() -> None:
    def fixed(*args: Any) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no gradient reaches a parameter"):
        plain(flips, fixed, adam(), Trace_ELBO()).step(Y[0])


@pytest.mark.parametrize("by", ["step", "run"])
def test_auto_compiles_when_the_saving_pays(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowpath.svi import compiled, steps

    asked: list[int] = []
    monkeypatch.setattr(steps.Plan, "compile", lambda plan, tensors: asked.append(plan.steps))
    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    svi = CompiledSVI(logistic, hand_guide, adam(), Trace_ELBO())
    args = TABLE[:5], LABELS[:5]
    svi.run(60, *args)
    assert asked == []
    monkeypatch.setattr(compiled, "_COST", 1e-6)
    if by == "step":
        svi.step(*args)
    else:
        svi = CompiledSVI(logistic, hand_guide, adam(), Trace_ELBO())
        svi.run(400, *args)
    assert len(asked) == 1


def test_failed_compilation_is_told_and_leaves_it_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowpath import tracing
    from flowpath.svi import compiled

    def fail(traced: Any, inputs: Any) -> None:
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(tracing.Traced, "compiled", fail)
    monkeypatch.setattr(compiled, "has_compiler", lambda device: True)
    svi = CompiledSVI(logistic, hand_guide, adam(), Trace_ELBO(), compile=True)
    svi.step(TABLE[:5], LABELS[:5])
    with pytest.warns(UserWarning, match="runs traced, not compiled: RuntimeError: no such instruction"):
        svi.step(TABLE[:5], LABELS[:5])
    assert svi.mode == "traced"


def test_arguments_that_are_arrays_go_on_as_pyro() -> None:
    def model(y: Any) -> None:
        logistic(TABLE[:5], torch.as_tensor(y))

    svi = plain(model, hand_guide, adam(), Trace_ELBO())
    with pytest.warns(UserWarning, match="arguments of type ndarray are neither tensors nor fixed values"):
        svi.step(LABELS[:5].numpy())
    svi.step(LABELS[:5].numpy())
    assert svi.mode == "eager"


def test_keyword_arguments_and_structures() -> None:
    def model(data: dict[str, Tensor], *, weight: Tensor, name: str) -> None:
        logistic(data["x"], data["y"])
        pyro.factor(name, -weight * data["x"].square().mean())

    def guide(*args: Any, **kwargs: Any) -> None:
        hand_guide()

    svi = plain(model, guide, adam(lr=1e-9), Trace_ELBO())
    data = {"x": TABLE[:5], "y": LABELS[:5]}
    for w in (1.0, 2.0, 3.0):
        svi.step(data, weight=torch.tensor(w), name="term")
    assert svi.mode == "traced"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = svi.step(data, weight=torch.tensor(50.0), name="term")
        torch.manual_seed(1)
        assert ours == pytest.approx(
            Trace_ELBO().loss(model, guide, data, weight=torch.tensor(50.0), name="term"), rel=1e-6
        )


def test_gradient_hooks_go_on_as_pyro() -> None:
    svi = plain(logistic, hand_guide, adam(), Trace_ELBO())
    svi.step(TABLE[:5], LABELS[:5])
    seen: list[Tensor] = []
    pyro.param("loc").unconstrained().register_hook(seen.append)
    with pytest.warns(UserWarning, match="'loc' has a hook on its gradient"):
        svi.step(TABLE[:5], LABELS[:5])
    assert len(seen) == 1


def test_compile_takes_three_values() -> None:
    with pytest.raises(ValueError, match='compile=True, False or "auto"'):
        CompiledSVI(schools, z_guide, adam(), Trace_ELBO(), compile="yes")  # type: ignore[arg-type]


def test_no_compiler_leaves_it_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowpath.svi import compiled

    monkeypatch.setattr(compiled, "has_compiler", lambda device: False)
    svi = CompiledSVI(logistic, hand_guide, adam(), Trace_ELBO(), compile=True)
    svi.step(TABLE[:5], LABELS[:5])
    with pytest.warns(UserWarning, match=r"runs traced, not compiled: there is no compiler \(g\+\+ or clang\+\+\)"):
        svi.step(TABLE[:5], LABELS[:5])
    assert svi.mode == "traced"


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_are_pyros() -> None:
    losses, params, _ = fitted(SVI, "constrained parameters")
    ours, our_params, svi = fitted(lambda *parts: CompiledSVI(*parts, compile=True), "constrained parameters")
    assert svi.mode == "compiled"
    assert ours == pytest.approx(losses, rel=1e-9)
    for name, p in params.items():
        torch.testing.assert_close(our_params[name], p, rtol=1e-7, atol=1e-9, msg=name)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["traced", "compiled"])
def test_steps_on_a_gpu_are_pyros(compile: bool) -> None:
    torch.set_default_dtype(torch.float32)
    x, y = TABLE[:5].float().cuda(), LABELS[:5].float().cuda()
    torch.set_default_device("cuda")
    try:
        found = []
        for make in (SVI, lambda *parts: CompiledSVI(*parts, compile=compile)):
            pyro.clear_param_store()
            torch.manual_seed(7)
            svi = make(logistic, hand_guide, adam(), vectorised(Trace_ELBO)())
            found.append([svi.step(x, y) for _ in range(6)])
    finally:
        torch.set_default_device(None)
    assert svi.mode == ("compiled" if compile else "traced")
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_vanishing_gradient_is_no_difference(pyro_store: None) -> None:
    """Where the guide is the posterior the path gradient is rounding, and rounding differs: no reason to fall back."""
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu.sum(-1, keepdim=True).expand(*mu.shape[:-1], 3), 1.0).to_event(1), obs=y)

    guide = fp.svi.AutoFlow(model, transforms=1, hidden_features=(4,)).locate(y)
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True, estimator=fp.Pathwise(0.0))
    svi = fp.svi.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 1e-12}), elbo, compile=False)
    losses = [svi.step(y) for _ in range(6)]  # a warning, which a test takes for an error, would say that it fell back
    assert max(losses) - min(losses) < 1e-6
