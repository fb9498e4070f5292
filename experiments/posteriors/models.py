"""Pyro translations of eleven Stan models of posteriordb, and one toy whose evidence is known.

Every model takes tensors and follows their dtype and device, and broadcasts over plates that surround it, so it runs
under `vectorize_particles=True`. Stan's parameters without a prior have a `Flat` one here.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

real, real_vector = dist.constraints.real, dist.constraints.real_vector
positive, unit_interval = dist.constraints.positive, dist.constraints.unit_interval
ordered, positive_ordered = dist.constraints.ordered_vector, dist.constraints.positive_ordered_vector


class Flat(dist.ImproperUniform):  # type: ignore[misc]
    """A flat prior that can be sampled, uniformly on (-2, 2) in the unconstrained space: guides start from draws.

    Args:
        like: a tensor whose dtype and device draws have.
        support: a constraint; event_shape: of a value.
    """

    def __init__(self, like: Tensor, support: Constraint, event_shape: Sequence[int] = ()) -> None:
        self.like = like
        super().__init__(support, torch.Size(), torch.Size(event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Flat | None = None) -> Flat:
        new = self._get_checked_instance(Flat, _instance)
        new.like = self.like
        return super().expand(batch_shape, _instance=new)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        to = biject_to(self.support)
        shape = to.inverse_shape((*sample_shape, *self.batch_shape, *self.event_shape))
        return to(self.like.new_empty(shape).uniform_(-2.0, 2.0))


# -- linear regressions: x (N, K), y (N,)


def _rows(x: Tensor, y: Tensor, beta: Tensor, sigma: Tensor) -> None:
    pyro.sample("y", dist.Normal(beta @ x.T, sigma[..., None]).to_event(1), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    """earn_height (log scales far apart) and logmesquite: no priors."""
    beta = pyro.sample("beta", Flat(y, real_vector, x.shape[1:]))
    sigma = pyro.sample("sigma", Flat(y, positive))
    _rows(x, y, beta, sigma)


def kidscore_interaction(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", Flat(y, real_vector, x.shape[1:]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    _rows(x, y, beta, sigma)


def sblrc(x: Tensor, y: Tensor) -> None:
    """Sparse-like Bayesian linear regression on correlated columns."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(10.0)))
    _rows(x, y, beta, sigma)


def toy(x: Tensor, y: Tensor) -> None:
    """Conjugate: beta ~ N(0, I), y ~ N(x beta, I)."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(x.shape[1]), 1.0).to_event(1))
    _rows(x, y, beta, y.new_ones(()))


# -- time series


def autoregression(lags: Tensor, y: Tensor) -> None:
    """arK: y_t from its K predecessors, lags `(T, K)`, y `(T,)`."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    pyro.sample("y", dist.Normal(alpha[..., None] + beta @ lags.T, sigma[..., None]).to_event(1), obs=y)


def garch(y: Tensor, first: Tensor) -> None:
    """garch11: the variance follows the last square and the last variance; `first` is the first deviation.

    Stan's beta1 on (0, 1 - alpha1) is beta1_frac (1 - alpha1), with its log-Jacobian.
    """
    mu = pyro.sample("mu", Flat(y, real))
    alpha0 = pyro.sample("alpha0", Flat(y, positive))
    alpha1 = pyro.sample("alpha1", Flat(y, unit_interval))
    share = pyro.sample("beta1_frac", Flat(y, unit_interval))
    pyro.factor("jacobian", torch.log1p(-alpha1))
    beta1 = share * (1.0 - alpha1)
    shocks = alpha0[..., None] + alpha1[..., None] * (y[:-1] - mu[..., None]).square()
    variances = [first.square().expand_as(alpha0)]
    for shock in shocks.unbind(-1):
        variances.append(shock + beta1 * variances[-1])
    pyro.sample("y", dist.Normal(mu[..., None], torch.stack(variances, -1).sqrt()).to_event(1), obs=y)


def drive(alpha: Tensor, u: Tensor, v: Tensor) -> None:
    """hmm_drive_0: two hidden states with exponential emissions u, v `(T,)`, summed out; alpha `(2, 2)`."""
    theta = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k])) for k in range(2)]
    rates = [pyro.sample(name, Flat(u, positive_ordered, (2,))) for name in ("phi", "lambda")]
    for name, rate in zip(("phi", "lambda"), rates, strict=True):
        pyro.factor(f"{name}_prior", dist.Normal(u.new_tensor([0.0, 3.0]), 1.0).log_prob(rate).sum(-1))
    emitted = sum(
        dist.Exponential(rate[..., None, :]).log_prob(x[:, None]) for rate, x in zip(rates, (u, v), strict=True)
    )
    pyro.factor("likelihood", _paths(torch.stack(theta, -2).log(), emitted))


def _paths(moves: Tensor, emitted: Tensor) -> Tensor:
    """log sum over state paths, by pairs: moves `(*batch, K, K)`, emitted `(*batch, T, K)`, the first state free."""
    steps = moves[..., None, :, :] + emitted[..., 1:, None, :]
    while steps.shape[-3] > 1:
        pairs = steps.shape[-3] // 2
        left, right = steps[..., 0 : 2 * pairs : 2, :, :], steps[..., 1 : 2 * pairs : 2, :, :]
        joined = torch.logsumexp(left[..., None] + right[..., None, :, :], -2)
        steps = torch.cat([joined, steps[..., 2 * pairs :, :, :]], -3)
    return torch.logsumexp(emitted[..., 0, :, None] + steps[..., 0, :, :], (-2, -1))


# -- hierarchies and mixtures


def schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools: y, sigma `(8,)`. A funnel without a mode."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    effects = dist.Normal(mu[..., None], tau[..., None]).expand((*mu.shape, len(y))).to_event(1)
    theta = pyro.sample("theta", effects)
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools by standard normal effects."""
    z = pyro.sample("theta_trans", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    pyro.sample("y", dist.Normal(mu[..., None] + tau[..., None] * z, sigma).to_event(1), obs=y)


def factor(x: Tensor, alpha: Tensor, rho: Tensor) -> Tensor:
    """Cholesky factor `(*batch, N, N)` of the squared exponential kernel at x `(N,)`; float32 could not factor it."""
    squares, alpha, rho = (x[:, None] - x).square().double(), alpha.double(), rho.double()
    kernel = alpha[..., None, None].square() * torch.exp(-0.5 * squares / rho[..., None, None].square())
    jitter = 1e-10 * torch.eye(len(x), dtype=kernel.dtype, device=x.device)
    return torch.linalg.cholesky(kernel + jitter).to(x.dtype)


def poisson_process(x: Tensor, counts: Tensor) -> None:
    """gp_pois_regr: counts `(N,)` at x `(N,)` with a Gaussian process as log rate."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    z = pyro.sample("f_tilde", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    f = (factor(x, alpha, rho) @ z[..., None])[..., 0]
    pyro.sample("k", dist.Poisson(f.exp(), validate_args=False).to_event(1), obs=counts)


def mixture(y: Tensor) -> None:
    """low_dim_gauss_mix: two Gaussians in order, y `(N,)`."""
    mu = pyro.sample("mu", Flat(y, ordered, (2,)))
    pyro.factor("mu_prior", dist.Normal(y.new_zeros(()), 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    each = dist.Normal(mu[..., None, :], sigma[..., None, :]).log_prob(y[:, None])
    share = torch.stack([theta.log(), torch.log1p(-theta)], -1)
    pyro.factor("y", torch.logsumexp(each + share[..., None, :], -1).sum(-1))
