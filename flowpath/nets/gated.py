"""A gated conditioner, for flows whose shifts are products of features: conditional Gaussians, hierarchies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.nets.common import apply_linear, feature_major, params_first
from flowpath.registry import register


@register("GatedMLP")
class GatedMLP(nn.Module):
    r"""params = W3 (tanh(W2 tanh(W1 x)) * V x) + b: hidden units that are linear in x, switched by a network of x.

    A unit can hold a product of two features, or a feature times any bounded function of another. Conditional
    Gaussians are made of these: the mean of a group's effect given its neighbours is linear in them, with
    coefficients that depend on the hyperparameters. A plain MLP needs many units for one product. The last layer
    starts at zero. Gated linear units are those of "Language Modeling with Gated Convolutional Networks" (Dauphin,
    Fan, Auli, Grangier 2016, arXiv:1612.08083).

    Args:
        in_features: width of x.
        out_features: how many features need parameters.
        num_params: numbers a feature needs (`element.num_params`).
        context: width of the context, concatenated to x.
        hidden_features: width of the hidden layers.

    Raises:
        ValueError: a size that is no whole number of its range.

    Example:
        >>> import torch, flowpath as fp
        >>> fp.GatedMLP(2, 3, num_params=2)(torch.randn(7, 2)).shape
        torch.Size([2, 7, 3])
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_params: int = 1, context: int = 0, hidden_features: int = 48
    ) -> None:
        super().__init__()
        check_count("GatedMLP", "in_features", in_features)
        check_count("GatedMLP", "out_features", out_features)
        check_count("GatedMLP", "num_params", num_params)
        check_count("GatedMLP", "context", context, least=0)
        check_count("GatedMLP", "hidden_features", hidden_features)
        self.in_features, self.out_features = in_features, out_features
        self.num_params, self.context = num_params, context
        self.first = nn.Linear(in_features + context, hidden_features)
        self.second = nn.Linear(hidden_features, hidden_features)
        self.value = nn.Linear(in_features + context, hidden_features)
        self.final = nn.Linear(hidden_features, num_params * out_features)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        return params_first(self.numbers(feature_major(x, context)).flatten(0, 1), self.num_params, x.shape[:-1])

    def numbers(self, h: Tensor) -> Tensor:
        """h `(in_features + context, N)` -> numbers `(num_params, out_features, N)`."""
        gate = torch.tanh(apply_linear(torch.tanh(apply_linear(h, self.first)), self.second))
        numbers = apply_linear(gate * apply_linear(h, self.value), self.final)
        return numbers.view(self.num_params, self.out_features, h.shape[1])
