"""The "auto" weight of the score part, followed by a traced step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowpath.svi.elbo import PathMixin


class ScoreWeight:
    """Estimates the weight as often as the ELBO does, and keeps it in a tensor that a graph reads.

    Args:
        elbo: an ELBO with the weight "auto"; its `weight` goes on showing the one in use.
        like: a parameter, for dtype and device.
    """

    def __init__(self, elbo: PathMixin, like: Tensor) -> None:
        self.auto = elbo
        self.value = torch.tensor(float(elbo.weight), dtype=like.dtype, device=like.device)
        self.elbo = elbo.at(self.value)

    def is_due(self) -> bool:
        """Whether a new estimate comes before this step; counts the step."""
        self.auto._count += 1
        return (self.auto._count - 1) % self.auto.update_every == 0

    def move(self, half: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Take a new estimate from a function for the path and score gradients of a half batch."""
        self.auto.take_half_batches(half(), half())
        self.value.fill_(float(self.auto.weight))
