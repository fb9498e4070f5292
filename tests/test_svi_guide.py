"""AutoFlow: what an autoguide must do, and what Pyro's flow guides get wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import NeuTraReparam
from registry import ARCHITECTURES, normal, roughen, small_flow
from torch import Tensor
from torch.distributions import constraints

import flowpath as fp

pytestmark = pytest.mark.usefixtures("pyro_store")

Y = normal(8) + 2.0
TINY: dict[str, Any] = {"transforms": 2, "hidden_features": (8,)}
AutoFlow = partial(fp.svi.AutoFlow, **TINY)


def schools(y: Tensor = Y) -> None:
    """A real, a positive, a simplex and a plate of locals."""
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 2.0))
    p = pyro.sample("p", dist.Dirichlet(y.new_ones(3)))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + p[..., 0], 1.0), obs=y)


def shifted() -> None:
    pyro.sample("z", dist.Normal(torch.tensor([1000.0, -3.0]).double(), 1.0).to_event(1))


def ready(model: Callable = schools, seed: int = 5, **options: Any) -> fp.svi.AutoFlow:
    """A guide with parameters moved away from their start."""
    guide = AutoFlow(model, **options).setup()
    return roughen(guide, 0.2, seed)  # type: ignore[return-value]


# --- the untrained guide -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_untrained_guide_is_a_gaussian_at_init_loc(name: str) -> None:
    options = {} if name == "gaussian" else TINY
    guide = fp.svi.AutoFlow(
        shifted,
        name,
        init_loc_fn=init_to_value(values={"z": torch.tensor([3.0, 4.0]).double()}),
        init_scale=0.5,
        **options,
    ).setup()
    z = guide.get_posterior().sample((4000,))
    want = dist.Normal(torch.tensor([3.0, 4.0]).double(), 0.5).to_event(1)
    assert torch.allclose(guide.get_posterior().log_prob(z), want.log_prob(z), atol=1e-6)
    assert torch.allclose(z.mean(0), want.mean, atol=0.05) and torch.allclose(z.std(0), want.stddev, atol=0.05)


def test_default_start_is_the_prior_median() -> None:
    guide = AutoFlow(shifted, init_scale=0.01).setup()
    assert abs(float(guide.median()["z"][0]) - 1000.0) < 2.0


@pytest.mark.parametrize("latents", [1, 2, 40])
def test_any_number_of_latents(latents: int) -> None:
    guide = AutoFlow(lambda: pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1)))
    SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=4)).step()
    assert guide.latent_dim == latents and guide.flow is not None
    assert isinstance(guide.flow.transform.transforms[0], fp.TriangularAffine)  # type: ignore[index]


def test_two_thousand_latents() -> None:
    """Above 256 the affine layer is diagonal plus low rank; the guide stays small."""
    guide = AutoFlow(lambda: pyro.sample("z", dist.Normal(torch.zeros(2000), 1.0).to_event(1)), init_scale=0.3)
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    losses = [SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step() for _ in range(3)]
    assert isinstance(guide.flow.transform.transforms[0], fp.LowRankAffine)  # type: ignore[union-attr, index]
    assert sum(p.numel() for p in guide.parameters()) < 250_000 and losses[-1] < losses[0]


def test_rank_may_be_asked_for() -> None:
    guide = AutoFlow(schools, rank=3).setup()
    affine = guide.flow.transform.transforms[0]  # type: ignore[union-attr, index]
    assert isinstance(affine, fp.LowRankAffine) and affine.stretch.shape == (12, 3)


def test_flow_may_be_a_function() -> None:
    asked: list[tuple[int, int]] = []

    def recipe(features: int, context: int) -> fp.Flow:
        asked.append((features, context))
        return fp.Flow(fp.LU(features), fp.StudentT(features, df=5.0))

    guide = fp.svi.AutoFlow(shifted, recipe).setup()
    assert asked == [(2, 0)] and guide.sample(5)["z"].shape == (5, 2)
    z = guide.get_transform()(guide.get_base_dist().sample((4,)))
    assert torch.isfinite(guide.get_posterior().log_prob(z)).all()


# --- the first look ----------------------------------------------------------------------------------------------


def test_parameters_exist_after_setup() -> None:
    guide = AutoFlow(schools)
    assert list(guide.parameters()) == [] and guide.setup() is guide
    assert len(list(guide.parameters())) > 4 and len(pyro.get_param_store()) == 0
    assert all(type(p) is torch.nn.Parameter for p in guide.parameters())
    before = [id(p) for p in guide.parameters()]
    guide()
    guide.setup()
    assert [id(p) for p in guide.parameters()] == before


def test_use_before_the_first_look_says_so() -> None:
    for use in (lambda g: g.median(), lambda g: g.get_posterior(), lambda g: g.log_prob({})):
        with pytest.raises(ValueError, match="call guide.setup"):
            use(AutoFlow(schools))


@pytest.mark.parametrize("with_args", [True, False], ids=["args", "closure"])
def test_flat_priors_are_initialised(with_args: bool) -> None:
    """Pyro's init functions fail there with NotImplementedError."""
    x = normal(20, 3)

    def model(x: Tensor = x) -> None:
        zero = pyro.sample("free", dist.ImproperUniform(constraints.real, (), (3,)))
        s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x.to(zero) * zero.unsqueeze(-2)).sum(-1), s.unsqueeze(-1)), obs=x[:, 0])

    guide = AutoFlow(model, init_scale=0.01).setup(*([x] if with_args else []))
    median = guide.median()
    assert median["free"].dtype == torch.float64
    assert torch.allclose(median["free"], torch.zeros(3).double(), atol=0.01)
    assert float(median["s"]) == pytest.approx(1.0, abs=0.01)


def garch() -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
    pyro.sample("y", dist.Normal(c, 1.0), obs=torch.tensor(0.0))


def test_moving_support_is_named() -> None:
    with pytest.raises(ValueError, match="support of latent 'b' depends on 'a';"):
        AutoFlow(garch).setup()


def test_sites_that_come_and_go_are_named() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1e-3))
        if a > 0.5:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent 'b' comes and goes"):
        AutoFlow(model).setup()


def test_subsampled_locals_are_refused() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match=r"'z' is local to plate 'rows'.*AmortizedFlow"):
        AutoFlow(model).setup(Y.float())


def test_subsampled_data_are_fine() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    guide = AutoFlow(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=2)).step(Y.float())
    assert guide.latent_dim == 1


def test_discrete_latents_are_refused() -> None:
    def model() -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'k'"):
        AutoFlow(model).setup()


def test_no_latents_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no latent variables"):
        AutoFlow(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))).setup()


REFUSED: dict[str, tuple[Callable[[], Any], type, str]] = {
    "unknown name": (lambda: fp.svi.AutoFlow(schools, "glow"), ValueError, "an architecture of gaussian"),
    "a flow": (lambda: fp.svi.AutoFlow(schools, small_flow("nsf", 12)), TypeError, "a function"),
    "whiten": (lambda: fp.svi.AutoFlow(schools, whiten="full"), ValueError, "drop whiten="),
    "init_scale": (lambda: fp.svi.AutoFlow(schools, init_scale=0.0), ValueError, "init_scale > 0"),
    "rank": (lambda: fp.svi.AutoFlow(schools, rank=0), ValueError, "rank"),
    "model": (lambda: fp.svi.AutoFlow(None), TypeError, "expects a Pyro model"),  # type: ignore[arg-type]
    "option": (lambda: fp.svi.AutoFlow(schools, depth=3).setup(), TypeError, "depth"),
    "options of a function": (lambda: fp.svi.AutoFlow(schools, fp.nsf, bins=3), TypeError, "bins"),
    "whitened function": (lambda: fp.svi.AutoFlow(schools, fp.nsf).setup(), ValueError, "Whiten"),
    "narrow function": (
        lambda: fp.svi.AutoFlow(schools, lambda d, c: fp.Flow(fp.LU(2), fp.StandardNormal(2))).setup(),
        ValueError,
        "a Flow of 12 features",
    ),
    "no rsample": (
        lambda: fp.svi.AutoFlow(schools, lambda d, c: fp.Flow(fp.LU(d), fp.NormalMixture(d, 2))).setup(),
        ValueError,
        "NormalMixture has none",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(make: Callable, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# --- dtype and device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_follows_the_model(dtype: torch.dtype) -> None:
    guide = AutoFlow(schools).setup(Y.to(dtype))
    assert {p.dtype for p in guide.parameters()} == {dtype} and guide.sample()["theta"].dtype == dtype


def test_dtype_follows_the_data_where_priors_are_python_numbers() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([8]).to_event(1), obs=y)

    assert AutoFlow(model).setup(Y).median()["mu"].dtype == torch.float64


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["double", "float"])
def test_conversion(when: str, name: str) -> None:
    want = torch.float64 if name == "double" else torch.float32
    model = partial(schools, Y.to(torch.float32 if name == "double" else torch.float64))
    guide = AutoFlow(model)
    guide = getattr(guide, name)().setup() if when == "before" else getattr(guide.setup(), name)()
    assert {p.dtype for p in guide.parameters()} == {want}
    z = guide.get_posterior().rsample((3,))
    assert z.dtype == want and guide()["mu"].dtype == want


def test_device_before_the_first_look() -> None:
    guide = AutoFlow(schools).to("meta")
    assert guide._asked(torch.float32, torch.device("cpu")) == (torch.float32, torch.device("meta"))


# --- densities ---------------------------------------------------------------------------------------------------


def test_log_prob_of_a_constrained_point() -> None:
    """Against the trace of the guide: the joint latent's density and the Delta sites' volume."""
    guide = ready()
    trace = poutine.trace(guide).get_trace()
    values = {n: s["value"] for n, s in trace.iter_stochastic_nodes() if n in ("mu", "tau", "p", "theta")}
    assert float(guide.log_prob(values).detach()) == pytest.approx(float(trace.log_prob_sum().detach()), abs=1e-8)


def test_log_prob_of_many_points() -> None:
    guide = ready()
    values = guide.sample(6)
    many = {n: v.reshape(2, 3, *v.shape[1:]) for n, v in values.items()}
    assert guide.log_prob(many).shape == (2, 3)
    one = [guide.log_prob({n: v[i] for n, v in values.items()}) for i in range(6)]
    assert torch.allclose(guide.log_prob(many).flatten(), torch.stack(one), atol=1e-9)


def test_log_prob_integrates_to_one() -> None:
    """A density in the constrained space: by quadrature over a positive latent."""
    guide = ready(lambda: pyro.sample("s", dist.HalfNormal(torch.tensor(1.0).double())))
    s = torch.linspace(1e-6, 60.0, 400_001, dtype=torch.float64)
    assert torch.trapezoid(guide.log_prob({"s": s}).exp(), s).item() == pytest.approx(1.0, abs=1e-4)


def test_log_prob_says_what_is_wrong() -> None:
    guide = ready()
    with pytest.raises(ValueError, match="'mu' is missing"):
        guide.log_prob({})
    with pytest.raises(ValueError, match=r"'theta' as \(\*batch, 8\)"):
        guide.log_prob(guide.sample() | {"theta": torch.zeros(3)})


def test_base_and_transform_make_the_posterior() -> None:
    guide = ready()
    z = guide.get_base_dist().sample((7,))
    u = guide.get_transform()(z)
    want = dist.TransformedDistribution(guide.get_base_dist(), guide.get_transform()).log_prob(u)
    assert torch.allclose(guide.get_posterior().log_prob(u), want, atol=1e-8)


def test_median_and_quantiles() -> None:
    guide = fp.svi.AutoFlow(schools, "gaussian").setup()
    roughen(guide, 0.3)
    affine = guide.flow.transform.transforms[0]  # type: ignore[union-attr, index]
    loc = affine.numbers[:1].detach()
    q = guide.quantiles([0.05, 0.5, 0.95])
    assert q["theta"].shape == (3, 8) and q["p"].shape == (3, 3) and q["mu"].shape == (3,)
    assert torch.allclose(guide.median()["mu"], loc, atol=0.05)
    assert bool((q["tau"][0] < q["tau"][1]).all() and (q["tau"][1] < q["tau"][2]).all())
    draws = guide.sample(20_000)
    assert torch.allclose(torch.quantile(draws["tau"], 0.95), q["tau"][2], rtol=0.1)


def test_samples_lie_in_their_supports() -> None:
    draws = ready().sample(50)
    assert torch.allclose(draws["p"].sum(-1), torch.ones(50).double()) and bool((draws["tau"] > 0).all())
    assert not draws["tau"].requires_grad


def test_one_pass_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = AutoFlow(schools, "iaf").setup()
    calls: list[int] = []
    for m in guide.modules():
        if isinstance(m, fp.MaskedMLP):
            m.register_forward_hook(lambda *_: calls.append(1))
    for estimator in (fp.Pathwise(1.0), fp.Pathwise(0.0)):
        calls.clear()
        elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1, estimator=estimator)
        elbo.loss_and_grads(schools, guide)
        assert len(calls) == 2


# --- saving, copying, living together ------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "set up"])
def test_state_dict_loads(fresh: bool) -> None:
    guide = ready()
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other = AutoFlow(schools) if fresh else AutoFlow(schools).setup()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = normal(5, guide.latent_dim)
    assert other.flow is not None and guide.flow is not None
    assert torch.equal(other.flow.log_prob(x), guide.flow.log_prob(x))
    other()
    assert torch.equal(other.flow.log_prob(x), guide.flow.log_prob(x))


def test_state_dict_of_a_function_wants_setup() -> None:
    def recipe(features: int, context: int) -> fp.Flow:
        return small_flow("nsf", features, whiten="none")

    guide = fp.svi.AutoFlow(schools, recipe).setup()
    fresh = fp.svi.AutoFlow(schools, recipe)
    with pytest.raises(ValueError, match="call guide.setup"):
        fresh.load_state_dict(guide.state_dict())
    fresh.setup().load_state_dict(guide.state_dict())


def test_state_dict_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="got a state_dict of"):
        AutoFlow(shifted).setup().load_state_dict(AutoFlow(schools).setup().state_dict())
    with pytest.raises(ValueError, match="holds a flow of 12 latents, this model has 2"):
        loaded = AutoFlow(shifted)
        loaded.load_state_dict(AutoFlow(schools).setup().state_dict())
        loaded()


def test_empty_state_dict_of_a_guide_that_has_seen_nothing() -> None:
    other = AutoFlow(schools)
    other.load_state_dict(AutoFlow(schools).state_dict())
    assert other.flow is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_leave_the_live_guide_whole(way: str) -> None:
    guide = AutoFlow(schools)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    if way == "deepcopy":
        other = copy.deepcopy(guide)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(guide))
    else:
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert guide.model is not None
    start = {n: p.detach().clone() for n, p in guide.named_parameters()}
    assert all(torch.equal(p, start[n]) for n, p in other.named_parameters())
    x = normal(5, guide.latent_dim)
    before = other.flow.log_prob(x)
    svi.step()
    assert torch.equal(other.flow.log_prob(x), before)
    assert any(not torch.equal(p, start[n]) for n, p in guide.named_parameters())
    SVI(schools, other, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert any(not torch.equal(p, start[n]) for n, p in other.named_parameters())


def test_copy_before_the_first_look() -> None:
    other = copy.deepcopy(AutoFlow(schools)).setup()
    assert other.latent_dim == 12
    with pytest.raises(ValueError, match="unpickled before it was set up"):
        pickle.loads(pickle.dumps(AutoFlow(schools))).setup()


def test_two_guides_share_nothing() -> None:
    """Same class, same process: Pyro's guides then share parameters by name."""
    one, two = AutoFlow(schools), AutoFlow(schools)
    first = SVI(schools, one, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=2))
    second = SVI(schools, two, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=2))
    first.step()
    kept = [p.detach().clone() for p in one.parameters()]
    start = None
    for _ in range(2):
        second.step()
        start = start or [p.detach().clone() for p in two.parameters()]
    assert all(torch.equal(p, k) for p, k in zip(one.parameters(), kept, strict=True))
    assert any(not torch.equal(p, s) for p, s in zip(two.parameters(), start, strict=True))  # type: ignore[arg-type]


# --- everywhere a guide goes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [Trace_ELBO, fp.svi.PathELBO, fp.svi.PathGraphELBO, pyro.infer.TraceMeanField_ELBO])
def test_svi_learns(elbo: type) -> None:
    """A Gaussian posterior, known in closed form."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(2.0).double())

    guide = AutoFlow(model)
    many = elbo(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.04}), many)
    for _ in range(100):
        svi.step()
    want = 2.0 / 2.25  # E[z_i] = y / (2 + 0.25)
    assert torch.allclose(guide.sample(4000)["z"].mean(0), torch.tensor([want, want]).double(), atol=0.25)


@pytest.mark.parametrize("local", [False, True], ids=["store", "module-local"])
def test_torch_optimiser_by_the_module_form(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        train_by_the_module_form()
    assert (len(pyro.get_param_store()) == 0) == local


def train_by_the_module_form() -> None:
    class Model(pyro.nn.PyroModule):
        def forward(self) -> None:
            schools()

    model = Model()
    guide = AutoFlow(model).setup()
    loss_fn = fp.svi.PathELBO(num_particles=4)(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive(parallel: bool) -> None:
    guide = ready()
    draws = Predictive(schools, guide=guide, num_samples=5, parallel=parallel)()
    assert draws["theta"].shape[0] == 5 and draws["theta"].shape[-1] == 8 and draws["y"].shape[-1] == 8


def test_importance() -> None:
    guide = ready()
    found = Importance(schools, guide=guide, num_samples=20).run()
    assert torch.isfinite(torch.stack(found.log_weights)).all()


def test_neutra() -> None:
    guide = AutoFlow(schools).setup()
    kernel = NUTS(NeuTraReparam(guide).reparam(schools), max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["mu_shared_latent"].shape == (2, 12)


def test_guide_list_with_discrete_latents() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z.sum(-1) + k, 1.0), obs=torch.tensor(1.0))

    guide = AutoGuideList(model)
    guide.append(AutoFlow(poutine.block(model, hide=["k", "y"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(3))


def test_blocked_enumeration() -> None:
    """The guide leaves the discrete site to TraceEnum_ELBO, which sums it out."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(z.sum(-1) + k, 1.0), obs=torch.tensor(1.0))

    guide = AutoFlow(poutine.block(model, hide=["k", "y"]))
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=0, num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit_elbo() -> None:
    guide = AutoFlow(schools).setup()
    kwargs: dict[str, Any] = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = pyro.infer.JitTrace_ELBO(**kwargs, ignore_jit_warnings=True)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(4))


def test_make_fx_traces_a_step() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    guide = AutoFlow(schools).setup()
    params = list(guide.parameters())
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1, estimator=fp.Pathwise(0.0))

    def step(y: Tensor) -> list[Tensor]:
        loss, surrogate = elbo.loss_and_surrogate(schools, guide, y)
        return [loss.detach(), *torch.autograd.grad(surrogate, params)]

    with pyro.validation_enabled(False):
        traced = make_fx(step)(Y)
        found = []
        for run in (traced, step):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                found.append(run(Y + 1.0))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 1], ids=["full rank", "low rank"])
def test_locate_finds_scales_that_svi_cannot_walk_to(rank: int | None, pyro_store: None) -> None:
    """A Gaussian at -60,000 with sds of 10,000 and 0.02: located, the untrained guide is the posterior."""
    loc = torch.tensor([-6e4, 3.0], dtype=torch.float64)
    sd = torch.tensor([1e4, 0.02], dtype=torch.float64)

    def wide() -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (2,)))
        pyro.factor("at", dist.Normal(loc, sd).log_prob(x).sum(-1))

    guide = fp.svi.AutoFlow(wide, rank=rank, transforms=1, hidden_features=(4,)).double().locate()
    draws = guide.sample(4000)["x"]
    assert ((draws.mean(0) - loc).abs() < 0.1 * sd).all() and ((draws.std(0) / sd - 1.0).abs() < 0.1).all()
    loss = fp.svi.PathELBO(num_particles=64, vectorize_particles=True).loss(wide, guide)
    assert abs(loss) < 0.05  # log Z is 0
