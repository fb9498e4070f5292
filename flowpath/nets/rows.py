"""Conditioners for many latents of one kind: the rows of a plate, each with a few numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowpath.nets.common import feature_major
from flowpath.nets.gated import GatedMLP
from flowpath.registry import register


@register("PickedMLP")
class PickedMLP(nn.Module):
    """A `GatedMLP` that looks at some of the features it is given.

    Args:
        in_features: width of x.
        columns: those it looks at.
        out_features, num_params, hidden_features: as `GatedMLP`.
    """

    columns: Tensor

    def __init__(
        self, in_features: int, columns: Sequence[int], out_features: int, *, num_params: int, hidden_features: int = 48
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_params = in_features, out_features, num_params
        self.register_buffer("columns", torch.as_tensor(columns), persistent=False)
        self.net = GatedMLP(len(columns), out_features, num_params=num_params, hidden_features=hidden_features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)` -> params `(num_params, *batch, out_features)`."""
        return self.net(x.movedim(-1, 0).index_select(0, self.columns).movedim(0, -1), context)


@register("RowMLP")
class RowMLP(nn.Module):
    r"""One small gated network for all rows of a plate; a row sees its own mates, the globals, and itself by name.

    With a row's mates p, the globals g and learnt numbers v of its own,

    .. math:: h = \tanh(A p + B g + v) * (C p + D g + w), \qquad \text{params} = E h + F p + b

    where A to E are shared by the rows; F and b, v and w belong to each. The cost grows with the rows, the number of
    shared weights does not. E, F and b start at zero.

    Args:
        in_features: width of x.
        mates: for each kind of mate, the features that hold it, one a row: `(kinds, rows)`; may be empty.
        globals: features that every row sees.
        rows: how many rows.
        num_params: numbers a row needs.
        hidden_features: width of the hidden layer.
    """

    mates: Tensor
    globals: Tensor

    def __init__(
        self,
        in_features: int,
        mates: Sequence[Sequence[int]],
        globals: Sequence[int],
        rows: int,
        *,
        num_params: int,
        hidden_features: int = 16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_params = in_features, rows, num_params
        self.register_buffer("mates", torch.as_tensor(mates, dtype=torch.long).reshape(-1, rows), persistent=False)
        self.register_buffer("globals", torch.as_tensor(globals, dtype=torch.long), persistent=False)
        kinds, seen = len(mates), len(globals)
        bound = 1.0 / max(kinds + seen, 1) ** 0.5
        self.of_mates = nn.Parameter(torch.empty(2, hidden_features, kinds).uniform_(-bound, bound))
        self.of_globals = nn.Parameter(torch.empty(2 * hidden_features, seen).uniform_(-bound, bound))
        self.of_row = nn.Parameter(torch.empty(2, hidden_features, rows, 1).uniform_(-bound, bound))
        self.final = nn.Parameter(torch.zeros(num_params, hidden_features))
        self.slope = nn.Parameter(torch.zeros(num_params, kinds, rows, 1))
        self.bias = nn.Parameter(torch.zeros(num_params, rows, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x `(*batch, in_features)` -> params `(num_params, *batch, rows)`."""
        h = feature_major(x, context)
        mates = h.index_select(0, self.mates.flatten()).unflatten(0, self.mates.shape)  # (kinds, rows, N)
        given = (self.of_globals @ h.index_select(0, self.globals)).unflatten(0, (2, -1)).unsqueeze(2)
        gate, value = (self.of_mates @ mates.flatten(1)).unflatten(-1, mates.shape[1:]) + given + self.of_row
        hidden = torch.tanh(gate) * value
        params = (self.final @ hidden.flatten(1)).unflatten(-1, hidden.shape[1:]) + self.bias
        if len(self.mates):
            params = params + (self.slope * mates).sum(1)
        return params.movedim(1, -1).reshape(self.num_params, *x.shape[:-1], self.out_features)
