"""Gradient estimators of E_q[f(z)]: immutable values whose one method gives a surrogate loss per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowpath.draws import Draw, Noise, draw
from flowpath.flow import Flow

Cost = Callable[[Tensor], Tensor]
Baseline = Literal["leave_one_out", "mean"] | Callable[[Tensor], Tensor] | None


@runtime_checkable
class Estimator(Protocol):
    r"""Estimates the gradient of :math:`E_q[f(z) + w \log q(z)]` in q's parameters, and in f's own.

    The one method draws from q and returns surrogates `(n, *batch)`: their values are the costs, and the gradient of
    their mean over the first dim is the estimate. w = `log_q_weight` is 0 for a plain expectation and 1 for a reverse
    KL divergence; it is passed apart from f because log q has two gradient channels (see `fp.draw`).
    """

    def surrogate(
        self, f: Cost, q: Distribution, num_samples: int, *, noise: Noise = None, log_q_weight: float = 0.0
    ) -> Tensor: ...


@dataclass(frozen=True)
class Pathwise:
    r"""The pathwise (reparameterisation) gradient: z = g(eps, phi), grad E[f(z)] = E[grad_phi f(g(eps, phi))].

    Where the cost holds log q, its gradient is path + c score with the weight c of the score part, whose mean is zero:
    c = 1 is the plain reparameterisation gradient, c = 0 the path gradient ("sticking the landing"), which vanishes at
    q = p but is noisier where q is much too narrow. "auto" lets the objective estimate the c of least variance.

    "Auto-Encoding Variational Bayes" (Kingma, Welling 2013, arXiv:1312.6114); "Sticking the Landing" (Roeder, Wu,
    Duvenaud 2017, arXiv:1703.09194); "Using Large Ensembles of Control Variates for Variational Inference" (Geffner,
    Domke 2018, arXiv:1810.12482).

    Args:
        score_weight: a number, or "auto".

    Raises:
        ValueError: from `surrogate`: q has no rsample, or f gives no gradient back to z; both name `Score`.

    Example:
        >>> import torch, flowpath as fp
        >>> mu = torch.tensor(1.0, requires_grad=True)
        >>> q = torch.distributions.Normal(mu, 1.0)
        >>> fp.expectation(lambda z: 3 * z, q, fp.Pathwise(), num_samples=8).backward()
        >>> mu.grad
        tensor(3.)
    """

    score_weight: float | Tensor | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        w = self.score_weight
        if not (w == "auto" if isinstance(w, str) else isinstance(w, (int, float, Tensor))):
            raise ValueError(f'Pathwise expects score_weight to be a number or "auto", got {w!r}')

    def surrogate(
        self, f: Cost, q: Distribution, num_samples: int, *, noise: Noise = None, log_q_weight: float = 0.0
    ) -> Tensor:
        """Costs f(z) + w log q(z) whose gradient travels the path."""
        if not q.has_rsample:
            raise ValueError(
                f"Pathwise needs draws that carry gradients; {type(q).__name__} has no rsample: use Score()"
            )
        d = draw(q, num_samples, noise)
        cost = _checked(f, d.value, q)
        if d.value.requires_grad and not reaches(cost, d.value):
            raise ValueError(
                "Pathwise: the cost gives no gradient back to its argument (a detach, a comparison, NumPy?), so the "
                "estimate would silently be zero: use Score(), or make f differentiable"
            )
        return cost + log_q_weight * self.log_q(d) if log_q_weight else cost

    def log_q(self, d: Draw) -> Tensor:
        """log q of a draw with the gradient path + c score."""
        c = self.score_weight
        if isinstance(c, str):
            raise ValueError(
                'Pathwise(score_weight="auto") is estimated by an objective, such as ReverseKL; pass a number'
            )
        if isinstance(c, Tensor):
            return c * d.log_prob + (1.0 - c) * d.log_prob_path
        if c == 1.0:
            return d.log_prob
        return d.log_prob_path if c == 0.0 else c * d.log_prob + (1.0 - c) * d.log_prob_path


@dataclass(frozen=True)
class Score:
    r"""The score-function gradient (REINFORCE): grad E[f(z)] = E[(f(z) - b) grad_phi log q(z)].

    Needs no derivative of f, which may be a black box or discontinuous, and no rsample: q may be discrete. Its variance
    grows with the dimension; a baseline b lowers it.

    "Simple statistical gradient-following algorithms" (Williams 1992); leave-one-out: "Buy 4 REINFORCE Samples, Get a
    Baseline for Free!" (Kool, van Hoof, Welling 2019).

    Args:
        baseline: "leave_one_out" (unbiased, needs two samples), "mean" (of the batch; shrinks the gradient by 1 - 1/n),
            a callable of z giving `(n, *batch)`, or None.

    Raises:
        ValueError: another baseline; leave-one-out on one sample.

    Example:
        >>> import torch, flowpath as fp
        >>> q = torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True))
        >>> fp.expectation(lambda b: (b > 0.5).float(), q, fp.Score(), num_samples=8).shape
        torch.Size([3])
    """

    baseline: Baseline = "leave_one_out"

    def __post_init__(self) -> None:
        if not (callable(self.baseline) or self.baseline in ("leave_one_out", "mean", None)):
            raise ValueError(
                f'Score expects baseline "leave_one_out", "mean", None or a callable, got {self.baseline!r}'
            )

    def surrogate(
        self, f: Cost, q: Distribution, num_samples: int, *, noise: Noise = None, log_q_weight: float = 0.0
    ) -> Tensor:
        """Costs f(z) + w log q(z) whose gradient is (cost - b) grad log q at fixed z, and f's own."""
        d = draw(q, num_samples, noise)
        z = d.value.detach()
        cost, log_q = _checked(f, z, q), d.log_prob_score
        cost = cost + log_q_weight * log_q.detach()
        return cost + (cost.detach() - self._level(cost.detach(), z)) * (log_q - log_q.detach())

    def _level(self, cost: Tensor, z: Tensor) -> Tensor | float:
        if self.baseline is None:
            return 0.0
        if callable(self.baseline):
            return self.baseline(z).detach()
        if self.baseline == "mean":
            return cost.mean(0)
        if len(cost) < 2:
            raise ValueError("Score(leave_one_out) expects at least 2 samples, got 1; raise num_samples or use None")
        return (cost.sum(0) - cost) / (len(cost) - 1)


@dataclass(frozen=True)
class Enumerate:
    """The exact expectation over a small discrete support: sum_k q(k) f(k). No noise at all.

    Its surrogates are K q(k) f(k), so that their mean over the support is the expectation.

    Raises:
        ValueError: q cannot enumerate its support.

    Example:
        >>> import torch, flowpath as fp
        >>> p = torch.tensor(0.3, requires_grad=True)
        >>> q = torch.distributions.Bernoulli(p)
        >>> fp.expectation(lambda b: (b - 0.2) ** 2, q, fp.Enumerate()).backward()
        >>> p.grad
        tensor(0.6000)
    """

    def surrogate(
        self, f: Cost, q: Distribution, num_samples: int, *, noise: Noise = None, log_q_weight: float = 0.0
    ) -> Tensor:
        """K q(k) (f(k) + w log q(k)) over the K points of the support."""
        try:
            support = q.enumerate_support()
        except NotImplementedError:
            raise ValueError(f"Enumerate expects a finite discrete support; {type(q).__name__} has none") from None
        log_q = q.log_prob(support)
        cost = _checked(f, support, q)
        cost = cost + log_q_weight * log_q if log_q_weight else cost
        return len(support) * log_q.exp() * cost


def expectation(
    f: Cost,
    q: Distribution | Flow,
    estimator: Estimator | None = None,
    *,
    num_samples: int = 1,
    noise: Noise = None,
    reduce: bool = True,
) -> Tensor:
    """The Monte Carlo mean of f under q, whose backward is the estimator of grad E_q[f].

    Args:
        f: maps `(n, *batch, *event)` to `(n, *batch)`.
        q: a flow, `flow(context)`, or a torch or Pyro distribution.
        estimator: `Pathwise()` where q has rsample and `Score()` where not, by default.
        num_samples: how many draws.
        noise: as in `fp.draw`.
        reduce: False for the surrogates of single samples, `(n, *batch)`.

    Returns:
        `(*batch,)`.

    Raises:
        ValueError: f returns another shape, or the estimator does not suit q or f.

    Example:
        >>> import torch, flowpath as fp
        >>> flow = fp.realnvp(2)
        >>> loss = fp.expectation(lambda z: z.square().sum(-1), flow, num_samples=64)
        >>> loss.backward()
    """
    q = q() if isinstance(q, Flow) else q
    if estimator is None:
        estimator = Pathwise() if q.has_rsample else Score()
    values = estimator.surrogate(f, q, num_samples, noise=noise)
    return values.mean(0) if reduce else values


def least_variance_weight(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    r"""The weight c of the score part that gives the gradient path + c score least variance, from two half batches.

    .. math:: c = -\frac{\langle p_1 - p_2,\, s_1 - s_2 \rangle}{|s_1 - s_2|^2} \quad \text{clipped to } [0, 1]

    Args:
        first, second: flat path and score gradients (p, s) of a half batch each.

    Returns:
        A scalar; NaN where the gradients are not finite.
    """
    path, score = (a - b for a, b in zip(first, second, strict=True))
    weight = -(path @ score) / (score @ score).clamp_min(torch.finfo(score.dtype).tiny)
    return torch.where(torch.isfinite(weight), weight.clamp(0.0, 1.0), torch.nan)


def _checked(f: Cost, z: Tensor, q: Distribution) -> Tensor:
    cost = f(z)
    want = z.shape[: z.dim() - len(q.event_shape)]
    if not isinstance(cost, Tensor) or cost.shape != want:
        got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
        raise ValueError(f"the cost f must map {tuple(z.shape)} to {tuple(want)}, got {got}; sum over the event dims")
    return cost


def reaches(cost: Tensor | None, value: Tensor) -> bool:
    """Whether the graph of cost leads back to value."""
    if cost is None or cost is value:
        return cost is value
    seen, todo = set(), [cost.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node is value.grad_fn or getattr(node, "variable", None) is value:
            return True
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
    return False
