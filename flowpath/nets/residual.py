"""Residual networks: blocks h + f(h)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.nets.common import Activation, Net, apply_linear, feature_major, zero_final
from flowpath.registry import register


class Residual(Net, ABC):
    """What residual networks share: blocks h + f(h) between a first layer and a last one that starts at zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_params: int,
        context: int,
        width: int,
        blocks: int,
        activation: Activation,
        dropout: float,
    ) -> None:
        super().__init__(in_features, out_features, num_params, context, [width], activation, dropout)
        check_count(type(self).__name__, "blocks", blocks, least=0)
        self.initial = nn.Linear(in_features + context, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.final = zero_final(width, num_params * out_features)

    @abstractmethod
    def _inner(self, h: Tensor, i: int, context: Tensor | None) -> Tensor:
        """What block i adds to h `(width, N)`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        return self._params(self._blocks(feature_major(x, context), context), x)

    def _blocks(self, h: Tensor, context: Tensor | None) -> Tensor:
        """Numbers `(num_params, out_features, N)` of h `(in_features + context, N)`."""
        h = apply_linear(h, self.initial)
        for i in range(len(self.first)):
            h = h + self._inner(h, i, context)
        return self._numbers(h, self.final.weight, self.final.bias)


@register("ResidualMLP")
class ResidualMLP(Residual):
    """A residual network of pre-activated blocks, h + W2 a(W1 a(h)), whose last layer starts at zero.

    The conditioner of "Neural Spline Flows" (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Args:
        in_features, out_features, num_params, context, activation, dropout: as in `MLP`.
        hidden_features: the width of the blocks.
        blocks: how many blocks.

    Raises:
        ValueError: as `MLP`.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.ResidualMLP(2, 3, num_params=5)(torch.randn(7, 2)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_params: int = 1,
        context: int = 0,
        hidden_features: int = 128,
        blocks: int = 2,
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        check_count("ResidualMLP", "blocks", blocks)
        sizes = (in_features, out_features, num_params, context, hidden_features, blocks)
        super().__init__(*sizes, activation, dropout)

    def _inner(self, h: Tensor, i: int, context: Tensor | None) -> Tensor:
        inner = self._act(apply_linear(self.activation(h), self.first[i]))
        return apply_linear(inner, self.second[i])

    def numbers(self, h: Tensor) -> Tensor:
        """h `(in_features + context, N)` -> numbers `(num_params, out_features, N)`."""
        return self._blocks(h, None)
