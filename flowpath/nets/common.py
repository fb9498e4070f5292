"""What the conditioners share: the layout of their arithmetic, sizes and checks, and a last layer of zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowpath.checks import check_count
from flowpath.eager import full_precision
from flowpath.layout import features_flat

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


class Net(nn.Module):
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


def zero_final(width: int, outputs: int) -> nn.Linear:
    """The last layer; its zeros make every Element the identity until something is learnt."""
    final = nn.Linear(width, outputs)
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    return final
