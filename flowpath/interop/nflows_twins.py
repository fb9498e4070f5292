"""What only nflows has, in flowpath's terms: its coupling's scale, and its residual networks with a context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowpath.nets.common import Activation, Net, affine, apply_linear, feature_major, params_first
from flowpath.nets.residual import Residual
from flowpath.registry import register
from flowpath.transforms.elementwise import ScaleAndShift


@register("nflows.SigmoidAffine")
class SigmoidAffine(ScaleAndShift):
    """y = s x + t with s = sigmoid(a + 2) + 1e-3: the Element of nflows' affine coupling. s never exceeds 1.001.

    Zero numbers are a scale of 0.88, not the identity; in flows of your own use `fp.Affine`.
    """

    def _scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(raw + 2.0) + 1e-3
        return s, s.log()


def _norms(count: int, features: int, batch_norm: bool) -> nn.ModuleList | None:
    return nn.ModuleList(nn.BatchNorm1d(features, eps=1e-3) for _ in range(count)) if batch_norm else None


def _normed(h: Tensor, norms: nn.ModuleList | None, i: int) -> Tensor:
    """Batch norm i of h `(features, N)`, where there is one."""
    return h if norms is None else norms[i](h.T).T


def _columns(context: Tensor) -> Tensor:
    """A context `(*batch, C)` as `(C, N)`."""
    return feature_major(context, None)


@register("nflows.GatedResidualMLP")
class GatedResidualMLP(Residual):
    r"""nflows' ResidualNet: blocks h + W2 a(W1 a(h)), which a context gates, and batch norm if wanted.

    With a context c, beside x in the first layer, a block adds :math:`(W_2 a(W_1 a(h))) \cdot \sigma(V c)`.

    Args:
        in_features, out_features, num_params, context, hidden_features, blocks, activation, dropout: as in
            `fp.ResidualMLP`.
        batch_norm: whether there is one before each activation.
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
        batch_norm: bool = False,
    ) -> None:
        sizes = (in_features, out_features, num_params, context, hidden_features, blocks)
        super().__init__(*sizes, activation, dropout)
        gates = nn.ModuleList(nn.Linear(context, hidden_features) for _ in range(blocks))
        self.gates = gates if context else None
        self.norms = _norms(2 * blocks, hidden_features, batch_norm)

    def _inner(self, h: Tensor, i: int, context: Tensor | None) -> Tensor:
        inner = apply_linear(self.activation(_normed(h, self.norms, 2 * i)), self.first[i])
        inner = apply_linear(self._act(_normed(inner, self.norms, 2 * i + 1)), self.second[i])
        if self.gates is None or context is None:
            return inner
        return inner * torch.sigmoid(apply_linear(_columns(context), self.gates[i]))


@register("nflows.MaskedResidualMLP")
class MaskedResidualMLP(Net):
    r"""nflows' MADE: a masked network with residual blocks, a context that every block sees, batch norm if wanted.

    With first layer :math:`h = W x + b + a(V c)`, a residual block adds :math:`W_2 a(W_1 a(h) + V c)`; a plain block is
    :math:`a(W h)`. `MaskedAutoregressive` inverts it in `features` full passes; `fp.MaskedMLP` takes about one.

    "MADE" (Germain, Gregor, Murray, Larochelle 2015, arXiv:1502.03509).

    Args:
        features: width of x and of the result.
        num_params, context, activation, dropout: as in `fp.MaskedMLP`.
        degrees: the degree of each unit, for the first layer and then for each masked layer of the blocks (two a
            residual block, one a plain one). Units of a residual block's end keep the degrees of its start.
        residual: whether blocks are residual.
        batch_norm: whether there is one at the start of each layer of a block.
    """

    def __init__(
        self,
        features: int,
        *,
        num_params: int = 1,
        context: int = 0,
        degrees: Sequence[Sequence[int]],
        residual: bool = True,
        activation: Activation = nn.ReLU,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        widths = [len(d) for d in degrees]
        super().__init__(features, features, num_params, context, widths, activation, dropout)
        self.features, self.residual = features, residual
        self.initial = nn.Linear(features, widths[0])
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.final = nn.Linear(widths[-1], num_params * features)
        self.norms = _norms(len(self.hidden), widths[0], batch_norm)
        fed = 1 + (len(self.hidden) // 2 if residual else 0)
        self.contexts = nn.ModuleList(nn.Linear(context, widths[0]) for _ in range(fed)) if context else None
        places = torch.arange(1, features + 1)
        units = [places, *(torch.as_tensor(d) for d in degrees)]
        masks = [b[:, None] >= a for a, b in pairwise(units)]
        masks.append(places.repeat(num_params)[:, None] > units[-1])
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", mask.to(torch.get_default_dtype()), persistent=False)

    def _masked(self, h: Tensor, i: int) -> Tensor:
        layer = [self.initial, *self.hidden, self.final][i]
        return affine(h, layer.weight * getattr(self, f"mask{i}"), layer.bias)

    def _context_term(self, context: Tensor | None, i: int) -> Tensor | float:
        if self.contexts is None or context is None:
            return 0.0
        return apply_linear(_columns(context), self.contexts[i])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, features)`, context `(*batch, C)` -> params `(num_params, *batch, features)`."""
        h = self._masked(feature_major(x, None), 0)
        if context is not None:
            h = h + self.activation(self._context_term(context, 0))
        h = self._residual_blocks(h, context) if self.residual else self._plain_blocks(h)
        return params_first(self._masked(h, len(self.hidden) + 1), self.num_params, x.shape[:-1])

    def _residual_blocks(self, h: Tensor, context: Tensor | None) -> Tensor:
        for block in range(len(self.hidden) // 2):
            i = 2 * block
            inner = self.activation(_normed(h, self.norms, i))
            inner = self._masked(inner, i + 1) + self._context_term(context, block + 1)
            h = h + self._masked(self._act(_normed(inner, self.norms, i + 1)), i + 2)
        return h

    def _plain_blocks(self, h: Tensor) -> Tensor:
        h = self.activation(h)
        for i in range(len(self.hidden)):
            h = self._act(self._masked(_normed(h, self.norms, i), i + 1))
        return h


class ForeignConditioner(nn.Module):
    """A network of nflows' kind, called `net(x, context)` with rows, as a Conditioner.

    Args:
        net: the network; it emits one row of numbers, in nflows' order.
        order: `(num_params * out_features,)`, where in that row our numbers are, number by number.
        factor, shift: `(num_params,)`; our numbers are factor * theirs - shift.
        in_features, context: what it looks at.
    """

    order: Tensor
    factor: Tensor
    shift: Tensor

    def __init__(
        self, net: nn.Module, order: Tensor, factor: Tensor, shift: Tensor, *, in_features: int, context: int
    ) -> None:
        super().__init__()
        self.net, self.in_features, self.context = net, in_features, context
        self.num_params, self.out_features = len(factor), len(order) // len(factor)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("factor", factor[:, None], persistent=False)
        self.register_buffer("shift", shift[:, None], persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)`, context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        batch = x.shape[:-1]
        if not batch.numel():
            return x.new_zeros(self.num_params, *batch, self.out_features)
        rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_zeros(batch.numel(), 0)
        c = None if context is None else context.reshape(-1, context.shape[-1])
        out = self.net(rows, c)[:, self.order].unflatten(-1, (self.num_params, -1)) * self.factor - self.shift
        return out.movedim(-2, 0).unflatten(1, batch) if batch else out.movedim(-2, 0)[:, 0]


class ContextAlone(nn.Module):
    """A conditioner of no features and a context as one that is given the context as its x, for `fp.Elementwise`."""

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.num_params: int = conditioner.num_params  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Context `(*batch, C)` -> params `(num_params, *batch, out_features)`."""
        return self.conditioner(x.new_zeros(*x.shape[:-1], 0), x)


_FUNCTIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_class(f: object) -> Activation | None:
    """The torch.nn class of an activation function, or of a module with default settings; None for others."""
    if isinstance(f, nn.Module):
        kind = type(f)
        plain = getattr(nn, kind.__name__, None) is kind and not list(f.parameters())
        return kind if plain and repr(kind()) == repr(f) else None
    name = getattr(f, "__name__", "")
    known = getattr(F, name, None) is f or getattr(torch, name, None) is f
    return _FUNCTIONS.get(name) if known else None
