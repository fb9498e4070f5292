"""Linear maps across features: permutations, LU, products of reflections, and a full-rank affine map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowpath.checks import check_count
from flowpath.eager import full_precision
from flowpath.layout import features_first, features_last
from flowpath.nets.mlp import MLP
from flowpath.registry import register
from flowpath.transform import Record, Transform

_UNIT_SOFTPLUS = math.log(math.expm1(1.0))


def unit_softplus(raw: Tensor) -> Tensor:
    """A positive scale that is 1 at 0."""
    return F.softplus(raw + _UNIT_SOFTPLUS)


def raw_scale(scale: Tensor) -> Tensor:
    """The raw number of a scale: `unit_softplus` undone."""
    return scale + torch.log(-torch.expm1(-scale)) - _UNIT_SOFTPLUS


@register("Permutation")
class Permutation(Transform):
    """z = x[order]: features in another order; ladj 0.

    Args:
        order: `order[i]` is the feature that becomes feature i. `Permutation.reverse(d)` and
            `Permutation.random(d, seed)` make the usual ones.

    Raises:
        ValueError: an order that is no permutation of 0 to d - 1.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.Permutation.reverse(3)(torch.tensor([[1.0, 2.0, 3.0]]))[0]
        tensor([[3., 2., 1.]])
    """

    context = None
    order: Tensor
    place: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        places = torch.as_tensor(order, dtype=torch.long)
        if places.dim() != 1 or not torch.equal(places.sort().values, torch.arange(len(places))):
            raise ValueError(f"Permutation expects an order of 0 to d - 1, got {places.tolist()}")
        super().__init__(len(places))
        self.register_buffer("order", places)
        self.register_buffer("place", places.argsort())

    @classmethod
    def reverse(cls, features: int) -> Permutation:
        """The last feature first."""
        check_count("Permutation.reverse", "features", features)
        return cls(list(range(features))[::-1])

    @classmethod
    def random(cls, features: int, seed: int = 0) -> Permutation:
        """A random order, the same for the same seed; torch's global generator is not touched."""
        check_count("Permutation.random", "features", features)
        return cls(torch.randperm(features, generator=torch.Generator().manual_seed(seed)).tolist())

    def _take(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        moved = features_last(features_first(x).index_select(0, order))
        return moved, x.new_zeros(x.shape[:-1])

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._take(x, self.order)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._take(z, self.place)

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        return self._take(score, self.order if record.direction == "forward" else self.place)[0]


class _Matrix(Transform):
    """A linear map of constant Jacobian: the score is carried by the map's transposed inverse."""

    context = None

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        with torch.no_grad():
            return self._pull(score, forward=record.direction == "forward")

    def _pull(self, score: Tensor, *, forward: bool) -> Tensor:
        """score J^{-1} for row vectors, J the Jacobian of the direction."""
        raise TypeError(f"{type(self).__name__} must define _pull(score, forward=)")


@register("LU")
class LU(_Matrix):
    r"""z = L U x + b with L unit lower, U upper triangular of positive diagonal; ladj = sum log diag U.

    Forward is two products, the inverse two triangular solves; both exact. Starts at the identity.
    "Glow" (Kingma, Dhariwal 2018, arXiv:1807.03039), section 3.2.

    Args:
        features: width of the event.
        bias: whether there is a shift b.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.LU(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(t(x)[0], x)
        True
    """

    def __init__(self, features: int, *, bias: bool = True) -> None:
        super().__init__(features)
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.diagonal = nn.Parameter(torch.full((features,), _UNIT_SOFTPLUS))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        diagonal = F.softplus(self.diagonal)
        lower = self.lower.tril(-1) + torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        return lower, self.upper.triu(1) + torch.diag_embed(diagonal), diagonal.log().sum()

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self._factors()
        with full_precision(x):
            z = x @ upper.T @ lower.T
        return z if self.bias is None else z + self.bias, ladj.expand(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, ladj = self._factors()
        z = z if self.bias is None else z - self.bias
        z = _solve_right(lower.T, z, upper=True)
        return _solve_right(upper.T, z, upper=False), -ladj.expand(z.shape[:-1])

    def _pull(self, score: Tensor, *, forward: bool) -> Tensor:
        lower, upper, _ = self._factors()
        if forward:
            return _solve_right(lower, _solve_right(upper, score, upper=True), upper=False)
        with full_precision(score):
            return score @ lower @ upper


def _solve_right(matrix: Tensor, x: Tensor, *, upper: bool) -> Tensor:
    """Row vectors y with y matrix = x, for a triangular matrix and x `(*batch, d)`."""
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    solved = torch.linalg.solve_triangular(matrix, rows, upper=upper, left=False)
    return solved if x.dim() > 1 else solved.squeeze(0)


@register("Householder")
class Householder(_Matrix):
    r"""z = H_k ... H_1 x with reflections :math:`H = I - 2 v v^\top / |v|^2`: an orthogonal map, ladj 0.

    The inverse applies the reflections in reverse. `k` is even and the vectors start in equal pairs: the identity.
    "Improving Variational Auto-Encoders using Householder Flow" (Tomczak, Welling 2016, arXiv:1611.09630).

    Args:
        features: width of the event.
        reflections: how many, an even number; by default `features` rounded up to even.

    Raises:
        ValueError: an odd number of reflections.

    Example:
        >>> import torch, flowpath as fp
        >>> z, ladj = fp.Householder(3)(torch.randn(5, 3))
        >>> ladj
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__(features)
        count = features + features % 2 if reflections is None else reflections
        check_count("Householder", "reflections", count)
        if count % 2:
            raise ValueError(f"Householder expects an even number of reflections, got {count}")
        pairs = torch.eye(features)[torch.arange(count // 2) % features]
        self.vectors = nn.Parameter(pairs.repeat_interleave(2, 0))

    def _reflect(self, x: Tensor, vectors: Tensor) -> Tensor:
        unit = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        with full_precision(x):
            for v in unit.unbind(0):
                x = x - 2.0 * (x @ v).unsqueeze(-1) * v
        return x

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reflect(x, self.vectors), x.new_zeros(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reflect(z, self.vectors.flip(0)), z.new_zeros(z.shape[:-1])

    def _pull(self, score: Tensor, *, forward: bool) -> Tensor:
        return self._reflect(score, self.vectors if forward else self.vectors.flip(0))


@register("TriangularAffine")
class TriangularAffine(Transform):
    r"""x = L z + m with L lower triangular of positive diagonal: over a standard normal, a full-rank Gaussian.

    Forward solves z = L^{-1}(x - m), ladj = -sum log diag L; the inverse is one product. With a context, m and L are
    functions of it. Starts at the identity.

    Args:
        features: width of the event.
        context: width of the context; 0 for free parameters.
        hidden_features: hidden layers of the net from context to (m, L).

    Example:
        >>> import torch, flowpath as fp
        >>> gaussian = fp.Flow(fp.TriangularAffine(3), fp.StandardNormal(3))
        >>> gaussian.sample(5).shape
        torch.Size([5, 3])
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, features: int, *, context: int = 0, hidden_features: Sequence[int] = (128, 128)) -> None:
        super().__init__(features, context)
        rows, columns = torch.tril_indices(features, features, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        count = 2 * features + len(rows)
        if context:
            self.net: MLP | None = MLP(context, count, hidden_features=hidden_features)
        else:
            self.net = None
            self.numbers = nn.Parameter(torch.zeros(count))

    @torch.no_grad()
    def set_to(self, shift: Tensor, scale: Tensor) -> TriangularAffine:
        """Make it x = shift + scale z, the scale a number a feature or a lower triangular matrix; returns itself."""
        if self.net is not None:
            raise ValueError("TriangularAffine.set_to expects free parameters; this one is a function of the context")
        diagonal = scale if scale.dim() < 2 else scale.diagonal()
        below = scale[self.rows, self.columns] if scale.dim() == 2 else scale.new_zeros(len(self.rows))
        self.numbers.copy_(torch.cat([shift, raw_scale(diagonal), below]))
        return self

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """m `(*batch, d)`, L `(*batch, d, d)` and sum log diag L `(*batch,)`; no batch dims without a context."""
        numbers = self.numbers if self.net is None or context is None else self.net(context)[0]
        d = self.data_shape[0]  # type: ignore[index]
        shift, raw, below = numbers.split([d, d, numbers.shape[-1] - 2 * d], -1)
        scale = unit_softplus(raw)
        lower = torch.diag_embed(scale)
        index = self.rows * d + self.columns
        lower = lower.flatten(-2).index_add(-1, index, below).unflatten(-1, (d, d))
        return shift, lower, scale.log().sum(-1)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, lower, log_scale = self._parts(context)
        if context is None:
            z = _solve_right(lower.T, x - shift, upper=True)
        else:
            z = torch.linalg.solve_triangular(lower, (x - shift).unsqueeze(-1), upper=False).squeeze(-1)
        return z, -log_scale.expand(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, lower, log_scale = self._parts(context)
        with full_precision(z):
            x = z @ lower.T if context is None else (lower @ z.unsqueeze(-1)).squeeze(-1)
        return x + shift, log_scale.expand(z.shape[:-1])
