"""MADE: a perceptron whose masks make it autoregressive."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.nets.common import Activation, Net, zero_final
from flowpath.registry import register


@register("MaskedMLP")
class MaskedMLP(Net):
    r"""MADE: a perceptron masked so that the params of feature i see only the features before i (and the context).

    Every hidden unit has a degree m and sees inputs of degree at most m; the params of feature i, of degree i, see
    units of degree below i ("MADE", Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509). Units are sorted by
    degree, so that each mask is a staircase and `MaskedAutoregressive` can evaluate the net a feature at a time for the
    cost of one pass. With a context some units have degree 0: they see the context alone, so that the first feature
    depends on it too.

    Args:
        features: width of x and of the result.
        num_params, context, hidden_features, activation, dropout: as in `MLP`.
        degrees: for each hidden layer the degree of each unit, ascending; by default they are spread evenly.

    Raises:
        ValueError: as `MLP`, or degrees that do not ascend or leave the range 0 to features - 1.

    Example:
        >>> import torch, flowpath as fp
        >>> net = fp.MaskedMLP(3, num_params=2, hidden_features=(16,))
        >>> net(torch.randn(7, 3)).shape
        torch.Size([2, 7, 3])
    """

    def __init__(
        self,
        features: int,
        *,
        num_params: int = 1,
        context: int = 0,
        hidden_features: Sequence[int] = (128, 128),
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
        degrees: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(features, features, num_params, context, hidden_features, activation, dropout)
        if not hidden_features:
            raise ValueError("MaskedMLP expects at least one hidden layer, got none")
        self.features = features
        units = _spread_degrees(features, hidden_features, context) if degrees is None else degrees
        self.degrees = [torch.as_tensor(d) for d in units]
        _check_degrees(self.degrees, features, hidden_features)
        # known[j][k]: how many units of hidden layer j see the first k features only, as numbers for the inverse
        self.known = [[int((d <= k).sum()) for k in range(features)] for d in self.degrees]
        widths = [features + context, *hidden_features]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.final = zero_final(widths[-1], num_params * features)
        masks = self._masks()
        self._mask_names = [f"mask{i}" for i in range(len(masks))]
        for name, mask in zip(self._mask_names, masks, strict=True):
            self.register_buffer(name, mask, persistent=False)

    def _masks(self) -> list[Tensor]:
        degree_in = torch.cat([torch.arange(1, self.features + 1), torch.zeros(self.context, dtype=torch.long)])
        masks = []
        for degree_out in self.degrees:
            masks.append(degree_out[:, None] >= degree_in)
            degree_in = degree_out
        degree_out = torch.arange(1, self.features + 1).repeat(self.num_params)
        return [m.to(torch.get_default_dtype()) for m in [*masks, degree_out[:, None] > degree_in]]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Masked weight and bias of each layer, the final one last."""
        masks: Any = map(self._buffers.__getitem__, self._mask_names)
        return [(x.weight * mask, x.bias) for x, mask in zip((*self.hidden, self.final), masks, strict=True)]

    def numbers(self, h: Tensor) -> Tensor:
        """h `(features + context, N)` -> numbers `(num_params, features, N)`."""
        return self._perceptron(h, self.layers())


def _spread_degrees(features: int, widths: Sequence[int], context: int) -> list[Tensor]:
    """Ascending degrees, as many units of each as the width allows; degree 0 only where there is a context."""
    least = 0 if context or features == 1 else 1
    count = features - least
    return [torch.arange(w) * count // w + least for w in widths]


def _check_degrees(degrees: Sequence[Tensor], features: int, widths: Sequence[int]) -> None:
    if [len(d) for d in degrees] != list(widths):
        raise ValueError(f"MaskedMLP expects a degree for each unit, {list(widths)}, got {[len(d) for d in degrees]}")
    for d in degrees:
        if (d.diff() < 0).any() or d.min() < 0 or d.max() > max(features - 1, 0):
            raise ValueError(f"MaskedMLP expects ascending degrees between 0 and {features - 1}, got {d.tolist()}")
