"""The two orders of a tensor's axes: features last, as users see it, and first, as the arithmetic runs fastest.

With the features first the batch is the last, contiguous axis, and every operation runs along it. Both ways are views.
"""

from __future__ import annotations

from torch import Tensor


def features_first(x: Tensor) -> Tensor:
    """`(*batch, d)` as `(d, *batch)`."""
    return x.t() if x.dim() == 2 else x.movedim(-1, 0)


def features_last(x: Tensor) -> Tensor:
    """`(d, *batch)` as `(*batch, d)`."""
    return x.t() if x.dim() == 2 else x.movedim(0, -1)


def numbers_first(params: Tensor) -> Tensor:
    """Params `(P, *batch, d)` as `(P, d, *batch)`."""
    return params.transpose(1, 2) if params.dim() == 3 else params.movedim(-1, 1)


def features_flat(x: Tensor) -> Tensor:
    """`(*batch, d)` as `(d, N)`, N rows in all."""
    return x.t() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).t()
