"""The contract of a transform, and the two ways to make one from others: Chain and Inverse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from flowpath.checks import check_count, check_inputs, event_words
from flowpath.registry import register

Cost = Literal["parallel", "sequential", "iterative"]
Direction = Literal["forward", "inverse"]

_COSTS: tuple[Cost, ...] = ("parallel", "sequential", "iterative")


@runtime_checkable
class Element(Protocol):
    """A monotone map of one feature, driven by `num_params` numbers; zero numbers give the identity.

    The parameter axis comes first: x is `(*batch, d)`, params `(num_params, *batch, d)` and broadcasts against x.
    Both directions return the value and the log derivative of the direction called, each `(*batch, d)`.
    """

    num_params: int

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Conditioner(Protocol):
    """A network that turns features (and a context) into the numbers of an Element.

    Takes x `(*batch, d_in)` and context `(*batch, C)` or None; returns params `(num_params, *batch, d_out)`.
    """

    num_params: int

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Record:
    """What one direction of a transform leaves behind, for `Transform.pull_score`."""

    direction: Direction
    output: Tensor
    context: Tensor | None
    extra: Any = None


class Transform(nn.Module):
    r"""An invertible map T between data x and noise z, with the log-determinant of its Jacobian both ways.

    .. math:: z = T(x), \qquad \text{ladj} = \log\left|\det \frac{\partial z}{\partial x}\right|

    `forward` maps data to noise, `inverse` noise to data; each returns `(value, ladj)` with the ladj of the direction
    called. This is the call protocol of nflows, so a Transform works inside nflows' containers as it is.

    A subclass writes `_forward(x, context)` and `_inverse(z, context)`; checks and broadcasting happen here, so
    there x is `(*batch, *event)` and context, if any, `(*batch, C)` with the same batch shape. It sets

    - `data_shape`, `noise_shape`: event shapes on either side, None where any width of one event dim will do;
    - `context`: the width of the context it needs, 0 for none, None where it can have no use for one and ignores it;
    - `forward_cost`, `inverse_cost`: "parallel" (one pass), "sequential" (a pass a feature) or "iterative" (a solver);
    - `data_support`, `noise_support`: the constraint that holds on either side, None for the whole space.

    Args:
        features: width of the event on both sides, or None for any.
        context: width of the context.

    Raises:
        ValueError, TypeError: from `forward` and `inverse`: x or context of a wrong shape, kind, dtype or device.
    """

    data_shape: torch.Size | None = None
    noise_shape: torch.Size | None = None
    context: int | None = 0
    forward_cost: Cost = "parallel"
    inverse_cost: Cost = "parallel"
    data_support: Constraint | None = None
    noise_support: Constraint | None = None

    def __init__(self, features: int | None = None, context: int | None = None) -> None:
        super().__init__()
        if features is not None:
            check_count(type(self).__name__, "features", features)
            self.data_shape = self.noise_shape = torch.Size([features])
        if context is not None:
            check_count(type(self).__name__, "context", context, least=0)
            self.context = context

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define _forward(x, context) -> (z, ladj)")

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define _inverse(z, context) -> (x, ladj)")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data x `(*batch, *event)` to noise z; returns `(z, ladj)` with ladj `(*batch,)`."""
        return self._forward(*check_inputs(self, "x", x, self.data_shape, context, self.context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise z `(*batch, *event)` to data x; returns `(x, ladj)` with ladj `(*batch,)` of this direction."""
        return self._inverse(*check_inputs(self, "z", z, self.noise_shape, context, self.context))

    def shape_after(self, direction: Direction, shape: Sequence[int]) -> torch.Size:
        """Event shape that `direction` makes of an event shape it is given; asked where the shapes are not fixed."""
        fixed = self.noise_shape if direction == "forward" else self.data_shape
        return torch.Size(shape) if fixed is None else fixed

    def run(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Either direction by name, unchecked."""
        return self._forward(value, context) if direction == "forward" else self._inverse(value, context)

    def record(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Record]:
        """`run`, and beside it what `pull_score` will need. Layers that can save work override it."""
        output, ladj = self.run(direction, value, context)
        return output, ladj, Record(direction, output, context)

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        r"""Carry the score of a density across this layer, beside the sample.

        With value v -> v' = S(v) the recorded direction and G = d log q(v) / dv, the density of v' has the score

        .. math:: G' = \left(G - \partial_v \log|\det \partial S|\right) \left(\frac{\partial S}{\partial v}\right)^{-1}

        (Vaitl, Kessel et al. 2022 and 2024, arXiv:2207.08219 and 2403.15881). This default is one
        vector-Jacobian product through the layer's own other direction; layers override it with the closed form.

        Args:
            record: what `record` returned for this layer.
            score: G, of the shape of the recorded input.

        Returns:
            G', of the shape of the recorded output; no graph is attached.
        """
        other: Direction = "inverse" if record.direction == "forward" else "forward"
        with torch.enable_grad():
            output = record.output.detach().requires_grad_()
            value, ladj = self.run(other, output, record.context)
            outputs, cotangents = [value], [score]
            if ladj.requires_grad:
                outputs, cotangents = [value, ladj], [score, torch.ones_like(ladj)]
        return torch.autograd.grad(outputs, output, cotangents)[0]


@register("Chain")
class Chain(Transform):
    """Transforms applied one after another: the first is nearest the data, the last nearest the noise.

    Args:
        transforms: at least one Transform; their shapes must fit, and those that take a context the same width.

    Raises:
        ValueError: no transform, or two neighbours whose event shapes differ, or contexts of two widths.

    Example:
        >>> import torch, flowpath as fp
        >>> chain = fp.Chain([fp.ActNorm(3), fp.LU(3), fp.Permutation([2, 1, 0])])
        >>> z, ladj = chain(torch.randn(8, 3))
        >>> z.shape, ladj.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        parts = list(transforms)
        for i, t in enumerate(parts):
            if not isinstance(t, Transform):
                raise TypeError(
                    f"Chain expects Transforms, got {type(t).__name__} at {i}; bring others in by "
                    "fp.from_nflows or fp.from_torch"
                )
        if not parts:
            raise ValueError("Chain expects at least one transform, got none")
        self.transforms = nn.ModuleList(parts)
        self.context = _common_context(parts)
        self.data_shape, self.noise_shape = _chain_shapes(parts)
        self.forward_cost = max((t.forward_cost for t in parts), key=_COSTS.index)
        self.inverse_cost = max((t.inverse_cost for t in parts), key=_COSTS.index)

    @property
    def data_support(self) -> Constraint | None:  # type: ignore[override]
        """The first transform's."""
        return self.transforms[0].data_support  # type: ignore[return-value]

    @property
    def noise_support(self) -> Constraint | None:  # type: ignore[override]
        """The last transform's."""
        return self.transforms[-1].noise_support  # type: ignore[return-value]

    def shape_after(self, direction: Direction, shape: Sequence[int]) -> torch.Size:
        for t in self._ordered(direction):
            shape = t.shape_after(direction, shape)
        return torch.Size(shape)

    def _ordered(self, direction: Direction) -> Iterable[Transform]:
        parts: list[Transform] = list(self.transforms)  # type: ignore[arg-type]
        return parts if direction == "forward" else parts[::-1]

    def run(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        ladjs = []
        for t in self._ordered(direction):
            value, ladj = t.run(direction, value, context if t.context else None)
            ladjs.append(ladj)
        return value, sum(ladjs[1:], ladjs[0])

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.run("forward", x, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.run("inverse", z, context)

    def record(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Record]:
        records, ladjs = [], []
        for t in self._ordered(direction):
            value, ladj, record = t.record(direction, value, context if t.context else None)
            records.append(record)
            ladjs.append(ladj)
        return value, sum(ladjs[1:], ladjs[0]), Record(direction, value, context, records)

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        for t, r in zip(self._ordered(record.direction), record.extra, strict=True):
            score = t.pull_score(r, score)
        return score


@register("Inverse")
class Inverse(Transform):
    """A transform with its two directions swapped: an IAF is the Inverse of a MAF.

    Args:
        transform: the Transform to swap.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.Inverse(fp.LU(3))
        >>> x = torch.randn(4, 3)
        >>> torch.equal(t(x)[0], t.transform.inverse(x)[0])
        True
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(f"Inverse expects a Transform, got {type(transform).__name__}")
        self.transform = transform
        self.context = transform.context
        self.data_shape, self.noise_shape = transform.noise_shape, transform.data_shape
        self.forward_cost, self.inverse_cost = transform.inverse_cost, transform.forward_cost

    @property
    def data_support(self) -> Constraint | None:  # type: ignore[override]
        """The other's noise support."""
        return self.transform.noise_support

    @property
    def noise_support(self) -> Constraint | None:  # type: ignore[override]
        """The other's data support."""
        return self.transform.data_support

    def shape_after(self, direction: Direction, shape: Sequence[int]) -> torch.Size:
        return self.transform.shape_after("inverse" if direction == "forward" else "forward", shape)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._inverse(x, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform._forward(z, context)

    def record(self, direction: Direction, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Record]:
        return self.transform.record("inverse" if direction == "forward" else "forward", value, context)

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        return self.transform.pull_score(record, score)


def _common_context(parts: Sequence[Transform]) -> int:
    widths = sorted({t.context for t in parts if t.context})
    if len(widths) > 1:
        raise ValueError(f"Chain: its transforms expect contexts of different widths {widths}; give them one width")
    return widths[0] if widths else 0


def _chain_shapes(parts: Sequence[Transform]) -> tuple[torch.Size | None, torch.Size | None]:
    """Event shapes on the data and the noise side; a transform of any width takes what its neighbour gives."""
    sized = next((i for i, t in enumerate(parts) if t.data_shape is not None), None)
    if sized is None:
        return None, None
    data: torch.Size = parts[sized].data_shape  # type: ignore[assignment]
    for t in reversed(parts[:sized]):
        data = t.shape_after("inverse", data)
    current = data
    for i, t in enumerate(parts):
        if t.data_shape not in (None, current):
            raise ValueError(
                f"Chain: transform {i} ({type(t).__name__}) expects {event_words(t.data_shape or ())}, but what comes "
                f"before gives {event_words(current)}"
            )
        current = t.shape_after("forward", current)
    return data, current
