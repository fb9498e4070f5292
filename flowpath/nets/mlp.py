"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from flowpath.nets.common import Activation, Net, zero_final
from flowpath.registry import register


@register("MLP")
class MLP(Net):
    """A multilayer perceptron whose last layer starts at zero.

    Args:
        in_features: width of x (0: it looks at the context alone).
        out_features: how many features need parameters.
        num_params: numbers a feature needs (`element.num_params`).
        context: width of the context, concatenated to x.
        hidden_features: widths of the hidden layers; empty for a linear conditioner.
        activation: a class or function that makes an activation module.
        dropout: probability of dropping a hidden unit in training mode.

    Raises:
        ValueError: a size that is no whole number of the range, or a dropout outside [0, 1).

    Example:
        >>> import torch, flowpath as fp
        >>> net = fp.MLP(2, 3, num_params=5, context=1)
        >>> net(torch.randn(7, 2), torch.randn(7, 1)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_params: int = 1,
        context: int = 0,
        hidden_features: Sequence[int] = (128, 128),
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, num_params, context, hidden_features, activation, dropout)
        widths = [in_features + context, *hidden_features]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.final = zero_final(widths[-1], num_params * out_features)

    def numbers(self, h: Tensor) -> Tensor:
        """h `(in_features + context, N)` -> numbers `(num_params, out_features, N)`."""
        return self._perceptron(h, [(layer.weight, layer.bias) for layer in (*self.hidden, self.final)])
