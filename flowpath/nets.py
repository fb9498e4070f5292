"""Conditioners: networks that turn features and a context into the numbers of an Element.

All of them compute with the batch as the last, contiguous axis ("feature major"): a layer is `W @ h` with h of shape
`(width, batch)`. The last product then comes out as `(num_params, features, batch)`, which is what the Elements, whose
wide operations run over the parameter axis, read fastest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.eager import full_precision
from flowpath.layout import features_flat
from flowpath.registry import register

Activation = Callable[[], nn.Module]


def affine(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`W h + b` for h `(in, batch)`: `(out, batch)`."""
    return torch.addmm(bias.unsqueeze(-1), weight, h)


def apply_linear(h: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer on h `(in, batch)`."""
    return affine(h, layer.weight, layer.bias)  # type: ignore[arg-type]


def feature_major(x: Tensor, context: Tensor | None) -> Tensor:
    """x `(*batch, d)`, beside it the context `(*batch, C)`, as `(d + C, N)` with the batch flattened."""
    h = features_flat(x)
    return h if context is None else torch.cat([h, features_flat(context)])


def params_first(h: Tensor, num_params: int, batch: Sequence[int]) -> Tensor:
    """`(num_params * d, N)` as params `(num_params, *batch, d)`, without a copy."""
    h = h.view(num_params, h.shape[0] // num_params, *batch)
    return h.transpose(1, 2) if h.dim() == 3 else h.movedim(1, -1)


class _Net(nn.Module):
    """What the conditioners share: sizes, their checks, and the layers' construction."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_params: int,
        context: int,
        hidden_features: Sequence[int],
        activation: Activation,
        dropout: float,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        check_count(title, "in_features", in_features, least=0)
        check_count(title, "out_features", out_features)
        check_count(title, "num_params", num_params)
        check_count(title, "context", context, least=0)
        for width in hidden_features:
            check_count(title, "each of hidden_features", width)
        if in_features + context == 0:
            raise ValueError(f"{title} expects features or a context to look at, got neither; use Elementwise")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{title} expects dropout in [0, 1), got {dropout}")
        self.in_features, self.out_features = in_features, out_features
        self.num_params, self.context = num_params, context
        self.activation = activation()
        self.dropout = nn.Dropout(dropout) if dropout else None

    def _act(self, h: Tensor) -> Tensor:
        """The activation of a new tensor h, which nothing else needs."""
        activation = self.activation
        h = h.relu_() if type(activation) is nn.ReLU else activation(h)
        return h if self.dropout is None else self.dropout(h)

    def numbers(self, h: Tensor) -> Tensor:
        """What a subclass computes: h `(in_features + context, N)` -> numbers `(num_params, out_features, N)`."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        return self._params(self.numbers(feature_major(x, context)), x)

    def _params(self, numbers: Tensor, x: Tensor) -> Tensor:
        """Numbers `(num_params, out_features, N)` as params `(num_params, *batch, out_features)`, batch of x."""
        if x.dim() == 2:
            return numbers.transpose(1, 2)
        return numbers.view(*numbers.shape[:2], *x.shape[:-1]).movedim(1, -1)

    def _perceptron(self, h: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """h through layers (weight, bias), the activation after each but the last."""
        *hidden, final = layers
        for weight, bias in hidden:
            h = self._act(affine(h, weight, bias))
        return self._numbers(h, *final)

    def _numbers(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The last layer, in full precision under autocast too: its rounding would go straight into the ladj."""
        if torch.is_autocast_enabled(h.device.type):
            with full_precision(h):
                h = affine(h.to(weight.dtype), weight, bias)
        else:
            h = affine(h, weight, bias)
        return h.view(self.num_params, self.out_features, h.shape[1])

    @property
    def random(self) -> bool:
        """Whether two calls with the same input may differ (dropout in training mode)."""
        return self.dropout is not None and self.training


def _zero_final(width: int, outputs: int) -> nn.Linear:
    """The last layer; its zeros make every Element the identity until something is learnt."""
    final = nn.Linear(width, outputs)
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    return final


@register("MLP")
class MLP(_Net):
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
        self.final = _zero_final(widths[-1], num_params * out_features)

    def numbers(self, h: Tensor) -> Tensor:
        """h `(in_features + context, N)` -> numbers `(num_params, out_features, N)`."""
        return self._perceptron(h, [(layer.weight, layer.bias) for layer in (*self.hidden, self.final)])


class _Residual(_Net, ABC):
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
        self.final = _zero_final(width, num_params * out_features)

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
class ResidualMLP(_Residual):
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


@register("MaskedMLP")
class MaskedMLP(_Net):
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
        self.final = _zero_final(widths[-1], num_params * features)
        for i, mask in enumerate(self._masks()):
            self.register_buffer(f"mask{i}", mask, persistent=False)

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
        linears = [*self.hidden, self.final]
        return [(x.weight * getattr(self, f"mask{i}"), x.bias) for i, x in enumerate(linears)]

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


@register("ParamsLast")
class ParamsLast(nn.Module):
    """Adapter for a foreign conditioner, one that emits params last: `(*batch, out_features * num_params)`.

    Args:
        net: a module that maps `(*batch, in_features + C)`, x beside the context, to that shape.
        num_params: numbers a feature needs; the net gives them feature by feature.

    Example:
        >>> import torch, flowpath as fp
        >>> net = fp.ParamsLast(torch.nn.Linear(2, 3 * 5), num_params=5)
        >>> net(torch.randn(7, 2)).shape
        torch.Size([5, 7, 3])
    """

    def __init__(self, net: nn.Module, *, num_params: int) -> None:
        super().__init__()
        check_count("ParamsLast", "num_params", num_params)
        self.net, self.num_params = net, num_params

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        out = self.net(x if context is None else torch.cat([x, context], -1))
        return out.unflatten(-1, (-1, self.num_params)).movedim(-1, 0)
