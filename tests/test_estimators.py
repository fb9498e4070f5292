"""Estimators against closed forms, identities and limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.distributions import Bernoulli, Beta, Dirichlet, Gamma, Independent, MultivariateNormal, Normal, StudentT

import flowpath as fp

F64 = torch.float64


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64, requires_grad=True)


def normal(mu: torch.Tensor, sigma: torch.Tensor) -> Independent:
    return Independent(Normal(mu, sigma), 1)


def per_sample(estimator: fp.Estimator, f, mu: float, sigma: float, n: int = 200_000) -> torch.Tensor:
    """Per-sample gradients in mu: one mu a sample, so one backward gives them all."""
    m = torch.full((n,), mu, dtype=F64, requires_grad=True)
    loss = fp.expectation(f, Normal(m, torch.tensor(sigma, dtype=F64)), estimator, num_samples=1)
    return torch.autograd.grad(loss.sum(), m)[0]


def square_variance(k: float, mu: float, s: float) -> tuple[float, float]:
    d = mu - k
    return 4 * s**2, d**4 / s**2 + 14 * d**2 + 15 * s**2


def cos_variance(k: float, mu: float, s: float) -> tuple[float, float]:
    e, decay = math.exp(-(k**2) * s**2 / 2), math.exp(-2 * k**2 * s**2) * math.cos(2 * k * mu)
    mean2 = k**2 * e**2 * math.sin(k * mu) ** 2
    return k**2 / 2 * (1 - decay) - mean2, (1 + (1 - 4 * k**2 * s**2) * decay) / (2 * s**2) - mean2


def exp_variance(k: float, mu: float, s: float) -> tuple[float, float]:
    a, b = 1 + 2 * k * s**2, 1 + 4 * k * s**2
    c = b**-0.5 * math.exp(-2 * k * mu**2 / b)
    m, v = mu / b, s**2 / b
    mean2 = (2 * k * mu / a * a**-0.5 * math.exp(-k * mu**2 / a)) ** 2
    return 4 * k**2 * (m**2 + v) * c - mean2, ((m - mu) ** 2 + v) * c / s**4 - mean2


COSTS = {
    "square": (lambda k: lambda z: (z - k) ** 2, square_variance),
    "cos": (lambda k: lambda z: torch.cos(k * z), cos_variance),
    "exp": (lambda k: lambda z: torch.exp(-k * z**2), exp_variance),
}


@pytest.mark.parametrize(
    ("cost", "k"), [("square", 0.0), ("square", 3.0), ("cos", 0.5), ("cos", 2.0), ("exp", 0.1), ("exp", 3.0)]
)
def test_variances_are_those_of_mohamed(cost: str, k: float) -> None:
    make, variance = COSTS[cost]
    path, score = variance(k, 1.0, 1.0)
    assert per_sample(fp.Pathwise(), make(k), 1.0, 1.0).var().item() == pytest.approx(path, rel=0.03)
    assert per_sample(fp.Score(baseline=None), make(k), 1.0, 1.0).var().item() == pytest.approx(score, rel=0.05)


@pytest.mark.parametrize(("cost", "k"), [("cos", 1.2), ("cos", 5.0), ("exp", 1.0), ("exp", 10.0)])
def test_the_score_function_wins_for_rough_costs(cost: str, k: float) -> None:
    make, variance = COSTS[cost]
    path, score = variance(k, 1.0, 1.0)
    assert score < path
    measured = [per_sample(e, make(k), 1.0, 1.0).var() for e in (fp.Pathwise(), fp.Score(baseline=None))]
    assert measured[1] < measured[0]


@pytest.mark.parametrize("d", [1, 5, 20])
def test_variance_against_dimension(d: int) -> None:
    sigma, n = 0.7, 400_000 // d

    def first(estimator: fp.Estimator) -> torch.Tensor:
        m = torch.zeros(n, d, dtype=F64, requires_grad=True)
        q = normal(m, torch.full((d,), sigma, dtype=F64))
        loss = fp.expectation(lambda z: z.square().sum(-1), q, estimator)
        return torch.autograd.grad(loss.sum(), m)[0]

    assert first(fp.Pathwise()).var(0).mean().item() == pytest.approx(4 * sigma**2, rel=0.03)
    score = first(fp.Score(baseline=None)).var(0).mean().item()
    assert score == pytest.approx((d + 2) * (d + 4) * sigma**2, rel=0.06)


def divergence(estimator: fp.Estimator, m: torch.Tensor, s: torch.Tensor, n: int, log_z: float = 0.0) -> torch.Tensor:
    """KL(N(m, s^2) || N(0, 1)) by an estimator that is given log q apart, as the objectives do."""
    values = estimator.surrogate(lambda z: 0.5 * z.square().sum(-1) - log_z, normal(m, s), n, log_q_weight=1.0)
    return values.mean()


@pytest.mark.parametrize("estimator", [fp.Pathwise(0.0), fp.Score("leave_one_out")], ids=["path", "leave-one-out"])
def test_gradient_is_zero_where_q_is_p(estimator: fp.Estimator) -> None:
    m, log_s = leaf(0.0, 0.0), leaf(0.0, 0.0)
    grads = torch.autograd.grad(divergence(estimator, m, log_s.exp(), 64, log_z=3.0), (m, log_s))
    assert max(g.abs().max().item() for g in grads) < 1e-12


def test_total_gradient_has_the_fisher_trace_where_q_is_p() -> None:
    n = 100_000
    m, log_s = torch.zeros(n, 2, dtype=F64, requires_grad=True), torch.zeros(n, 2, dtype=F64, requires_grad=True)
    q = normal(m, log_s.exp())
    values = fp.Pathwise(1.0).surrogate(lambda z: 0.5 * z.square().sum(-1), q, 1, log_q_weight=1.0)
    grads = torch.autograd.grad(values.sum(), (m, log_s))
    assert sum(g.var(0).sum().item() for g in grads) == pytest.approx(2 * (1 + 2), rel=0.03)


@pytest.mark.parametrize("s", [0.3, 0.5, 2**-0.5, 1.0, 1.5])
def test_misfit_crossover(s: float) -> None:
    """Var in m is s^2 for total and (s - 1/s)^2 for path: equal at s = 1/sqrt 2."""
    n, found = 100_000, {}
    for weight in (1.0, 0.0):
        m = torch.full((n, 1), 0.8, dtype=F64, requires_grad=True)
        q = normal(m, torch.tensor([s], dtype=F64))
        values = fp.Pathwise(weight).surrogate(lambda z: 0.5 * z.square().sum(-1), q, 1, log_q_weight=1.0)
        found[weight] = torch.autograd.grad(values.sum(), m)[0].var().item()
    assert found[1.0] == pytest.approx(s**2, rel=0.03)
    assert found[0.0] == pytest.approx((s - 1 / s) ** 2, rel=0.03, abs=1e-12)


@pytest.mark.parametrize("s", [0.2, 0.5, 0.8, 1.0])
def test_auto_is_never_much_worse_than_the_better_of_the_two(s: float) -> None:
    flow = fp.Flow(fp.Elementwise(4, fp.Affine(log_bound=20.0)), fp.StandardNormal(4)).double()
    with torch.no_grad():
        flow.transform.params[0].fill_(-20.0 * math.atanh(math.log(s) / 20.0))  # x = z / scale, scale = 1 / s

    def variance(objective: fp.ReverseKL) -> float:
        losses = {"x": objective}
        return fp.gradient_variance(losses, flow.parameters(), repeats=400)[0].variance

    def log_p(x: torch.Tensor) -> torch.Tensor:
        return -0.5 * x.square().sum(-1)

    fixed = [fp.ReverseKL(flow, log_p, fp.Pathwise(w), num_samples=32) for w in (1.0, 0.0)]
    auto = fp.ReverseKL(flow, log_p, fp.Pathwise("auto"), num_samples=512, update_every=1)
    for _ in range(20):
        auto()
    auto.num_samples, auto.update_every = 32, 10**9
    assert variance(auto) <= 1.1 * min(variance(o) for o in fixed) + 1e-12


def test_vargrad_is_leave_one_out() -> None:
    flow = random_flow()

    def log_p(x: torch.Tensor) -> torch.Tensor:
        return -x.abs().sum(-1)

    grads = []
    for objective in (
        fp.LogVariance(flow, log_p, num_samples=16),
        fp.ReverseKL(flow, log_p, fp.Score("leave_one_out"), num_samples=16),
    ):
        with seeded():
            grads.append(torch.autograd.grad(objective(), list(flow.parameters()), materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def random_flow(name: str = "realnvp", context: int = 0, features: int = 3) -> fp.Flow:
    flow = getattr(fp, name)(
        features, context, **({} if name == "gaussian" else {"transforms": 2}), hidden_features=(8,)
    )
    flow = flow.double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


def test_signal_to_noise_falls_for_iwae_and_grows_for_dreg() -> None:
    flow = fp.Flow(fp.Elementwise(1, fp.Affine()), fp.StandardNormal(1)).double()
    with torch.no_grad():
        flow.transform.params[1].fill_(-0.4)

    def snr(k: int, doubly: bool) -> float:
        bound = fp.IWBound(flow, lambda z: -0.5 * z.square().sum(-1), num_samples=k, batch_size=16, doubly=doubly)
        return fp.gradient_variance({"x": bound}, flow.parameters(), repeats=500)[0].snr

    assert snr(64, False) < 0.7 * snr(4, False)
    assert snr(64, True) > 1.5 * snr(4, True)


def test_dreg_and_the_plain_gradient_agree_in_the_mean() -> None:
    flow = fp.Flow(fp.Elementwise(1, fp.Affine()), fp.StandardNormal(1)).double()
    with torch.no_grad():
        flow.transform.params[1].fill_(-0.4)
    losses = {
        str(d): fp.IWBound(flow, lambda z: -0.5 * z.square().sum(-1), num_samples=4, batch_size=64, doubly=d)
        for d in (False, True)
    }
    table = fp.gradient_variance(losses, flow.parameters(), repeats=500)
    assert max(row.bias for row in table) < 3.5


@pytest.mark.parametrize("t", [0.2, 0.49])
def test_bernoulli_gradient_is_known(t: float) -> None:
    p = leaf(0.3)
    exact = torch.autograd.grad(fp.expectation(lambda b: (b - t) ** 2, Bernoulli(p), fp.Enumerate()).sum(), p)[0]
    assert exact.item() == pytest.approx(1 - 2 * t, abs=1e-12)
    loss = fp.expectation(lambda b: (b - t) ** 2, Bernoulli(p), fp.Score(), num_samples=400_000)
    assert torch.autograd.grad(loss.sum(), p)[0].item() == pytest.approx(1 - 2 * t, abs=0.01)


def test_rqmc_error_falls_faster_than_monte_carlo() -> None:
    flow = random_flow()
    flow = fp.Flow(
        fp.realnvp(2, transforms=2, hidden_features=(8,), whiten="none").transform, fp.StandardNormal(2)
    ).double()
    f = lambda z: (z.sin() + z.square()).sum(-1)  # noqa: E731

    def variance(n: int) -> float:
        with seeded():
            values = [fp.expectation(f, flow, num_samples=n, noise=fp.Sobol()).item() for _ in range(40)]
        return torch.tensor(values, dtype=F64).var().item()

    slope = math.log(variance(1024) / variance(64)) / math.log(1024 / 64)
    assert slope < -1.2


DISTRIBUTIONS = {
    "normal": lambda a: Normal(a, a.exp()),
    "multivariate": lambda a: MultivariateNormal(a, torch.diag_embed(a.exp())),
    "gamma": lambda a: Gamma(a.exp(), a.exp()),
    "beta": lambda a: Beta(a.exp(), a.exp() + 1),
    "dirichlet": lambda a: Dirichlet(a.exp()),
    "student": lambda a: StudentT(3 + a.exp(), a, a.exp()),
    "transformed": lambda a: torch.distributions.LogNormal(a, a.exp()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_total_is_path_plus_score(name: str) -> None:
    a = leaf(0.3, -0.2, 0.1)
    check_views(fp.draw(DISTRIBUTIONS[name](a), 5), [a])


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["realnvp", "nsf", "maf", "iaf", "nsf_autoregressive", "gaussian"])
def test_total_is_path_plus_score_for_flows(name: str, context: int) -> None:
    flow = random_flow(name, context)
    c = torch.randn(4, 2, dtype=F64) if context else None
    check_views(fp.draw(flow(c), 5), list(flow.parameters()))


def check_views(d: fp.Draw, params: list[torch.Tensor]) -> None:
    views = (d.log_prob, d.log_prob_path, d.log_prob_score)
    for v in views[1:]:
        torch.testing.assert_close(v, views[0], rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(views[0])
    grads = [torch.autograd.grad((weights * v).sum(), params, retain_graph=True, materialize_grads=True) for v in views]
    for total, path, score in zip(*grads, strict=True):
        torch.testing.assert_close(total, path + score, rtol=1e-9, atol=1e-9)


def test_the_path_view_refuses_a_second_derivative() -> None:
    flow = random_flow()
    d = fp.draw(flow, 4)
    (g,) = torch.autograd.grad(
        d.log_prob_path.sum(), flow.transform.transforms[1].conditioner.final.weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"Pathwise\(score_weight=1.0\)"):
        g.square().sum().backward()


def test_a_discrete_q_has_the_score_view_only() -> None:
    d = fp.draw(Bernoulli(logits=leaf(0.2)), 3)
    assert d.log_prob_score.shape == (3, 1)
    with pytest.raises(ValueError, match=r"Score\(\)"):
        _ = d.log_prob


@pytest.mark.parametrize(
    ("estimator", "f", "q", "message"),
    [
        (fp.Pathwise(), lambda z: z, "discrete", r"use Score\(\)"),
        (fp.Pathwise(), lambda z: (z > 0).double(), "normal", r"use Score\(\)"),
        (fp.Pathwise(), lambda z: z.detach() ** 2, "normal", r"use Score\(\)"),
        (fp.Score(), lambda z: z, "normal", "at least 2 samples"),
        (fp.Pathwise("auto"), lambda z: z, "normal", None),
        (fp.Enumerate(), lambda z: z, "normal", "finite discrete support"),
        (fp.Pathwise(), lambda z: z.sum(), "normal", "must map"),
    ],
    ids=["discrete", "step", "detached", "one-sample", "auto-alone", "continuous", "shape"],
)
def test_no_silent_fallback(estimator: fp.Estimator, f, q: str, message: str | None) -> None:
    a = leaf(0.1, 0.2)
    dist = Bernoulli(logits=a) if q == "discrete" else Normal(a, 1.0)
    if message is None:
        fp.expectation(f, dist, estimator)
        return
    with pytest.raises(ValueError, match=message):
        fp.expectation(f, dist, estimator)


@pytest.mark.parametrize("estimator", [fp.Pathwise(), fp.Score()], ids=["pathwise", "score"])
def test_parameters_of_the_cost_get_their_gradient(estimator: fp.Estimator) -> None:
    w = leaf(2.0)
    loss = fp.expectation(lambda z: w * z.square(), Normal(leaf(0.1), 1.0), estimator, num_samples=50_000)
    assert torch.autograd.grad(loss.sum(), w)[0].item() == pytest.approx(1.01, abs=0.05)


def test_forward_kl_path_gradient_vanishes_at_p_and_agrees_in_the_mean() -> None:
    flow = random_flow()
    x = flow.sample(64)
    params = list(flow.parameters())
    exact = torch.autograd.grad(fp.ForwardKL(flow, flow.log_prob)(x), params, materialize_grads=True)
    assert max(g.abs().max().item() for g in exact) < 1e-12
    y = torch.randn(200_000, 3, dtype=F64)
    log_p = lambda v: -0.5 * v.square().sum(-1) - 1.5 * math.log(2 * math.pi)  # noqa: E731
    path = torch.autograd.grad(fp.ForwardKL(flow, log_p)(y), params, materialize_grads=True)
    plain = torch.autograd.grad(fp.ForwardKL(flow)(y), params, materialize_grads=True)
    scale = max(g.abs().max().item() for g in plain)
    assert max((a - b).abs().max().item() for a, b in zip(path, plain, strict=True)) < 0.03 * scale


def test_khat_tells_light_from_heavy_tails() -> None:
    z = torch.randn(20_000, dtype=F64)
    wide = Normal(0.0, 1.0).log_prob(z) - Normal(0.0, 1.0).log_prob(z / 1.2)
    assert fp.psis(wide)[1] < 0.5
    narrow = 0.5 * z**2 - 0.5 * (z / 2.5) ** 2  # p three times as wide as q
    assert fp.psis(narrow)[1] > 0.6


def test_khat_of_equal_weights_and_of_ties() -> None:
    """Rounding is no tail, and ties with the cutoff are no part of it."""
    rounding = 3e-7 * torch.randint(-2, 2, (1000,), generator=torch.Generator().manual_seed(0)).double()
    assert fp.psis(rounding)[1] == -math.inf
    ties = torch.zeros(1000, dtype=torch.float64)
    smoothed, khat = fp.psis(torch.cat([ties, torch.tensor([1.0, 2.0])]))
    assert khat == math.inf and float(torch.logsumexp(smoothed, 0)) == pytest.approx(0.0)
    tail = torch.distributions.Exponential(3.0).icdf(torch.linspace(0.0, 0.999, 60, dtype=torch.float64))
    smoothed, khat = fp.psis(torch.cat([ties, tail]))
    assert 0.0 < khat < 0.7 and bool(smoothed.isfinite().all())


class Shrunk:
    """Pathwise, but of four fifths of the gradient: biased."""

    def surrogate(self, f, q, num_samples, *, noise=None, log_q_weight=0.0):
        values = fp.Pathwise().surrogate(f, q, num_samples, noise=noise, log_q_weight=log_q_weight)
        return values.detach() + 0.8 * (values - values.detach())


def test_check_estimator_sees_a_bias() -> None:
    a = leaf(0.5, -1.0)

    def check(estimator: fp.Estimator) -> None:
        fp.testing.check_estimator(estimator, lambda: Normal(a, 1.0), torch.square, [a])

    assert isinstance(Shrunk(), fp.Estimator)
    check(fp.Pathwise())
    with pytest.raises(fp.testing.PropertyError, match="Shrunk is biased"):
        check(Shrunk())


def test_the_naive_path_view_agrees_with_the_one_pass_form() -> None:
    for name in ("realnvp", "nsf", "maf", "iaf", "nsf_autoregressive", "gaussian"):
        flow = random_flow(name)
        d = flow().draw(6)
        z = d.value.detach().requires_grad_()
        (naive,) = torch.autograd.grad(flow.log_prob(z).sum(), z)
        (fast,) = torch.autograd.grad(d.log_prob_path.sum(), d.value)
        torch.testing.assert_close(fast, naive, rtol=1e-9, atol=1e-9)


TARGET = {"features": 2, "steps": 300, "learning_rate": 0.03, "num_samples": 64}


def gaussian_target(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * ((z - 1.0) / 0.5).square().sum(-1)


@pytest.mark.parametrize(
    "estimator", [fp.Pathwise("auto"), fp.Pathwise(0.0), fp.Score()], ids=["auto", "path", "score"]
)
def test_fit_target_finds_the_evidence(estimator: fp.Estimator) -> None:
    result = fp.fit_target("gaussian", gaussian_target, estimator=estimator, seed=0, draws=2000, **TARGET)
    truth = math.log(2 * math.pi * 0.25)
    assert result.log_evidence == pytest.approx(truth, abs=0.02 + 3 * result.log_evidence_se)
    assert result.elbo < truth + 3 * result.elbo_se
    assert result.khat < 0.7
    assert "usable" in result.verdict() or "good" in result.verdict()


def test_fit_target_fits_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fit_target: 2 processes were started .* without torchrun"):
        fp.fit_target("gaussian", gaussian_target, features=2)


def test_fit_target_takes_other_objectives() -> None:
    objective = partial(fp.IWBound, num_samples=4, batch_size=16)
    result = fp.fit_target("gaussian", gaussian_target, objective=objective, seed=0, draws=2000, **TARGET)
    assert result.elbo == pytest.approx(math.log(2 * math.pi * 0.25), abs=0.1)


def test_fit_target_reports_a_density_that_is_not_finite() -> None:
    def half(z: torch.Tensor) -> torch.Tensor:
        return torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), -torch.inf)

    with pytest.warns(UserWarning, match="not finite"):
        result = fp.fit_target("gaussian", half, features=2, steps=200, seed=0, draws=1000)
    assert 0.3 < result.nonfinite_share < 0.7
    assert "give the flow p's support" in result.verdict()


def test_the_weight_of_auto_is_saved_with_the_objective() -> None:
    flow = random_flow()
    objective = fp.ReverseKL(flow, gaussian_target_3d, num_samples=64, update_every=1)
    for _ in range(3):
        objective()
    other = fp.ReverseKL(flow, gaussian_target_3d, num_samples=64)
    other.load_state_dict(objective.state_dict())
    assert other.score_weight == objective.score_weight < 1.0


def gaussian_target_3d(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * z.square().sum(-1)


def test_sobol_needs_a_base_that_maps_noise() -> None:
    flow = fp.Flow(fp.LU(2), fp.StudentT(2))
    with pytest.raises(ValueError, match="fixed map of noise"):
        fp.draw(flow, 8, noise=fp.Sobol())
