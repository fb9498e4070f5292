"""Variational objectives: divergences from a density known up to a constant, as losses over the flow's own draws.

Each keeps `last`, the log weights log p - log q of its latest draws, detached: `fp.ess(objective.last)` is their
effective sample size, `fp.psis(objective.last)` their k-hat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.draws import Noise, draw
from flowpath.estimators import Estimator, Pathwise, Score, least_variance_weight
from flowpath.flow import Flow
from flowpath.objectives import LogDensity


class ReverseKL(nn.Module):
    r"""KL(q || p) up to log Z: the mean of log q(z) - log p(z) over draws z ~ q of the flow.

    With `Pathwise(score_weight="auto")` the weight c of the score part is the one of least variance,
    c = -<p1 - p2, s1 - s2> / |s1 - s2|^2 from path and score gradients of two half batches, clipped to [0, 1] and
    averaged over the last ten or so. It is estimated on draws of its own every `update_every` steps, so the gradient
    stays unbiased, and lives in buffers, so it is saved with the objective.

    Args:
        flow: the flow q.
        log_density: unnormalised log p, `(n, *batch, *event)` to `(n, *batch)`; a module's parameters get gradients.
        estimator: any Estimator; by default `Pathwise("auto")`, or `Score()` where the flow has no rsample.
        num_samples: draws a step.
        context: `(*batch, C)` for a conditional flow.
        noise: as in `fp.draw`: `fp.Sobol()` for freshly scrambled points each step.
        update_every: steps between two estimates of "auto".

    Example:
        >>> import torch, flowpath as fp
        >>> objective = fp.ReverseKL(fp.realnvp(2), lambda z: -0.5 * z.square().sum(-1), num_samples=32)
        >>> objective().backward()
    """

    context: Tensor | None
    score_weight: Tensor
    updates: Tensor

    def __init__(
        self,
        flow: Flow,
        log_density: LogDensity,
        estimator: Estimator | None = None,
        *,
        num_samples: int = 256,
        context: Tensor | None = None,
        noise: Noise = None,
        update_every: int = 25,
    ) -> None:
        super().__init__()
        check_count("ReverseKL", "num_samples", num_samples)
        check_count("ReverseKL", "update_every", update_every)
        self.flow, self.log_density, self.noise = flow, log_density, noise
        self.estimator = estimator or (Pathwise("auto") if flow.has_rsample else Score())
        self.num_samples, self.update_every = num_samples, update_every
        self.register_buffer("context", context)
        self.register_buffer("score_weight", torch.ones((), dtype=flow.base.like.dtype))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._count = 0
        self.last: Tensor | None = None

    @property
    def auto(self) -> bool:
        """Whether the weight of the score part is estimated along the way."""
        return isinstance(self.estimator, Pathwise) and isinstance(self.estimator.score_weight, str)

    def forward(self) -> Tensor:
        """The loss, a scalar."""
        estimator = self.estimator
        if self.auto:
            if self.training and torch.is_grad_enabled() and self._count % self.update_every == 0:
                self._update_weight()
            self._count += 1
            estimator = Pathwise(self.score_weight)
        cost = estimator.surrogate(
            self._cost, self.flow(self.context), self.num_samples, noise=self.noise, log_q_weight=1.0
        )
        self.last = -cost.detach()
        return cost.mean()

    def _cost(self, z: Tensor) -> Tensor:
        return -self.log_density(z)

    def _update_weight(self) -> None:
        """One more pair of half batches; each moves the average by a bounded step, whatever its tails."""
        params = [p for p in self.flow.parameters() if p.requires_grad]
        pairs = [self._half_batch(params) for _ in range(2)]
        weight = least_variance_weight(pairs[0], pairs[1])
        if torch.isfinite(weight):
            self.updates.add_(1)
            self.score_weight.lerp_(weight.to(self.score_weight), 1.0 / min(int(self.updates), 10))

    def _half_batch(self, params: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Path and score gradients of the loss over half a batch of fresh draws, flattened."""
        d = draw(self.flow(self.context), max(self.num_samples // 2, 1), self.noise)
        path = (d.log_prob_path + self._cost(d.value)).mean()
        total = path - d.log_prob_path.mean() + d.log_prob.mean()
        grads = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)]
            )
            for loss in (path, total)
        ]
        return grads[0], grads[1] - grads[0]


class IWBound(nn.Module):
    r"""The importance-weighted bound -E[log mean_k p(z_k) / q(z_k)] over K draws, with the DReG gradient.

    The flow's parameters receive sum_k w_k^2 d_z (log p - log q) dz_k/dphi with normalised weights w_k: squared, the
    unsquared form is biased. log_density's own parameters receive sum_k w_k d log p. Unlike the plain gradient, whose
    signal-to-noise ratio falls as K^(-1/2), this one's grows as K^(1/2).

    "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519); "Doubly Reparameterized
    Gradient Estimators" (Tucker, Lawson, Gu, Maddison 2018, arXiv:1810.04152).

    Args:
        flow: the flow q, with rsample.
        log_density: unnormalised log p, `(K, *batch, *event)` to `(K, *batch)`.
        num_samples: K.
        batch_size: independent bounds averaged in one step.
        context: `(*batch, C)` for a conditional flow.
        doubly: False for the plain gradient of the bound, to compare with.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.IWBound(fp.realnvp(2), lambda z: -0.5 * z.square().sum(-1), num_samples=8)().backward()
    """

    context: Tensor | None

    def __init__(
        self,
        flow: Flow,
        log_density: LogDensity,
        *,
        num_samples: int = 16,
        batch_size: int = 1,
        context: Tensor | None = None,
        doubly: bool = True,
    ) -> None:
        super().__init__()
        check_count("IWBound", "num_samples", num_samples)
        check_count("IWBound", "batch_size", batch_size)
        if not flow.has_rsample:
            raise ValueError(f"IWBound needs a flow whose draws carry gradients; {type(flow.base).__name__} has none")
        self.flow, self.log_density, self.doubly = flow, log_density, doubly
        self.num_samples, self.batch_size = num_samples, batch_size
        self.register_buffer("context", context)
        self.last: Tensor | None = None

    def forward(self) -> Tensor:
        """The loss, a scalar."""
        d = draw(self.flow(self.context), self.num_samples * self.batch_size)
        z = d.value.unflatten(0, (self.num_samples, self.batch_size))
        shape = z.shape[: z.dim() - len(self.flow.event_shape)]
        if not self.doubly:
            log_w = self.log_density(z) - d.log_prob.reshape(shape)
            return self._bound(log_w).mean()
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            log_p = self.log_density(leaf)
        (slope,) = torch.autograd.grad(log_p.sum(), leaf, retain_graph=True)
        log_w = log_p.detach() - d.log_prob.detach().reshape(shape)
        w = torch.softmax(log_w, 0)
        path = (z * slope).flatten(log_w.dim()).sum(-1) - d.log_prob_path.reshape(shape)
        surrogate = -(w.square() * path + w * log_p).sum(0)
        return (self._bound(log_w) + surrogate - surrogate.detach()).mean()

    def _bound(self, log_w: Tensor) -> Tensor:
        self.last = log_w.detach()
        return math.log(self.num_samples) - torch.logsumexp(log_w, 0)


class LogVariance(nn.Module):
    r"""Half the variance of log q(z) - log p(z) over draws held fixed: `Score` with leave-one-out in another guise.

    Needs no gradient of log p, and no path. "VarGrad: A Low-Variance Gradient Estimator for Variational Inference"
    (Richter, Boustati, Nüsken, Ruiz, Akyildiz 2020, arXiv:2010.10436).

    Args:
        flow: the flow q.
        log_density: unnormalised log p, `(n, *batch, *event)` to `(n, *batch)`.
        num_samples: draws a step, at least 2.
        context: `(*batch, C)` for a conditional flow.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.LogVariance(fp.realnvp(2), lambda z: -0.5 * z.square().sum(-1), num_samples=32)().backward()
    """

    context: Tensor | None

    def __init__(
        self, flow: Flow, log_density: LogDensity, *, num_samples: int = 256, context: Tensor | None = None
    ) -> None:
        super().__init__()
        check_count("LogVariance", "num_samples", num_samples, least=2)
        self.flow, self.log_density, self.num_samples = flow, log_density, num_samples
        self.register_buffer("context", context)
        self.last: Tensor | None = None

    def forward(self) -> Tensor:
        """The loss, a scalar."""
        q = self.flow(self.context)
        z = q.sample(torch.Size([self.num_samples]))
        with torch.no_grad():
            log_p = self.log_density(z)
        log_ratio = q.log_prob(z) - log_p
        self.last = -log_ratio.detach()
        return 0.5 * log_ratio.var(0).mean()
