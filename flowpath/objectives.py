"""Objectives: modules whose forward returns the loss that a training loop makes small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowpath.flow import Flow

LogDensity = Callable[[Tensor], Tensor]


class MaximumLikelihood(nn.Module):
    r"""The negative mean log likelihood of a batch, weighted:

    .. math:: L = -\frac{1}{B} \sum_{i=1}^{B} w_i \log q(x_i \mid c_i).

    Weights that average one over the whole data set make the mean over batches the weighted log likelihood of that
    set; a negative weight pushes density away. Being a module, the objective goes where a module goes: into DDP,
    torch.compile or a loop of your own.

    `last` holds log q of the latest batch `(B,)`, detached, for logging; None before the first.

    Args:
        flow: the flow to fit; anything with `log_prob(x, context)` will do.

    Raises:
        ValueError: from `forward`: weights of another shape than the batch.

    Example:
        >>> import torch, flowpath as fp
        >>> objective = fp.MaximumLikelihood(fp.nsf(2, transforms=1))
        >>> loss = objective(torch.zeros(4, 2), weights=torch.tensor([1.0, 1.0, 2.0, 0.0]))
        >>> loss, objective.last.shape
        (tensor(1.8379, grad_fn=<NegBackward0>), torch.Size([4]))
    """

    last: Tensor | None

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.last = None

    def forward(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Rows x `(B, *event)`, context `(B, C)` and weights `(B,)` to the loss, a scalar."""
        log_q = self.flow.log_prob(x, context)
        self.last = log_q.detach()
        if weights is None:
            return -log_q.mean()
        if weights.shape != log_q.shape:
            raise ValueError(
                f"MaximumLikelihood expects a weight for each row, shape {tuple(log_q.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        # a row of weight 0 counts for nothing even where its density is 0
        return -torch.where(weights == 0, torch.zeros_like(log_q), weights * log_q).mean()


class ForwardKL(nn.Module):
    r"""KL(p || q) up to the entropy of p, from samples of p; with the score of p, by its path gradient.

    Without `log_density` this is maximum likelihood. With it, the divergence is taken in noise space, KL(p0 || q0)
    with p0 the law of z = T(x): its gradient E_p[d_z (log p0 - log q0) dz/dphi] vanishes pointwise at q = p. The
    samples must then be exact draws of p.

    "Fast and unified path gradient estimators for normalizing flows" (Vaitl, Winkler, Richter, Kessel 2024,
    arXiv:2403.15881).

    `last` holds log q of the latest batch, detached.

    Args:
        flow: the flow q.
        log_density: log p, differentiable, or None.

    Example:
        >>> import torch, flowpath as fp
        >>> x = torch.randn(64, 2)
        >>> fp.ForwardKL(fp.realnvp(2), lambda x: -0.5 * x.square().sum(-1))(x).backward()
    """

    def __init__(self, flow: Flow, log_density: LogDensity | None = None) -> None:
        super().__init__()
        self.flow, self.log_density = flow, log_density
        self.last: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The loss, a scalar, from samples x `(N, *event)` of p and their weights `(N,)`."""
        values = -self.flow.log_prob(x, context) if self.log_density is None else self._path(x, context)
        self.last = -values.detach()
        return values.mean() if weights is None else (weights * values).sum() / weights.sum()

    def _path(self, x: Tensor, context: Tensor | None) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_density(leaf).sum(), leaf)  # type: ignore[misc]
        r = self.flow.record_noise(x, context)
        log_held, base_score = r.at_held_noise()
        g = self.flow.transform.pull_score(r.record, score) - base_score
        path = (r.z * g).flatten(r.ladj.dim()).sum(-1)
        value = -(r.log_base + r.ladj).detach()
        return value + (path - path.detach()) - (log_held - log_held.detach())
