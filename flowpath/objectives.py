"""Objectives: modules whose forward returns the loss that a training loop makes small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpath.flow import Flow


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
