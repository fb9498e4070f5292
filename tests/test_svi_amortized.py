"""AmortizedFlow: one conditional flow for the local latents of every row."""

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
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from registry import normal, roughen, small_flow
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import flowpath as fp

pytestmark = pytest.mark.usefixtures("pyro_store")

ROWS, SHOWN = 40, 10
W = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, 0.2]], dtype=torch.float64)
NOISE = 0.6
TINY: dict[str, Any] = {"transforms": 2, "hidden_features": (8,)}


def make_data(rows: int = ROWS) -> Tensor:
    return normal(rows, 2, seed=1) @ W.T + NOISE * normal(rows, 3, seed=2)


X = make_data()


def linear(x: Tensor, shown: int | None = SHOWN) -> None:
    """z ~ N(0, I), x | z ~ N(W z, NOISE^2): the posterior of each row is Gaussian and known."""
    with pyro.plate("rows", len(x), subsample_size=shown) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T.to(x), NOISE).to_event(1), obs=x[i])


def minibatch(x: Tensor, total: int = ROWS) -> None:
    """The other way: the rows shown come in as arguments."""
    with pyro.plate("rows", total, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T.to(x), NOISE).to_event(1), obs=x)


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each row and the covariance they share."""
    precision = torch.eye(2, dtype=torch.float64) + W.T @ W / NOISE**2
    return torch.linalg.solve(precision, (x @ W / NOISE**2).T).T, torch.linalg.inv(precision)


def evidence(x: Tensor) -> float:
    covariance = W @ W.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
    return float(dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x).sum())


def encoder() -> nn.Module:
    return nn.Linear(3, 4).double()


def guide_of(model: Callable = linear, **options: Any) -> fp.svi.AmortizedFlow:
    return fp.svi.AmortizedFlow(model, encoder(), **TINY | options)


# --- the posterior -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["subsample", "minibatch"])
def test_learns_the_posterior_of_every_row(way: str) -> None:
    """The conditional Gaussian inside can be exact: KL near 0 over all rows."""
    model = {"subsample": linear, "minibatch": minibatch}[way]
    guide = fp.svi.AmortizedFlow(model, encoder(), "gaussian", hidden_features=(8,))
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    steps = 150
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.03 ** (1 / steps)}
    )
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(X[torch.randperm(ROWS)[:SHOWN]] if way == "minibatch" else X)
        optimizer.step()
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1).loss(
        partial(linear, shown=None), guide_for_all(guide), X
    )
    assert 0.0 <= (loss + evidence(X)) / ROWS + 0.01 < 0.06
    mean, covariance = posterior(X)
    draws = guide.sample(2000, X)["z"]
    assert float((draws.mean(0) - mean).abs().max()) < 0.35
    assert torch.allclose(draws.std(0).mean(0), covariance.diagonal().sqrt(), rtol=0.15)


def guide_for_all(guide: fp.svi.AmortizedFlow) -> Callable:
    """The trained guide over all rows at once."""

    def run(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", guide.get_posterior(x))

    return run


def test_path_gradient_is_that_of_the_held_noise() -> None:
    """total = path + score for the amortised guide, and no flow scored twice."""
    guide = roughen(guide_of().setup(X), 0.2)
    kwargs: dict[str, Any] = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    grads = []
    for c in (1.0, 0.5, 0.0):
        guide.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            fp.svi.PathELBO(**kwargs, estimator=fp.Pathwise(c)).loss_and_grads(linear, guide, X)
        grads.append(torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None]))
    total, half, path = grads
    assert torch.allclose(half, 0.5 * (total + path), atol=1e-9) and not torch.allclose(total, path, atol=1e-3)


# --- subsampling -------------------------------------------------------------------------------------------------


class Spy(nn.Module):
    """An encoder that notes how many rows it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = encoder(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.net(x)


def test_only_the_rows_shown_are_encoded() -> None:
    spy = Spy()
    guide = fp.svi.AmortizedFlow(linear, spy, **TINY)
    SVI(linear, guide, pyro.optim.Adam({}), fp.svi.PathELBO(num_particles=2)).step(make_data(4000))
    assert set(spy.seen) == {SHOWN}
    assert sum(p.numel() for p in guide.parameters()) == sum(p.numel() for p in guide_of().setup(X).parameters())


def test_guide_and_model_see_the_same_rows() -> None:
    guide = guide_of().setup(X)
    trace = poutine.trace(guide).get_trace(X)
    rows = trace.nodes["rows"]["value"]
    model = poutine.trace(poutine.replay(linear, trace=trace)).get_trace(X)
    assert torch.equal(model.nodes["rows"]["value"], rows) and len(rows) == SHOWN
    latent = trace.nodes["_" + guide._pyro_name + "_latent"]
    assert torch.equal(latent["fn"].context, guide.encoder(X[rows]))
    assert latent["scale"] == ROWS / SHOWN and latent["value"].shape == (SHOWN, 2)


def test_a_short_last_minibatch() -> None:
    guide = guide_of(minibatch)
    svi = SVI(minibatch, guide, pyro.optim.Adam({"lr": 0.01}), fp.svi.PathELBO(num_particles=2))
    for rows in (SHOWN, SHOWN, 3):
        assert torch.isfinite(torch.tensor(svi.step(X[:rows])))


def test_other_data_of_another_size() -> None:
    guide = guide_of(partial(linear, shown=None)).setup(X)
    assert guide(make_data(7))["z"].shape == (7, 2)
    assert guide.get_posterior(make_data(5)).batch_shape == (5,)


@pytest.mark.parametrize("particles", [1, 3])
def test_inner_plates_and_supports(particles: int) -> None:
    """Locals with an inner plate, positive and simplex-valued, packed row by row."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=SHOWN, dim=-2) as i:
            s = pyro.sample("s", dist.HalfNormal(x.new_ones(())))
            p = pyro.sample("p", dist.Dirichlet(x.new_ones(3)))
            with pyro.plate("times", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(p[..., 0], s))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i][..., :1])

    guide = roughen(guide_of(model).setup(X), 0.2)
    assert guide.latent_dim == 1 + 2 + 4
    kwargs: dict[str, Any] = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 2}
    elbo = fp.svi.PathELBO(**kwargs, estimator=fp.Pathwise(0.0))
    assert torch.isfinite(torch.tensor(elbo.loss_and_grads(model, guide, X)))
    trace = poutine.trace(guide).get_trace(X)
    assert trace.nodes["z"]["value"].shape == (SHOWN, 4) and trace.nodes["s"]["value"].shape == (SHOWN, 1)
    assert torch.allclose(trace.nodes["p"]["value"].sum(-1), torch.ones(SHOWN, 1).double())
    u = trace.nodes["_" + guide._pyro_name + "_latent"]["value"][:, 0]
    s, p = trace.nodes["s"]["value"][:, 0], trace.nodes["p"]["value"][:, 0]
    assert torch.allclose(s, u[:, 0].exp())
    trace.compute_log_prob()
    volume = trace.nodes["p"]["unscaled_log_prob"][:, 0]
    want = -biject_to(constraints.simplex).log_abs_det_jacobian(u[:, 1:3], p)
    assert torch.allclose(volume, want) and guide.sample(5, X)["z"].shape == (5, ROWS, 4)


def test_globals_by_a_guide_list() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x), subsample_size=SHOWN) as i:
            z = pyro.sample("z", dist.Normal(mu.unsqueeze(-1) + x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T, NOISE).to_event(1), obs=x[i])

    with pytest.raises(ValueError, match="latent 'mu' is in no plate.*AutoGuideList"):
        guide_of(model).setup(X)
    guide = AutoGuideList(model)
    guide.append(fp.svi.AutoFlow(poutine.block(model, hide=["z", "x", "rows"]), **TINY))
    guide.append(guide_of(poutine.block(model, hide=["mu", "x"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), fp.svi.PathELBO(num_particles=2))
    losses = [svi.step(X) for _ in range(30)]
    assert sum(losses[-10:]) < sum(losses[:10])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_encoder_of_other_rows_is_refused() -> None:
    def model(x: Tensor) -> None:
        linear(X)

    with pytest.raises(ValueError, match=r"\(10, C\), got \(3, 4\)"):
        fp.svi.AmortizedFlow(linear, lambda x: normal(3, 4), **TINY).setup(X)
    with pytest.raises(ValueError, match="got int"):
        fp.svi.AmortizedFlow(linear, lambda x: 3, **TINY).setup(X)  # type: ignore[arg-type, return-value]


REFUSED: dict[str, tuple[Callable[[], Any], type, str]] = {
    "encoder": (lambda: fp.svi.AmortizedFlow(linear, None), TypeError, "an encoder"),  # type: ignore[arg-type]
    "model": (lambda: fp.svi.AmortizedFlow(3, encoder()), TypeError, "a Pyro model"),  # type: ignore[arg-type]
    "flow": (lambda: fp.svi.AmortizedFlow(linear, encoder(), "glow"), ValueError, "an architecture"),
    "init_scale": (lambda: fp.svi.AmortizedFlow(linear, encoder(), init_scale=-1.0), ValueError, "init_scale"),
    "no context": (
        lambda: fp.svi.AmortizedFlow(linear, encoder(), lambda d, c: small_flow("nsf", d, whiten="none")).setup(X),
        ValueError,
        "a Flow of 2 features and a context of 4",
    ),
    "no latents": (
        lambda: guide_of(lambda x: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))).setup(X),
        RuntimeError,
        "no latent variables",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(make: Callable, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_two_outer_plates_are_refused() -> None:
    def model(x: Tensor) -> None:
        for name in ("a", "b"):
            with pyro.plate(f"plate_{name}", 4):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one outermost plate, found plate_a, plate_b"):
        guide_of(model).setup(X)


# --- saving, dtype, prediction -----------------------------------------------------------------------------------


def test_state_dict_loads_into_a_fresh_guide() -> None:
    guide = roughen(guide_of().setup(X), 0.2)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other = guide_of()
    other.load_state_dict(torch.load(file, weights_only=True))
    z = normal(ROWS, 2)
    assert torch.equal(other.get_posterior(X).log_prob(z), guide.get_posterior(X).log_prob(z))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_leave_the_live_guide_whole(way: str) -> None:
    guide = guide_of()
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    other = copy.deepcopy(guide) if way == "deepcopy" else pickle.loads(pickle.dumps(guide))
    kept = other.get_posterior(X).log_prob(normal(ROWS, 2))
    svi.step(X)
    assert torch.equal(other.get_posterior(X).log_prob(normal(ROWS, 2)), kept)
    assert guide.model is not None and other(X)["z"].shape == (SHOWN, 2)


def test_dtype_follows_the_model_and_conversion() -> None:
    net = encoder().float()
    assert fp.svi.AmortizedFlow(linear, net, **TINY).setup(X.float())(X.float())["z"].dtype == torch.float32
    guide = fp.svi.AmortizedFlow(linear, encoder().float(), **TINY).double().setup(X)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


def test_predictive() -> None:
    guide = guide_of().setup(X)
    found = Predictive(linear, guide=guide, num_samples=3, parallel=True)(X)
    assert found["z"].shape == (3, SHOWN, 2)


def test_decoder_is_trained_with_it() -> None:
    """A variational autoencoder: the model's network learns by the same steps."""

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(2, 3).double()

        def forward(self, x: Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("rows", len(x), subsample_size=SHOWN) as i:
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), NOISE).to_event(1), obs=x[i])

    model = VAE()
    guide = fp.svi.AmortizedFlow(model, encoder(), **TINY)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), fp.svi.PathELBO(num_particles=2))
    losses = [svi.step(X) for _ in range(60)]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
