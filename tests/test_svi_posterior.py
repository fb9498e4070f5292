"""fit_posterior and Posterior: exact answers where they are known, and a verdict never better than the truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from registry import normal
from torch import Tensor

import flowpath as fp
from flowpath.svi import ModelError, Posterior, fit_posterior
from flowpath.svi.climbing import Climb, Judgement, judge
from flowpath.svi.posterior import Held
from flowpath.svi.summaries import summarise
from flowpath.svi.verdicts import verdict

Model = Callable[..., Any]
X = normal(12, 2, seed=1)
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * normal(12, seed=2)


def num(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def location(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(num(0.0), 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def regression(x: Tensor, y: Tensor | None = None, shown: int | None = None) -> None:
    beta = pyro.sample("beta", dist.Normal(num(0.0), 2.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=shown) as rows:
        mean = (x[rows] * beta).sum(-1)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])


def scales(y: Tensor) -> None:
    """A positive latent, of a dtype that follows the data."""
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=y.dtype), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, tau), obs=y)


def groups(size: int, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(num(0.0), 2.0))
    with pyro.plate("groups", size):
        theta = pyro.sample("theta", dist.Normal(mu, 0.5))
        pyro.deterministic("twice", 2 * theta)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def exact(x: Tensor, y: Tensor, prior: float, noise: float) -> tuple[Tensor, Tensor, float]:
    """Mean, sds and log evidence of a linear regression with a N(0, prior^2) prior of every coefficient."""
    precision = x.T @ x / noise**2 + torch.eye(x.shape[1]).double() / prior**2
    covariance = precision.inverse()
    marginal = noise**2 * torch.eye(len(y)).double() + prior**2 * x @ x.T
    evidence = dist.MultivariateNormal(torch.zeros(len(y)).double(), marginal).log_prob(y)
    return covariance @ x.T @ y / noise**2, covariance.diagonal().sqrt(), float(evidence)


@pytest.fixture(scope="module")
def fits() -> dict[str, Posterior]:
    """Fits that several tests look at; none changes them."""
    quick: dict[str, Any] = {"max_steps": 60, "seed": 0, "progress": False}
    return {
        "location": fit_posterior(location, Y, **quick),
        "regression": fit_posterior(regression, X, Y, **quick),
        "scales": fit_posterior(scales, Y, **quick),
        "groups": fit_posterior(groups, 4, normal(3, 4, seed=3), **quick),
    }


# --- known answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["location", "regression"])
def test_conjugate_models_are_solved(fits: dict[str, Posterior], name: str) -> None:
    posterior = fits[name]
    design, prior, noise = (torch.ones(12, 1).double(), 10.0, 1.0) if name == "location" else (X, 2.0, 0.5)
    mean, sd, log_z = exact(design, Y, prior, noise)
    found = posterior.summary()["mu" if name == "location" else "beta"]
    assert torch.allclose((found["mean"] - mean) / sd, torch.zeros(1).double(), atol=0.03)
    assert torch.allclose(found["sd"] / sd, torch.ones(1).double(), atol=0.03)
    assert torch.allclose((found["95%"] - mean) / sd, torch.full((1,), 1.645).double(), atol=0.1)
    assert posterior.log_evidence == pytest.approx(log_z, abs=1e-3)
    assert posterior.elbo == pytest.approx(log_z, abs=2e-3)
    assert posterior.log_evidence_se is not None and posterior.log_evidence_se < 1e-3
    assert posterior.khat is not None and posterior.khat < 0.5 and posterior.ess is not None and posterior.ess > 0.99
    assert posterior.verdict().startswith("the flow is very close to the posterior")


def test_draws_have_the_sites_shapes_and_the_posteriors_moments(fits: dict[str, Posterior]) -> None:
    mean, sd, _ = exact(X, Y, 2.0, 0.5)
    for corrected in (True, False, "auto"):
        draws = fits["regression"].sample(4000, corrected=corrected, seed=1)["beta"]
        assert draws.shape == (4000, 2)
        assert torch.allclose((draws.mean(0) - mean) / sd, torch.zeros(2).double(), atol=0.06)
        assert torch.allclose(draws.std(0) / sd, torch.ones(2).double(), atol=0.05)
    assert {n: v.shape for n, v in fits["groups"].sample(5).items()} == {"mu": (5,), "theta": (5, 4)}


def test_more_corrected_draws_than_are_held(fits: dict[str, Posterior]) -> None:
    draws = fits["location"].sample(12_000, corrected=True, seed=0)["mu"]
    assert draws.shape == (12_000,) and len(draws.unique()) > 5000


def test_float32_models_are_judged_in_float64() -> None:
    posterior = fit_posterior(scales, Y.float(), max_steps=40, seed=0)
    assert posterior.density is not None and posterior.density.dtype == torch.float64
    assert posterior.sample(10)["tau"].dtype == posterior.held.values["tau"].dtype == torch.float32
    assert posterior.log_prob(torch.zeros(3, 1)).shape == (3,)
    wide = fit_posterior(scales, Y, max_steps=40, seed=0)
    assert posterior.log_evidence == pytest.approx(wide.log_evidence, abs=1e-3)


def test_a_model_that_stays_in_float32() -> None:
    layer = torch.nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(layer(x), 1.0).to_event(1), obs=y)

    posterior = fit_posterior(model, torch.ones(1), max_steps=40, seed=0)
    assert posterior.density is not None and posterior.density.dtype == torch.float32
    a, b = float(layer.weight.detach()), float(layer.bias.detach())
    want = float(dist.Normal(num(b), math.sqrt(1.0 + a * a)).log_prob(num(1.0)))
    assert posterior.log_evidence == pytest.approx(want, abs=5e-3)


def test_many_latents_take_no_dense_matrix(tmp_path: Path) -> None:
    """The mean of 350 groups, in float32 as the model has it."""
    y = 2.0 + normal(350, seed=5).float()

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    posterior = fit_posterior(model, y, max_steps=60, seed=0, draws=1000)
    assert max(t.numel() for t in posterior.flow.state_dict().values()) < 351**2 / 4
    assert posterior.sample(5)["theta"].shape == (5, 350) and posterior.held.u.dtype == torch.float32
    u = posterior.held.u[:3]
    assert torch.equal(Posterior.load(posterior.save(tmp_path)).log_prob(u), posterior.log_prob(u))
    found = posterior.summary()
    assert float(found["mu"]["mean"]) == pytest.approx(float(y.mean()), abs=0.3)
    shrunk = y.mean() + (y - y.mean()) * 0.25 / 1.25
    assert float((found["theta"]["mean"] - shrunk).std()) < 0.1


# --- how it ends, and what it leaves -----------------------------------------------------------------------------


def test_a_seed_gives_the_same_fit_and_the_generator_is_put_back(keeps_rng: Any) -> None:
    with keeps_rng():
        one = fit_posterior(scales, Y, max_steps=20, seed=3)
    torch.rand(7)
    two = fit_posterior(scales, Y, max_steps=20, seed=3)
    assert one.elbo == two.elbo and torch.equal(one.held.u, two.held.u)
    assert torch.equal(one.sample(10, seed=0)["tau"], two.sample(10, seed=0)["tau"])
    assert fit_posterior(scales, Y, max_steps=20, seed=4).elbo != one.elbo


def test_steps_and_time_end_a_fit() -> None:
    posterior = fit_posterior(scales, Y, max_steps=25, tolerance=1e-9, seed=0)
    assert (posterior.reason, posterior.steps) == ("max_steps", 25)
    assert [row["step"] for row in posterior.history] == [0, 25]
    began = time.monotonic()
    posterior = fit_posterior(scales, Y, max_steps=None, tolerance=1e-9, time_limit=0.5, seed=0)
    assert posterior.reason == "time_limit" and time.monotonic() - began < 30.0
    assert posterior.log_evidence is not None and posterior.seconds >= 0.5


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls, update = [0], Climb._update

    def wrapped(self: Climb, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        update(self, *args)

    monkeypatch.setattr(Climb, "_update", wrapped)


def test_ctrl_c_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, after=30)
    posterior = fit_posterior(scales, Y, seeds=3, seed=0)
    assert (posterior.reason, posterior.steps, posterior.others) == ("interrupted", 29, [])
    assert posterior.khat is not None and posterior.sample(10)["tau"].shape == (10,)


def test_a_start_of_the_users_own() -> None:
    def far(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1e-3), obs=y + 5e4)
        pyro.factor("cliff", torch.where((mu - 5e4).abs() < 10.0, 0.0, -torch.inf))

    with pytest.raises(ValueError, match="pass init="):
        fit_posterior(far, num(0.0), max_steps=5, seed=0)
    posterior = fit_posterior(far, num(0.0), init={"mu": num(5e4 + 1.0)}, max_steps=5, seed=0)
    assert float(posterior.summary()["mu"]["mean"]) == pytest.approx(5e4, abs=1e-3)
    with pytest.raises(ValueError, match="'mu' lacks one"):
        fit_posterior(far, num(0.0), init={}, max_steps=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"draws": 10}, "draws"),
        ({"seeds": 0}, "seeds"),
        ({"particles": 0}, "particles"),
        ({"tolerance": 0.0}, "tolerance above 0"),
        ({"time_limit": -1.0}, "time_limit above 0"),
        ({"learning_rate": math.nan}, "learning_rate above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_posterior(location, Y, **settings)


def test_a_model_that_cannot_be_had_is_refused_before_any_training() -> None:
    def model() -> None:
        pyro.sample("count", dist.Poisson(num(3.0)))

    with pytest.raises(ModelError):
        fit_posterior(model)


def test_summed_out_sites_are_told() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(num(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            side = pyro.sample("side", dist.Bernoulli(num(0.3)))
            pyro.sample("y", dist.Normal(mu + 2 * side, 0.5), obs=y)

    posterior = fit_posterior(model, Y, max_steps=30, seed=0)
    grid = torch.linspace(-4, 4, 4001).double()
    each = torch.stack(
        [dist.Normal(grid[:, None] + 2 * s, 0.5).log_prob(Y) + math.log(p) for s, p in ((0, 0.7), (1, 0.3))]
    )
    joint = torch.logsumexp(each, 0).sum(1) + dist.Normal(num(0.0), 1.0).log_prob(grid)
    assert posterior.log_evidence == pytest.approx(float(torch.logsumexp(joint, 0)) + math.log(8 / 4000), abs=5e-3)
    assert "summed out: side" in posterior.notes and set(posterior.sample(3)) == {"mu"}


# --- correction and verdict --------------------------------------------------------------------------------------


def skewed() -> None:
    """log x has a tail to the left, which a Gaussian misses."""
    pyro.sample("x", dist.Gamma(num(2.0), 1.0))


def test_correction_repairs_a_fit_cut_short() -> None:
    posterior = fit_posterior(skewed, max_steps=1, seed=0)
    raw, corrected = (posterior.sample(5000, corrected=c, seed=0)["x"] for c in (False, True))
    assert abs(float(corrected.mean()) - 2.0) < 0.05 < abs(float(raw.mean()) - 2.0)
    assert float(posterior.summary()["x"]["mean"]) == pytest.approx(2.0, abs=0.05)
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.02)
    assert posterior.elbo is not None and posterior.elbo < -0.01


def test_auto_corrects_where_weights_can_be_trusted(fits: dict[str, Posterior]) -> None:
    good = fits["regression"]
    bad = Posterior(**{**vars(good), "judgement": Judgement(**{**vars(good.judgement), "khat": 0.9})})
    assert good.trusted and not bad.trusted
    assert torch.equal(good.sample(50, seed=1)["beta"], good.sample(50, corrected=True, seed=1)["beta"])
    assert torch.equal(bad.sample(50, seed=1)["beta"], bad.sample(50, corrected=False, seed=1)["beta"])
    assert torch.equal(bad.weights(), torch.full_like(good.weights(), 1e-4))


def judged(**other: float) -> Judgement:
    good = {"elbo": -10.0, "elbo_se": 0.001, "ess": 0.98, "khat": 0.3, "log_evidence": -9.99, "log_evidence_se": 0.001}
    return Judgement(**{**good, "nonfinite": 0.0, "draws": 10_000, **other})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("judgement", "others", "words"),
    [
        (judged(), [], "very close to the posterior as far as its own draws can tell"),
        (judged(), [{"elbo": -10.0, "apart": 0.02}], "very close to"),
        (judged(log_evidence=-9.95), [], "the flow is close to"),
        (judged(khat=0.6), [], "the flow is close to"),
        (judged(log_evidence=-9.5, ess=0.5), [], "near the posterior .* raw draws visibly off it: use corrected ones"),
        (judged(khat=0.8), [], "k-hat 0.80: importance weights are not to be trusted .* train longer .* refine"),
        (judged(khat=math.nan), [], "not to be trusted"),
        (judged(ess=0.02), [], "ESS 2% .* raw draws are not the posterior's"),
        (judged(log_evidence=-7.0), [], "KL about 3.0 nats: raw draws are not"),
        (judged(nonfinite=0.2), [], "not finite at 20.00% of the flow's draws: check the model's likelihood"),
        (judged(), [{"elbo": -13.0, "apart": 0.0}], "two seeds disagree .ELBO -13.00 and -10.00"),
        (judged(), [{"elbo": -10.0, "apart": 4.0}], "two seeds disagree .* a mean by 4.0 sd.* several modes"),
    ],
)
def test_verdict_follows_the_numbers(judgement: Judgement, others: list[dict[str, float]], words: str) -> None:
    import re

    assert re.search(words, verdict(judgement, others))


def test_a_flow_too_wide_does_not_pass_for_its_low_k_hat() -> None:
    """Bounded weights: k-hat is low, and yet the draws are not the posterior's."""
    wide = 1.6 * normal(10_000, 8)
    log_w = dist.Normal(num(0.0), 1.0).log_prob(wide).sum(1) - dist.Normal(num(0.0), 1.6).log_prob(wide).sum(1)
    found = judge(log_w)
    assert found.khat < 0.7 and not verdict(found).startswith("the flow is")


def test_two_modes_show_where_seeds_disagree() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(num(0.0), 10.0))
        pyro.factor("f", torch.logaddexp(-0.5 * (x - 6).square(), -0.5 * (x + 6).square()))

    posterior = fit_posterior(model, max_steps=20, seeds=4, seed=0, draws=1000)
    assert len(posterior.others) == 3
    assert "another mode" in posterior.verdict() and "several modes" in posterior.verdict()
    posterior.missed = 0.0  # as where no start came near the other mode
    assert "two seeds disagree" in posterior.verdict() and "several modes" in posterior.verdict()


def test_draws_off_the_support_are_told() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(num(0.0), 1.0))
        pyro.factor("cliff", torch.where(x > 1.5, -torch.inf, 0.0))

    posterior = fit_posterior(model, max_steps=10, seed=0)
    assert "log p is not finite at" in posterior.verdict()
    assert float(posterior.sample(2000, corrected=True, seed=0)["x"].max()) <= 1.5


# --- subsampling -------------------------------------------------------------------------------------------------


def test_a_subsampling_model_is_judged_on_all_rows() -> None:
    posterior = fit_posterior(regression, X, Y, 4, max_steps=100, seed=0)
    mean, sd, log_z = exact(X, Y, 2.0, 0.5)
    assert posterior.log_evidence == pytest.approx(log_z, abs=0.05) and posterior.khat is not None
    found = posterior.summary()["beta"]
    assert torch.allclose((found["mean"] - mean) / sd, torch.zeros(2).double(), atol=0.1)
    assert posterior.unjudged == ""


def minibatch(x: Tensor, y: Tensor, size: int) -> None:
    beta = pyro.sample("beta", dist.Normal(num(0.0), 2.0).expand([2]).to_event(1))
    with pyro.plate("rows", size, subsample_size=len(x)):
        pyro.sample("y", dist.Normal((x * beta).sum(-1), 0.5), obs=y)


def test_a_minibatch_alone_gives_no_verdict(tmp_path: Path) -> None:
    posterior = fit_posterior(minibatch, X, Y, 120, max_steps=20, seed=0)
    numbers = ("khat", "ess", "elbo", "log_evidence", "log_evidence_se", "log_weights")
    assert [n for n in numbers if getattr(posterior, n) is not None] == []
    assert posterior.verdict().startswith("cannot tell: the model is given a minibatch of plate 'rows'")
    assert any("no k-hat, evidence or correction" in note for note in posterior.notes)
    assert [math.isnan(row[key]) for row in posterior.history[1:] for key in ("khat", "ess", "gap")] == [True] * 3
    assert posterior.sample(5)["beta"].shape == (5, 2) and "beta[1]" in str(posterior)
    with pytest.raises(ValueError, match="needs the density of all the data: cannot tell"):
        posterior.sample(5, corrected=True)
    assert Posterior.load(posterior.save(tmp_path)).verdict() == posterior.verdict()


def test_a_fit_that_nothing_would_end_is_refused() -> None:
    with pytest.raises(ValueError, match="without max_steps or time_limit nothing ends this fit; the model is given"):
        fit_posterior(minibatch, X, Y, 120, max_steps=None)


# --- densities and summaries -------------------------------------------------------------------------------------


def test_log_prob_of_values_integrates_to_one(fits: dict[str, Posterior]) -> None:
    posterior = fits["scales"]
    grid = torch.linspace(0.05, 6.0, 300).double()
    density = torch.stack([posterior.log_prob({"tau": t}) for t in grid]).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=2e-3)
    u = torch.linspace(-4.0, 3.0, 2001).double()
    assert float(torch.trapezoid(posterior.log_prob(u.unsqueeze(-1)).exp(), u)) == pytest.approx(1.0, abs=1e-4)
    at, point = num(1.3), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert posterior.log_prob(point).requires_grad and not posterior.log_prob(point.detach()).requires_grad
    assert torch.allclose(posterior.log_prob({"tau": at}), posterior.log_prob(at.log().reshape(1)) - at.log())


def test_summary_weighs_the_draws() -> None:
    values = {"x": torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]])}
    found = summarise(values, torch.tensor([0.1, 0.2, 0.3, 0.4]))["x"]
    assert torch.allclose(found["mean"], torch.tensor([3.0, 30.0]).double())
    assert torch.allclose(found["sd"], torch.tensor([1.0, 10.0]).double())
    assert torch.equal(found["50%"], torch.tensor([3.0, 30.0]).double())
    assert torch.allclose(found["mcse"][0], num(0.01 * 4 + 0.04 * 1 + 0.09 * 0 + 0.16 * 1).sqrt())
    assert torch.equal(found["5%"], torch.tensor([1.0, 10.0]).double())


def test_summary_prints_a_row_a_number(fits: dict[str, Posterior]) -> None:
    lines = str(fits["groups"]).splitlines()
    assert lines[0] == fits["groups"].verdict() and lines[1].startswith("ELBO")
    labels = [line.split()[0] for line in lines if line.startswith(("mu", "theta"))]
    assert labels == ["mu", "theta[0]", "theta[1]", "theta[2]", "theta[3]"]
    held = Held(torch.zeros(3, 1), {"z": torch.arange(12.0).reshape(3, 2, 2)}, None)
    assert "z[1,0]" in str(summarise(held.values, torch.full((3,), 1 / 3)))


# --- files -------------------------------------------------------------------------------------------------------


def test_files_without_a_model_give_held_draws(fits: dict[str, Posterior], tmp_path: Path) -> None:
    posterior = fits["groups"]
    again = Posterior.load(posterior.save(tmp_path / "new" / "folder"))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "flow.safetensors",
        "posterior.safetensors",
    ]
    u = normal(6, 5)
    assert torch.equal(again.log_prob(u), posterior.log_prob(u))
    assert str(again) == str(posterior) and again.judgement == posterior.judgement
    for corrected in (True, False):
        draws = again.sample(100, corrected=corrected, seed=0)
        assert {n: v.shape for n, v in draws.items()} == {"mu": (100,), "theta": (100, 4)}
    assert set(again.sample(9, seed=0)["mu"].tolist()) <= set(posterior.held.values["mu"].tolist())
    with pytest.raises(ValueError, match="holds 10000 draws, 10001 were asked for; pass model="):
        again.sample(10_001)
    for call in (lambda: again.predictive(4), lambda: again.guide, lambda: again.log_prob({"mu": num(0.0)})):
        with pytest.raises(ValueError, match="loaded without its model; pass model="):
            call()


def test_files_with_a_model_are_the_posterior_again(fits: dict[str, Posterior], tmp_path: Path) -> None:
    posterior = fits["groups"]
    y = normal(3, 4, seed=3)
    again = Posterior.load(posterior.save(tmp_path), model=groups, args=(4, y))
    for corrected in (True, False):
        one, two = (p.sample(20, corrected=corrected, seed=2)["theta"] for p in (again, posterior))
        assert torch.equal(one, two)
    assert again.predictive(4, num_samples=3)["y"].shape == (3, 3, 4)
    with pytest.raises(ValueError, match="has 4 unconstrained latents with these arguments, the posterior 5"):
        Posterior.load(tmp_path, model=groups, args=(3, y[:, :3]))


def test_files_of_a_float32_model(tmp_path: Path) -> None:
    posterior = fit_posterior(scales, Y.float(), max_steps=10, seed=0)
    again = Posterior.load(posterior.save(tmp_path), model=scales, args=(Y.float(),))
    assert torch.equal(again.sample(5, seed=0)["tau"], posterior.sample(5, seed=0)["tau"])


def test_other_files_are_refused(fits: dict[str, Posterior], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Posterior.load"):
        Posterior.load(tmp_path / "nowhere")
    fits["location"].save(tmp_path)
    (tmp_path / "posterior.safetensors").write_bytes((tmp_path / "flow.safetensors").read_bytes())
    with pytest.raises(ValueError, match="Posterior.load"):
        Posterior.load(tmp_path)


# --- with the model ----------------------------------------------------------------------------------------------


def test_predictive_draws_for_new_rows(fits: dict[str, Posterior], keeps_rng: Any) -> None:
    new = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]).double()
    with keeps_rng():
        y = fits["regression"].predictive(new, num_samples=1500, seed=0)
        again = fits["regression"].predictive(new, num_samples=1500, seed=0)
    mean, _, _ = exact(X, Y, 2.0, 0.5)
    precision = X.T @ X / 0.25 + torch.eye(2).double() / 4.0
    sd = ((new @ precision.inverse()) * new).sum(-1).add(0.25).sqrt()
    assert set(y) == {"y"} and torch.equal(y["y"], again["y"])
    assert torch.allclose((y["y"].mean(0) - new @ mean) / sd, torch.zeros(3).double(), atol=0.12)
    assert torch.allclose(y["y"].std(0) / sd, torch.ones(3).double(), atol=0.1)


def test_predictive_draws_new_groups_from_their_prior(fits: dict[str, Posterior]) -> None:
    posterior = fits["groups"]
    old, new = posterior.predictive(4, num_samples=400, seed=0), posterior.predictive(7, num_samples=400, seed=0)
    assert {n: v.shape[1:] for n, v in old.items()} == {"twice": (4,), "y": (3, 4)}
    assert {n: v.shape[1:] for n, v in new.items()} == {"theta": (7,), "twice": (7,), "y": (3, 7)}
    means = old["twice"].mean(0) / 2 - posterior.summary()["theta"]["mean"]
    assert torch.allclose(means, torch.zeros(4).double(), atol=0.1)
    spread = new["theta"] - new["theta"].mean(1, keepdim=True)
    assert float(spread.std()) == pytest.approx(0.5 * math.sqrt(6 / 7), rel=0.1)


@pytest.mark.usefixtures("pyro_store")
def test_guide_is_the_flow_and_trains_on(fits: dict[str, Posterior]) -> None:
    y = normal(3, 4, seed=3)
    posterior = fit_posterior(groups, 4, y, max_steps=10, seed=0)
    guide = posterior.guide
    assert isinstance(guide, fp.svi.AutoFlow) and guide.flow is posterior.flow
    draws = posterior.sample(5, corrected=False, seed=0)
    want = torch.stack([posterior.log_prob({n: v[i] for n, v in draws.items()}) for i in range(5)])
    assert torch.allclose(guide.log_prob(draws), want, atol=1e-8)
    before = [p.detach().clone() for p in posterior.flow.parameters()]
    svi = SVI(groups, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(4, y) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(p, b) for p, b in zip(posterior.flow.parameters(), before, strict=True))


def test_plot_is_a_figure(fits: dict[str, Posterior]) -> None:
    from matplotlib.figure import Figure

    figure = fits["groups"].plot(["theta", "mu"])
    assert isinstance(figure, Figure) and "theta[0]" in {a.get_xlabel() for a in figure.axes}
    with pytest.raises(ValueError, match="there is no site .'tau'.; there are mu, theta"):
        fits["groups"].plot(["tau"])


# --- ArviZ -------------------------------------------------------------------------------------------------------


def test_to_arviz_has_groups_and_plates_for_dims(fits: dict[str, Posterior]) -> None:
    pytest.importorskip("arviz", reason="needs ArviZ: pip install 'flowpath[arviz]'")
    data = fits["groups"].to_arviz(50)
    draws, likelihood, seen = data["posterior"], data["log_likelihood"], data["observed_data"]
    assert draws["theta"].dims == ("chain", "draw", "groups") and draws["mu"].dims == ("chain", "draw")
    assert draws["theta"].shape == (1, 50, 4)
    assert likelihood["y"].dims == ("chain", "draw", "rows", "groups") and seen["y"].dims == ("rows", "groups")
    theta = torch.tensor(draws["theta"].values[0])
    y = normal(3, 4, seed=3)
    want = dist.Normal(theta[:, None], 1.0).log_prob(y)
    assert torch.allclose(torch.tensor(likelihood["y"].values[0]), want) and torch.equal(
        torch.tensor(seen["y"].values), y
    )
    assert set(likelihood.data_vars) == set(seen.data_vars) == {"y"}


def test_to_arviz_of_version_one(fits: dict[str, Posterior], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1.0 on from_dict takes one dict of groups; it was tried with ArviZ 1.3."""
    import sys
    from types import SimpleNamespace

    given = {}

    def from_dict(data: dict[str, dict[str, Any]], *, dims: dict[str, list[str]]) -> str:
        given.update(data, dims=dims)
        return "tree"

    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.3.1", from_dict=from_dict))
    assert fits["groups"].to_arviz(5) == "tree"
    assert set(given) == {"posterior", "log_likelihood", "observed_data", "dims"}
    assert given["dims"] == {"theta": ["groups"], "y": ["rows", "groups"]}
    assert given["posterior"]["theta"].shape == (1, 5, 4) and given["observed_data"]["y"].shape == (3, 4)


def test_to_arviz_says_what_to_install(fits: dict[str, Posterior], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install 'flowpath.arviz.'"):
        fits["location"].to_arviz(5)


def test_to_arviz_of_a_minibatch_has_no_rows() -> None:
    pytest.importorskip("arviz", reason="needs ArviZ: pip install 'flowpath[arviz]'")
    posterior = fit_posterior(minibatch, X, Y, 120, max_steps=5, seed=0, draws=1000)
    data = posterior.to_arviz(5)
    assert [g for g in ("posterior", "log_likelihood", "observed_data") if g in data] == ["posterior"]


# --- refine ------------------------------------------------------------------------------------------------------


def test_refine_runs_chains_that_agree(fits: dict[str, Posterior], keeps_rng: Any) -> None:
    with keeps_rng():
        refined = fits["scales"].refine(100.0, chains=2, draws=200, seed=0)
    assert refined.rhat < 1.05 and refined.ess > 50 and refined.divergences == 0
    assert refined.verdict().startswith("2 chains ") and refined.values["tau"].shape == (2, 200)
    one, two = refined.summary()["tau"], fits["scales"].summary()["tau"]
    assert float((one["mean"] - two["mean"]) / two["sd"]) == pytest.approx(0.0, abs=0.3)
    assert refined.sample(7)["tau"].shape == (7,) and refined.sample()["tau"].shape == (400,)
    with pytest.raises(ValueError, match="there are 400 draws, 401 were asked for; refine for longer"):
        refined.sample(401)


def test_refine_keeps_to_its_time(fits: dict[str, Posterior]) -> None:
    """On a machine with much else to do nothing may come of it, but not later."""
    began = time.monotonic()
    with suppress(ValueError):
        refined = fits["scales"].refine(3.0, chains=2, draws=10**6, seed=0)
        assert refined.values["tau"].shape[1] < 10**6 and refined.seconds > 2.0
    assert time.monotonic() - began < 10.0


def test_refine_names_what_it_cannot_do(fits: dict[str, Posterior]) -> None:
    with pytest.raises(ValueError, match="refine expects chains to be a whole number of at least 2"):
        fits["scales"].refine(1.0, chains=1)
    with pytest.raises(ValueError, match="refine expects a time_limit above 0"):
        fits["scales"].refine(0.0)
    with pytest.raises(ValueError, match="allow it more time"):
        fits["scales"].refine(0.01)
    posterior = fit_posterior(regression, X, Y, 4, max_steps=5, seed=0, draws=1000)
    with pytest.raises(ValueError, match="the model subsamples"):
        posterior.refine(1.0)


# --- GPU ---------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_on_a_gpu_keep_it_all_there(dtype: torch.dtype, tmp_path: Path) -> None:
    y = Y.to("cuda", dtype)
    posterior = fit_posterior(scales, y, max_steps=60, seed=0)
    draws = posterior.sample(10)["tau"]
    assert draws.device.type == "cuda" and draws.dtype == dtype
    assert posterior.log_evidence == pytest.approx(
        fit_posterior(scales, Y, max_steps=60, seed=0).log_evidence, abs=5e-3
    )
    assert torch.isfinite(posterior.log_prob(torch.zeros(3, 1))).all()
    again = Posterior.load(posterior.save(tmp_path), model=scales, args=(y,))
    assert again.sample(5)["tau"].device.type == "cuda"
    assert posterior.guide.sample(3)["tau"].device.type == "cuda"


@pytest.mark.gpu
@on_gpu
def test_a_tensor_on_the_wrong_device_is_reported_with_its_site() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(12), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x * torch.ones(12), 1.0).to_event(1), obs=y)

    with pytest.raises(ModelError, match="mixes devices"):
        fit_posterior(model, Y.cuda())


def test_the_handlers_are_left_alone() -> None:
    """A user's handler around the call is not the model's."""
    with poutine.trace() as tracer:
        fit_posterior(location, Y, max_steps=2, seed=0, draws=1000)
    assert [n for n in tracer.trace.nodes if n in ("mu", "y")] == []
