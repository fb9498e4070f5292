"""An affine map across many features in linear time: diagonal times low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.registry import register
from flowpath.transform import Transform
from flowpath.transforms.linear import raw_scale, unit_softplus


@register("LowRankAffine")
class LowRankAffine(Transform):
    r"""x = m + s (I + U U^T)(I + V V^T)^{-1} z with U and V of few columns: correlations of many features, cheaply.

    .. math:: \text{ladj}_{z \to x} = \sum_i \log s_i + \log\det(I_r + U^\top U) - \log\det(I_r + V^\top V)

    U stretches r directions, V shrinks r others, beside the diagonal s > 0; all values of the parameters are
    invertible. Both directions are exact and cost O(features * rank + rank^3), by Woodbury's identity. U and V start
    equal and random, so the map starts at the identity, but not at a stationary point of it.

    Args:
        features: width of the event.
        rank: columns of U and of V, at most `features`.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import torch, flowpath as fp
        >>> x, ladj = fp.LowRankAffine(2000, rank=8).inverse(torch.randn(5, 2000))
        >>> x.shape, ladj.shape
        (torch.Size([5, 2000]), torch.Size([5]))
    """

    def __init__(self, features: int, rank: int = 16) -> None:
        super().__init__(features)
        check_count("LowRankAffine", "rank", rank)
        if rank > features:
            raise ValueError(f"LowRankAffine expects a rank of at most {features} (features), got {rank}")
        self.shift, self.raw = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
        start = torch.randn(features, rank) / features**0.5
        self.stretch, self.shrink = nn.Parameter(start), nn.Parameter(start.clone())

    @torch.no_grad()
    def set_to(self, shift: Tensor, scale: Tensor) -> LowRankAffine:
        """Make it x = shift + scale z, for a scale per feature `(features,)`; returns itself."""
        self.shift.copy_(shift)
        self.raw.copy_(raw_scale(scale))
        self.shrink.copy_(self.stretch)
        return self

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = unit_softplus(self.raw)
        z = _widen(self.shrink, _narrow(self.stretch, (x - self.shift) / scale))
        return z, -self._log_det(scale).expand(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        scale = unit_softplus(self.raw)
        x = self.shift + scale * _widen(self.stretch, _narrow(self.shrink, z))
        return x, self._log_det(scale).expand(z.shape[:-1])

    def _log_det(self, scale: Tensor) -> Tensor:
        return scale.log().sum() + _log_det_of(self.stretch) - _log_det_of(self.shrink)


def _gram(u: Tensor) -> Tensor:
    """Cholesky factor of I + U^T U."""
    return torch.linalg.cholesky(u.T @ u + torch.eye(u.shape[1], dtype=u.dtype, device=u.device))


def _log_det_of(u: Tensor) -> Tensor:
    """log det(I + U U^T), twice the log diagonal of the factor."""
    return 2.0 * _gram(u).diagonal().log().sum()


def _widen(u: Tensor, x: Tensor) -> Tensor:
    """Rows x (I + U U^T)."""
    return x + (x @ u) @ u.T


def _narrow(u: Tensor, x: Tensor) -> Tensor:
    """Rows x (I + U U^T)^{-1} = x - x U (I + U^T U)^{-1} U^T."""
    return x - (x @ u) @ torch.cholesky_solve(u.T, _gram(u))
