"""Closed-form variances of gradient estimators, per sample, for z = mu + s u with u ~ N(0, 1).

"Monte Carlo Gradient Estimation in Machine Learning" (Mohamed, Rosca, Figurnov, Mnih 2020, arXiv:1906.10652) has the
costs; the moments are those of a normal, worked out by hand. A score estimator with leave-one-out baselines over N
samples has, with score t = d log q and mean M = E[f t],

    N Var = E[(f - E f)^2 t^2] + Var f E[t^2] / (N - 1) - M^2 + M^2 / (N - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np


def square(k: float, mu: float, s: float) -> tuple[float, float]:
    """Pathwise and score variance in mu of (z - k)^2."""
    d = mu - k
    return 4 * s**2, d**4 / s**2 + 14 * d**2 + 15 * s**2


def cosine(k: float, mu: float, s: float) -> tuple[float, float]:
    """Pathwise and score variance in mu of cos(k z)."""
    e, decay = math.exp(-(k**2) * s**2 / 2), math.exp(-2 * k**2 * s**2) * math.cos(2 * k * mu)
    mean2 = (k * e * math.sin(k * mu)) ** 2
    return k**2 / 2 * (1 - decay) - mean2, (1 + (1 - 4 * k**2 * s**2) * decay) / (2 * s**2) - mean2


def bump(k: float, mu: float, s: float) -> tuple[float, float]:
    """Pathwise and score variance in mu of exp(-k z^2)."""
    a, b = 1 + 2 * k * s**2, 1 + 4 * k * s**2
    c, m, v = b**-0.5 * math.exp(-2 * k * mu**2 / b), mu / b, s**2 / b
    mean2 = (2 * k * mu / a * a**-0.5 * math.exp(-k * mu**2 / a)) ** 2
    return 4 * k**2 * (m**2 + v) * c - mean2, ((m - mu) ** 2 + v) * c / s**4 - mean2


def leave_one_out(f: Callable[[np.ndarray], np.ndarray], mu: float, s: float, n: int) -> float:
    """The formula above for a cost f of one number, its moments by Gauss-Hermite quadrature."""
    u, w = _nodes()
    cost, t = f(mu + s * u), u / s
    spread = (w * (cost - w @ cost) ** 2).sum()
    mean2 = float(w @ (cost * t)) ** 2
    return float((w * (cost - w @ cost) ** 2) @ t**2 + spread / s**2 / (n - 1) - mean2 + mean2 / (n - 1))


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    u, w = np.polynomial.hermite_e.hermegauss(180)
    return u, w / w.sum()


def norm(d: int, s: float, n: int) -> dict[str, float]:
    """f = |z|^2 at mu = 0 in d dimensions: the variance in each coordinate of mu."""
    return {
        "pathwise": 4 * s**2,
        "score": (d + 2) * (d + 4) * s**2,
        "leave-one-out": (2 * d + 8 + 2 * d / (n - 1)) * s**2,
    }


def best_weight(s: np.ndarray) -> float:
    """The weight of the score part with the least variance, in [0, 1]: see `divergence`."""
    w = 1 / s**2 + 2
    return float(np.clip(-((s**2 - 1) * w).sum() / w.sum(), 0.0, 1.0))


def divergence(s: np.ndarray, n: int) -> dict[str, float]:
    """KL(N(0, diag s^2) || N(0, I)): trace of the variance in (mu, log s), per coordinate.

    With weight c of the score part it is the mean of (s^2 - 1 + c)^2 (1 / s^2 + 2).
    """
    d = len(s)

    def weighted(c: float) -> float:
        return float(((s**2 - 1 + c) ** 2 * (1 / s**2 + 2)).mean())

    def second_moments(shift: float) -> float:
        """Sum of E[f^2 t^2] over the parameters, the cost f = shift + sum a u^2."""
        others = shift + a.sum() - a
        square_of = others**2 + 2 * ((a**2).sum() - a**2)
        in_mu = (square_of + 6 * a * others + 15 * a**2) / s**2
        in_log_s = 2 * square_of + 20 * a * others + 78 * a**2
        return float((in_mu + in_log_s).sum())

    a = (s**2 - 1) / 2
    mean2, fisher = float((4 * a**2).sum()), float((1 / s**2 + 2).sum())
    spread = 2 * float((a**2).sum())
    baseline = second_moments(-float(a.sum())) + spread * fisher / (n - 1) - mean2 + mean2 / (n - 1)
    return {
        "score": (second_moments(-float(np.log(s).sum())) - mean2) / d,
        "leave-one-out": baseline / d,
        "total": weighted(1.0),
        "path": weighted(0.0),
        "auto": weighted(best_weight(s)),
    }
