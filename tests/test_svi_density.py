"""ModelDensity: the unconstrained log density of a Pyro model, by hand, as Pyro's NUTS has it, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from registry import normal
from torch import Tensor
from torch.distributions import biject_to

import flowpath as fp
from flowpath.svi import ModelDensity, ModelError
from flowpath.svi.handlers import First
from flowpath.svi.promotion import promoted

Y = normal(7) + 0.5
Model = Callable[..., Any]


def num(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- one site at a time, and together ----------------------------------------------------------------------------


def observed(mean: Tensor, scale: Tensor | float = 1.0) -> None:
    """Seven observations about a number."""
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=Y)


def real() -> None:
    observed(pyro.sample("x", dist.Normal(num(1.0), 2.0)))


def positive() -> None:
    observed(pyro.sample("x", dist.Gamma(num(2.0), 1.5)))


def interval() -> None:
    observed(pyro.sample("x", dist.Uniform(num(-1.0), 3.0)))


def simplex() -> None:
    observed(pyro.sample("x", dist.Dirichlet(num(1.5).expand(3)))[..., 0])


def ordered() -> None:
    flat = dist.Normal(num(0.0), 1.0).expand([3]).to_event(1)
    x = pyro.sample("x", dist.TransformedDistribution(flat, dist.transforms.OrderedTransform()))
    observed(x[..., 1])


def correlation() -> None:
    x = pyro.sample("x", dist.LKJCholesky(3, num(2.0)))
    pyro.factor("f", -x[..., 2, 0].square())


def dependent() -> None:
    a = pyro.sample("a", dist.Uniform(num(0.0), 1.0))
    observed(pyro.sample("b", dist.Uniform(num(0.0), 1.0 - a)))


def flat(y: Tensor) -> None:
    """A flat prior has no dtype of its own and takes that of an argument."""
    del y
    observed(pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ())))


def vector() -> None:
    x = pyro.sample("x", dist.Normal(num(0.0), 1.0).expand([7]).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=Y)


def nested() -> None:
    mean = pyro.sample("mean", dist.Normal(num(0.0), 1.0))
    columns, rows = pyro.plate("columns", 3, dim=-2), pyro.plate("rows", 7, dim=-1)
    with columns:
        scale = pyro.sample("scale", dist.LogNormal(num(0.0), 0.5))
    with rows:
        shift = pyro.sample("shift", dist.Normal(num(0.0), 1.0))
    with columns, rows:
        z = pyro.sample("z", dist.Normal(mean + shift, scale))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y.expand(3, 7))


def handled() -> None:
    x = pyro.sample("x", dist.Normal(num(0.0), 1.0))
    with pyro.plate("rows", 7), poutine.scale(scale=0.5), poutine.mask(mask=Y > 0.0):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)
    pyro.factor("f", -0.3 * x.square())


MODELS: dict[str, Model] = {
    f.__name__: f
    for f in (real, positive, interval, simplex, ordered, correlation, dependent, flat, vector, nested, handled)
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
# Pyro's NUTS keeps the support of its first trace, cannot sample a flat prior, and needs no room for particles.
to_pyro = pytest.mark.parametrize("model", [MODELS[n] for n in MODELS if n not in ("dependent", "flat")])


def seen(model: Model) -> ModelDensity:
    return ModelDensity(model, (Y,) if model is flat else ())


def points(density: ModelDensity, n: int = 4) -> Tensor:
    return 0.7 * normal(n, density.dim, seed=4)


def by_hand(model: Model, density: ModelDensity, u: Tensor) -> Tensor:
    """Place each latent by the transform of its support, run the model, sum log densities and ladjs."""
    values, total = {}, num(0.0)
    for name, site in density.sites.items():
        fn = first_look(poutine.trace(poutine.condition(model, data=values)), density, name)
        to = biject_to(fn.support)
        free = u[site.start : site.stop].reshape(site.free_shape)
        values[name] = to(free)
        total = total + to.log_abs_det_jacobian(free, values[name]).sum()
    return total + poutine.trace(poutine.condition(model, data=values)).get_trace(*density.args).log_prob_sum()


def first_look(trace: Any, density: ModelDensity, name: str) -> Any:
    """The distribution of a site, in a run whose later latents are anything."""
    with First(torch.float64):
        return trace.get_trace(*density.args).nodes[name]["fn"]


@each_model
def test_density_is_the_formula(model: Model) -> None:
    density = seen(model)
    u = points(density)
    assert density.mode == "plate" and density.notes == []
    want = torch.stack([by_hand(model, density, row) for row in u])
    assert torch.allclose(density(u), want, atol=1e-10)
    assert torch.allclose(torch.stack([density.direct(row) for row in u]), want, atol=1e-10)


@to_pyro
def test_density_is_that_of_pyros_nuts(model: Model) -> None:
    density = seen(model)
    _, potential, transforms, _ = initialize_model(model)
    for row in points(density):
        values = density.values(row[None])
        z = {n: (transforms[n](v[0]) if n in transforms else v[0]) for n, v in values.items()}
        assert torch.allclose(-potential(z), density(row[None])[0], atol=1e-10)


@each_model
def test_gradient_is_that_of_the_density(model: Model) -> None:
    density = seen(model)
    u = points(density, 2)
    value, slope = density.value_and_grad(u)
    step = 1e-6 * torch.eye(density.dim, dtype=u.dtype)
    finite = (density(u[0] + step) - density(u[0] - step)) / 2e-6
    assert torch.equal(value, density(u)) and torch.allclose(slope[0], finite, atol=1e-5)


@each_model
def test_values_and_points_go_both_ways(model: Model) -> None:
    density = seen(model)
    u = points(density)
    values = density.values(u)
    assert {n: v.shape[1:] for n, v in values.items()} == {n: s.shape for n, s in density.sites.items()}
    for i, row in enumerate(u):
        assert torch.allclose(density.pack({n: v[i] for n, v in values.items()}), row, atol=1e-8)


def test_dependent_support_is_followed() -> None:
    density = ModelDensity(dependent)
    values = density.values(3.0 * normal(100, 2))
    assert bool((values["a"] + values["b"] < 1.0).all()) and float(values["b"].max()) > 0.6


def test_pack_names_what_is_wrong() -> None:
    density = ModelDensity(nested)
    values = {n: v[0] for n, v in density.values(points(density)).items()}
    with pytest.raises(ValueError, match="every latent, 'shift' lacks one"):
        density.pack({n: v for n, v in values.items() if n != "shift"})
    with pytest.raises(ValueError, match=r"latent 'mean' of shape \(\), got \(2,\)"):
        density.pack(values | {"mean": torch.zeros(2)})


# --- discrete sites ----------------------------------------------------------------------------------------------


def mixture(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(num(2.0), 2.0))
    with pyro.plate("parts", 2):
        mean = pyro.sample("mean", dist.Normal(num(0.0), 3.0))
    with pyro.plate("rows", len(y)):
        which = pyro.sample("which", dist.Bernoulli(share)).long()
        chosen = torch.where(which == 1, mean[..., 1:2], mean[..., 0:1])
        pyro.sample("y", dist.Normal(chosen, 1.0), obs=y)


def test_discrete_sites_are_summed_out() -> None:
    density = ModelDensity(mixture, (Y,))
    assert density.discrete == ["which"] and set(density.sites) == {"share", "mean"} and density.mode == "plate"
    u = points(density)
    values = density.values(u)
    share, mean = values["share"], values["mean"]
    logs = torch.stack([share.log(), (1 - share).log()], -1).unsqueeze(1)
    each = torch.stack([dist.Normal(mean[:, i, None], 1.0).log_prob(Y) for i in (1, 0)], -1)
    likelihood = torch.logsumexp(logs + each, -1).sum(1)
    prior = dist.Beta(num(2.0), 2.0).log_prob(share) + dist.Normal(num(0.0), 3.0).log_prob(mean).sum(1)
    ladj = (share * (1 - share)).log()
    assert torch.allclose(density(u), likelihood + prior + ladj, atol=1e-10)


def test_summed_out_density_is_that_of_pyros_nuts() -> None:
    density = ModelDensity(mixture, (Y,))
    _, potential, transforms, _ = initialize_model(config_enumerate(mixture, "parallel"), (Y,), max_plate_nesting=1)
    for row in points(density):
        z = {n: (transforms[n](v[0]) if n in transforms else v[0]) for n, v in density.values(row[None]).items()}
        assert torch.allclose(-potential(z), density(row[None])[0], atol=1e-10)


def counts() -> None:
    pyro.sample("x", dist.Normal(num(0.0), 1.0))
    pyro.sample("count", dist.Poisson(num(3.0)))


def nothing() -> None:
    pyro.sample("y", dist.Normal(num(0.0), 1.0), obs=num(1.0))


def test_what_cannot_be_summed_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'count' is discrete .Poisson. and cannot be enumerated; marginalise it"):
        ModelDensity(counts)
    with pytest.raises(ModelError, match="no continuous latent"):
        ModelDensity(nothing)


# --- models that do not broadcast --------------------------------------------------------------------------------


def scalar_minded() -> None:
    """Writes its mean row by row with indices from the left, which a plate of points on the left upsets."""
    x = pyro.sample("x", dist.Normal(num(0.0), 1.0).expand([2]).to_event(1))
    mean = torch.stack([x[0] * i + x[1] for i in range(7)])
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=Y)


def branching() -> None:
    x = pyro.sample("x", dist.Normal(num(0.0), 1.0))
    scale = 1.0 if float(x) > 0.1 else 2.0
    pyro.sample("y", dist.Normal(x, scale), obs=num(0.3))


def test_a_model_that_does_not_broadcast_runs_under_vmap() -> None:
    density = ModelDensity(scalar_minded)
    u = points(density)
    assert density.mode == "vmap" and density.notes == []
    assert torch.allclose(density(u), torch.stack([by_hand(scalar_minded, density, row) for row in u]), atol=1e-10)
    assert density.values(u)["x"].shape == (4, 2)
    assert torch.allclose(density.value_and_grad(u)[1].sum(), torch.func.grad(lambda v: density(v).sum())(u).sum())


def test_control_flow_on_a_latent_runs_in_a_loop() -> None:
    density = ModelDensity(branching)
    u = torch.tensor([[-1.0], [0.5], [2.0]]).double()
    assert density.mode == "loop" and "one point at a time" in density.notes[0]
    assert torch.allclose(density(u), torch.stack([by_hand(branching, density, row) for row in u]), atol=1e-10)


def test_latents_that_come_and_go_are_refused_by_name() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(num(-9.0), 1.0))
        if float(x) > 0.0:
            pyro.sample("extra", dist.Normal(x, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=num(0.3))

    density = ModelDensity(model)
    with pytest.raises(ModelError, match="latent site 'extra' comes and goes with the values of others"):
        density(torch.tensor([[1.0]]).double())


# --- subsampling -------------------------------------------------------------------------------------------------


def subsampling(x: Tensor, y: Tensor, shown: int | None = 3) -> None:
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0))
    noise = pyro.sample("noise", dist.LogNormal(num(0.0), 1.0))
    with pyro.plate("rows", len(x), subsample_size=shown) as rows:
        mean = slope * x[rows]
        pyro.sample("y", dist.Normal(mean, noise), obs=y[rows])


def looping(x: Tensor, y: Tensor, shown: int | None = 3) -> None:
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0))
    for i in pyro.plate("rows", len(x), subsample_size=shown):
        pyro.sample(f"y_{i}", dist.Normal(slope * x[i], 1.0), obs=y[i])


def indexed(x: Tensor, y: Tensor, chosen: Tensor | None) -> None:
    """The caller says which rows."""
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0))
    with pyro.plate("rows", len(x), subsample=chosen) as rows:
        pyro.sample("y", dist.Normal(slope * x[rows], 1.0), obs=y[rows])


def by_vmap(x: Tensor, y: Tensor, shown: int | None = 3) -> None:
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0).expand([1]).to_event(1))[0]
    with pyro.plate("rows", len(x), subsample_size=shown) as rows:
        pyro.sample("y", dist.Normal(slope * x[rows], 1.0), obs=y[rows])


X = normal(7, seed=1)


@pytest.mark.parametrize("shown", [1, 3, 5, 6])
@pytest.mark.parametrize("model", [subsampling, looping, by_vmap])
def test_all_rows_in_blocks_are_the_full_model(model: Model, shown: int) -> None:
    """Seven rows: with 3, 5 and 6 the last block is short, so it overlaps the one before."""
    density, full = ModelDensity(model, (X, Y, shown)), ModelDensity(model, (X, Y, None))
    u = points(full)
    assert list(density.subsampled) == ["rows"] and not full.subsampled
    assert torch.allclose(density.of_all_data()(u), full(u), atol=1e-10)


def test_all_rows_where_the_caller_chooses_them() -> None:
    density, full = ModelDensity(indexed, (X, Y, torch.tensor([5, 2]))), ModelDensity(indexed, (X, Y, torch.arange(7)))
    assert torch.allclose(density.of_all_data()(points(full)), full(points(full)), atol=1e-10)


def test_a_minibatch_is_an_unbiased_estimate() -> None:
    density = ModelDensity(subsampling, (X, Y, 6))
    u = points(density, 1).expand(800, -1)
    each = torch.stack([density(u[:1])[0] for _ in range(800)])
    assert float(each.mean()) == pytest.approx(float(density.of_all_data()(u[:1])), abs=4 * float(each.std()) / 28)


def minibatch(x: Tensor, y: Tensor, size: int) -> None:
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0))
    with pyro.plate("rows", size, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def two_plates(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(num(0.0), 1.0))
    for name in ("one", "two"):
        with pyro.plate(name, len(x), subsample_size=2) as rows:
            pyro.sample(f"y_{name}", dist.Normal(slope * x[rows], 1.0), obs=y[rows])


def test_a_minibatch_of_its_own_has_no_full_density() -> None:
    density = ModelDensity(minibatch, (X, Y, 100))
    with pytest.raises(ModelError, match="given a minibatch of plate 'rows' instead of taking its rows by the plate's"):
        density.of_all_data()
    with pytest.raises(ModelError, match="several plates subsample .one, two."):
        ModelDensity(two_plates, (X, Y)).of_all_data()


def local(y: Tensor) -> None:
    with pyro.plate("rows", len(y), subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(num(0.0), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def summed_and_subsampled(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(num(1.0), 1.0))
    with pyro.plate("rows", len(y), subsample_size=2) as rows:
        which = pyro.sample("which", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(which, 1.0), obs=y[rows])


def test_local_latents_of_a_minibatch_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'z' lies in plate 'rows', which subsamples.*AmortizedFlow"):
        ModelDensity(local, (Y,))
    with pytest.raises(ModelError, match="'which' is discrete and plate 'rows' subsamples"):
        ModelDensity(summed_and_subsampled, (Y,))


# --- dtype, device, and what is left as it was -------------------------------------------------------------------


def plain(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def flat_regression(y: Tensor) -> None:
    """Flat priors have no dtype; the design matrix is the model's own."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (2,)).to_event(0))
    design = torch.stack([X, torch.ones_like(X)], -1)
    pyro.sample("y", dist.Normal((design @ beta.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1), obs=y)


def with_an_eye(y: Tensor) -> None:
    """Makes tensors of the default dtype at every call."""
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("y", dist.Normal((x @ torch.ones(2, 2)).sum(-1), 1.0), obs=y[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_data(dtype: torch.dtype) -> None:
    density = ModelDensity(plain, (Y.to(dtype),))
    assert density.dtype == density.start.dtype == density(points(density).to(dtype)).dtype == dtype


def test_flat_priors_take_the_dtype_that_the_model_needs() -> None:
    assert ModelDensity(flat_regression, (Y,)).dtype == torch.float64
    assert ModelDensity(flat_regression, (Y.float(),)).dtype == torch.float64


@pytest.mark.parametrize("model", [plain, with_an_eye])
def test_promoted_is_the_same_in_float64(model: Model) -> None:
    density = ModelDensity(model, (Y.float(),))
    wide = promoted(density)
    u = points(density)
    assert wide.dtype == torch.float64 and wide.asked == torch.float32
    assert wide(u).dtype == torch.float64
    assert torch.allclose(wide(u).float(), density(u.float()), rtol=1e-4)
    assert promoted(wide) is wide


def test_a_model_of_its_own_dtype_is_not_promoted() -> None:
    layer = torch.nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(layer(x).squeeze(-1), 1.0), obs=y[0])

    density = ModelDensity(model, (Y.float(),))
    assert promoted(density) is density


def test_mixed_devices_are_named() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        raise RuntimeError("Expected all tensors to be on the same device, cpu and cuda:0")

    with pytest.raises(ModelError, match="mixes devices after site 'y': its sites are on .'x': 'cpu', 'y': 'cpu'."):
        ModelDensity(model, (Y,))


def test_observations_are_validated_once_when_asked() -> None:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(num(1.0), 1.0))
        pyro.sample("y", dist.Bernoulli(p), obs=num(0.5))

    with pytest.raises(ValueError, match="observation at site .y. has 1 values outside the support of its Bernoulli"):
        ModelDensity(model, checked=True)


def test_a_model_that_fails_at_its_priors_draws_is_looked_at_in_the_middle() -> None:
    """As a Cholesky factor does for extreme length scales."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(num(40.0), 1.0))
        matrix = torch.stack([torch.stack([num(1.0) + 0 * x, x / 10], -1), torch.stack([x / 10, 1.0 + 0 * x], -1)], -1)
        torch.linalg.cholesky(matrix)
        pyro.sample("y", dist.Normal(x, 1.0), obs=num(0.5))

    assert torch.equal(ModelDensity(model).start, torch.zeros(1).double())


def test_a_models_own_error_is_raised() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(num(0.0), 1.0))
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        ModelDensity(model)


def test_nothing_global_moves() -> None:
    """The fixture of every test watches dtype, validation, the stack and the store; here also the generator."""
    density = ModelDensity(plain, (Y,))
    before = torch.get_rng_state()
    u = points(density)
    density(u)
    density.value_and_grad(u)
    density.values(u)
    assert torch.equal(before, torch.get_rng_state())
    assert math.isfinite(float(density(u).sum())) and fp.svi.ModelDensity is ModelDensity
