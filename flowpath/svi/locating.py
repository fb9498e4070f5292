"""Where the posterior is, and how wide: a Gaussian to start a flow from, found with few evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowpath.flow import Flow
from flowpath.objectives import LogDensity

DENSE = 300
"""Latents up to which a Hessian is formed."""
_TRIES = 48  # draws that an ELBO on the way is estimated with
_TOLERANCE = 1e-6  # of Newton's decrement, in nats


@dataclass(frozen=True)
class Gaussian:
    """N(loc, C C^T) in unconstrained space; `scale` is C, lower triangular `(D, D)`, or its diagonal `(D,)`.

    Attributes:
        loc: `(D,)`.
        scale: `(D, D)` or `(D,)`.
        elbo: E_q[log p - log q] in nats, from a few draws.
    """

    loc: Tensor
    scale: Tensor
    elbo: float

    def draw(self, noise: Tensor) -> Tensor:
        """Points `(P, D)` from standard noise `(P, D)`."""
        return self.loc + (noise * self.scale if self.scale.dim() == 1 else noise @ self.scale.T)

    def log_scale(self) -> Tensor:
        """log |det C|."""
        return (self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum()


def locate(log_density: LogDensity, starts: Tensor, *, max_steps: int = 100) -> list[Gaussian]:
    r"""The Gaussian of best ELBO on the way uphill from each of several starts, the best first.

    Up to 300 latents each way is Newton's method, damped to steps of bounded length in the metric of |H|, the Hessian
    with its eigenvalues made positive; every iterate with |H|^-1 is a candidate. Above it is L-BFGS with a diagonal
    of the Hessian estimated by random probes. Nothing asks for a mode: where the density has none (a funnel) the best
    iterate on the way stands, as in "Pathfinder" (Zhang, Carpenter, Gelman, Vehtari 2021, arXiv:2108.03782).

    Args:
        log_density: `(P, D)` to `(P,)`, differentiable.
        starts: `(K, D)`.
        max_steps: iterations from each start.

    Raises:
        ValueError: log p is finite at none of the starts.
    """
    dim = starts.shape[1]
    noise = _noise(dim, starts)
    with torch.no_grad():
        finite = torch.isfinite(log_density(starts))
    if not bool(finite.any()):
        raise ValueError(
            f"log p is not finite at any of {len(starts)} starting points; pass init= with a point where it is"
        )
    climb = _newton if dim <= DENSE else _quasi_newton
    ways = [[_judged(log_density, *q, noise) for q in climb(log_density, x, max_steps)] for x in starts[finite]]
    best = sorted((max(way, key=_elbo) for way in ways if way), key=_elbo, reverse=True)
    if not best or not math.isfinite(best[0].elbo):
        unit = torch.full_like(starts[0], 0.1)
        return [_judged(log_density, starts[finite][0], unit if dim > DENSE else torch.diag(unit), noise)]
    return best


def _elbo(q: Gaussian) -> float:
    return q.elbo


def missed(flow: Flow, log_density: LogDensity, log_evidence: float, candidates: Sequence[Gaussian]) -> list[Gaussian]:
    """Those Gaussians of comparable mass whose centre the flow hardly ever reaches: modes that it left out.

    At such a centre the flow's density lies 5 nats below the posterior's, and its ELBO is within 5 nats of log Z.
    """
    found: list[Gaussian] = []
    for q in candidates:
        if q.elbo < log_evidence - 5.0 or any(_same(q, other) for other in found):
            continue
        with torch.no_grad():
            log_p, log_q = log_density(q.loc.unsqueeze(0)), flow.log_prob(q.loc.unsqueeze(0))
        if float(log_p) - log_evidence - float(log_q) > 5.0:
            found.append(q)
    return found


def _same(q: Gaussian, other: Gaussian) -> bool:
    """Whether two centres are within three of the first's standard deviations in every latent."""
    sd = q.scale if q.scale.dim() == 1 else q.scale.square().sum(-1).sqrt()
    return bool(((q.loc - other.loc).abs() <= 3.0 * sd).all())


def _noise(dim: int, like: Tensor) -> Tensor:
    """The same standard draws for every candidate, so that ELBOs compare."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(_TRIES, dim, generator=generator, dtype=torch.float64).to(like)


def _judged(log_density: LogDensity, loc: Tensor, scale: Tensor, noise: Tensor) -> Gaussian:
    """The Gaussian with its ELBO; draws at which log p is not finite count as its worst finite one, less 100 nats."""
    q = Gaussian(loc, scale, -math.inf)
    with torch.no_grad():
        log_p = log_density(q.draw(noise))
    finite = torch.isfinite(log_p)
    if int(finite.sum()) < len(noise) // 2:
        return q
    worst = log_p[finite].min() - 100.0
    log_q = -0.5 * noise.square().sum(-1) - 0.5 * len(loc) * math.log(2 * math.pi) - q.log_scale()
    return Gaussian(loc, scale, float((torch.where(finite, log_p, worst) - log_q).mean()))


def _newton(log_density: LogDensity, x: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Iterates (x, Cholesky factor of |H|^-1) of a damped Newton ascent."""
    way, radius = [], 1.0
    value, slope, hessian = _derivatives(log_density, x)
    for _ in range(steps):
        if not bool(torch.isfinite(hessian).all()):
            break
        curvature, axes = torch.linalg.eigh(-hessian)
        positive = curvature.abs().clamp_min(1e-13 * float(curvature.abs().max()) + 1e-300)
        scale, failed = torch.linalg.cholesky_ex((axes / positive) @ axes.T)
        if not int(failed):
            way.append((x, scale))
        step = axes @ ((axes.T @ slope) / positive)
        decrement = float(slope @ step)
        if not decrement > _TOLERANCE:
            break
        share = _line_search(log_density, x, step, value, decrement, min(1.0, radius / math.sqrt(decrement)))
        if share == 0.0:
            break
        radius = max(2.0 * share * math.sqrt(decrement), 1e-3)
        x = x + share * step
        value, slope, hessian = _derivatives(log_density, x)
    return way


def _line_search(
    log_density: LogDensity, x: Tensor, step: Tensor, value: Tensor, decrement: float, share: float
) -> float:
    """The largest of share, share / 4, ... at which log p grows enough; 0 where none does."""
    shares = share * 0.25 ** torch.arange(12, dtype=x.dtype, device=x.device)
    with torch.no_grad():
        found = log_density(x + shares.unsqueeze(-1) * step)
    good = torch.isfinite(found) & (found - value >= 1e-4 * shares * decrement)
    return float(shares[int(good.int().argmax())]) if bool(good.any()) else 0.0


def _derivatives(log_density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p, its gradient and its Hessian at one point: one batched pass, a row for each row of the Hessian."""
    rows = x.detach().expand(len(x), -1).clone().requires_grad_()
    value = log_density(rows)
    (slope,) = torch.autograd.grad(value.sum(), rows, create_graph=True)
    if not slope.requires_grad:  # log p is linear
        return value[0].detach(), slope[0].detach(), torch.zeros_like(slope)
    (hessian,) = torch.autograd.grad(slope.diagonal().sum(), rows, materialize_grads=True)
    return value[0].detach(), slope[0].detach(), 0.5 * (hessian + hessian.T)


def _quasi_newton(log_density: LogDensity, x: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Iterates (x, diagonal of the scale) of L-BFGS, every few steps."""
    x = x.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=4, history_size=20, line_search_fn="strong_wolfe")
    way = [(x.detach().clone(), _diagonal_scale(log_density, x))]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_density(x.unsqueeze(0))[0]
        loss.backward()
        return loss

    last = math.inf
    for i in range(steps):
        loss = float(optimizer.step(closure).detach())
        if not math.isfinite(loss) or not bool(torch.isfinite(x).all()):
            break
        done = abs(last - loss) < 1e-4 * (1.0 + 1e-3 * abs(loss))
        if done or i % 3 == 0:
            way.append((x.detach().clone(), _diagonal_scale(log_density, x)))
        if done:
            break
        last = loss
    return way


def _diagonal_scale(log_density: LogDensity, x: Tensor, probes: int = 64) -> Tensor:
    """diag(-H)^(-1/2) by Hutchinson's probes, held between 1e-4 and 10 times the median."""
    generator = torch.Generator().manual_seed(2)
    signs = (torch.randint(0, 2, (probes, len(x)), generator=generator) * 2 - 1).to(x)
    rows = x.detach().expand(probes, -1).clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(log_density(rows).sum(), rows, create_graph=True)
        (product,) = torch.autograd.grad((slope * signs).sum(), rows, materialize_grads=True)
    curvature = -(product * signs).mean(0)
    middle = curvature.abs().median().clamp_min(1e-12)
    return curvature.clamp(min=0.01 * middle, max=1e8 * middle).rsqrt().detach()
