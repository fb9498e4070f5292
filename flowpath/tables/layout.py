"""The supports of a table's columns at work: what lies outside, cells of lattices, the map to the whole space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import AffineTransform, CatTransform
from torch.quasirandom import SobolEngine

from flowpath.interop import from_torch
from flowpath.supports import Support, as_support, read_supports, real
from flowpath.tables.columns import near
from flowpath.transform import Transform

_EPS = torch.finfo(torch.float64).eps


class Layout:
    """The supports of D columns, as tensors `(D,)` in float64, applied to all columns at once.

    Args:
        supports: one a column.
    """

    def __init__(self, supports: Sequence[Support]) -> None:
        self.supports = tuple(supports)
        names = ("lower", "upper", "step", "offset", "tolerance")
        held = torch.tensor([[getattr(s, n) for n in names] for s in self.supports], dtype=torch.float64)
        self.lower, self.upper, self.step, self.offset, self.tolerance = held.unbind(1)
        self.lattice = self.step > 0
        self._unit = torch.where(self.lattice, self.step, 1.0)

    @property
    def lattices(self) -> int:
        """How many columns are lattices."""
        return int(self.lattice.sum())

    @property
    def log_cell(self) -> float:
        """The log volume of a cell: the sum of log step over the lattices."""
        return float(self._unit.log().sum())

    def snap(self, x: Tensor) -> Tensor:
        """x `(N, D)` with each lattice's values exactly on it."""
        nearest = self.offset + ((x - self.offset) / self._unit).round() * self._unit
        return torch.where(self.lattice, nearest, x)

    def on_bound(self, x: Tensor) -> Tensor:
        """Which values `(N, D)` lie exactly on an open bound."""
        return ~self.lattice & ((x == self.lower) | (x == self.upper))

    def outside(self, x: Tensor) -> Tensor:
        """Which values `(N, D)` lie beyond the bounds or off the lattice; those on an open bound are not among them."""
        snapped = self.snap(x)
        off = (x - snapped).abs() > self.tolerance * self.step + 4 * _EPS * x.abs()
        slack = 0.5 * self.step
        return off | (snapped < self.lower - slack) | (snapped > self.upper + slack)

    def nudges(self, x: Tensor) -> Tensor:
        """Where values on the lower and upper bounds move: `(2, D)`, halfway to the nearest value inside."""
        inside = torch.where(self.on_bound(x) | self.outside(x), torch.nan, x)
        low = torch.where(inside.isnan(), torch.inf, inside).amin(0)
        high = torch.where(inside.isnan(), -torch.inf, inside).amax(0)
        return torch.stack([0.5 * (self.lower + low), 0.5 * (self.upper + high)])

    def nudge(self, x: Tensor, to: Tensor) -> Tensor:
        """x with the values on open bounds moved to `to` `(2, D)`."""
        bound = self.on_bound(x)
        moved = torch.where(x == self.lower, to[0], to[1])
        return torch.where(bound & moved.isfinite(), moved, x)

    def spread(self, x: Tensor, u: Tensor) -> Tensor:
        """x with each lattice's values spread over their cells by u `(..., D)` in (0, 1)."""
        return self.snap(x) + (u - 0.5) * self.step

    def dequantise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x with each lattice's values spread uniformly over their cells."""
        u = torch.rand(x.shape, dtype=torch.float64, generator=generator).clamp_min(_EPS)
        return self.spread(x, u)

    def settle(self, y: Tensor) -> Tensor:
        """Draws in the cells as values: lattices snapped, bounds kept, the digits of a step such as 0.1 tidied."""
        low, high = self.lower, self.upper
        inside = torch.maximum(torch.minimum(y, _step_to(high, low)), _step_to(low, high))
        x = torch.where(self.lattice, torch.maximum(torch.minimum(self.snap(y), high), low), inside)
        for j, s in enumerate(self.supports):
            if s.is_lattice:
                scale = 10.0 ** (12 - int(torch.tensor(s.step).log10().floor()))
                x[:, j] = torch.where((x[:, j] * scale).abs() < 1e15, (x[:, j] * scale).round() / scale, x[:, j])
        return x

    def transform(self) -> Transform | None:
        """The map from the cells to the whole space, its ladj in the user's units; None where they are that space."""
        bounded = [any(map(math.isfinite, s.cells)) for s in self.supports]
        if not any(bounded):
            return None
        same = AffineTransform(0.0, 1.0)
        parts = [biject_to(s.constraint()) if b else same for s, b in zip(self.supports, bounded, strict=True)]
        return from_torch(CatTransform(parts, dim=-1, lengths=[1] * len(parts)))


def _step_to(bound: Tensor, inwards: Tensor) -> Tensor:
    """The number next to a finite bound."""
    return torch.where(bound.isfinite(), torch.nextafter(bound, inwards), bound)


def cell_points(count: int, lattices: int) -> Tensor:
    """Fixed points `(count, lattices)` of the unit cube: scrambled Sobol, coordinates in the middle of their bins.

    In one dimension that is the midpoint rule; in more, each coordinate alone still is one.

    Args:
        count: a power of two, for which Sobol points are balanced.
        lattices: how many dimensions.

    Raises:
        ValueError: count is no power of two.
    """
    if count < 1 or count & (count - 1):
        raise ValueError(f"cell_points is expected to be a power of two, got {count}")
    if not lattices:
        return torch.zeros(1, 0, dtype=torch.float64)
    u = SobolEngine(lattices, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return ((u * count).floor().clamp_max(count - 1) + 0.5) / count


def resolve(given: Any, names: Sequence[str]) -> tuple[Support, ...]:
    """One support a column, from what a user passes: columns that are not named are real.

    Args:
        given: None, a path to a TOML file, a mapping from names (or positions) to supports, or a sequence of them.
        names: of the columns.

    Raises:
        TypeError, ValueError: no support, or one for a column that is not there; a name like it is given.
    """
    if given is None:
        return (real(),) * len(names)
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        given = read_supports(given)
    if isinstance(given, Mapping):
        held = {str(k): v for k, v in given.items()}
        unknown = [k for k in held if k not in names]
        if unknown:
            raise ValueError(f"supports names a column {unknown[0]!r} that is not there{near(unknown[0], list(names))}")
        return tuple(as_support(held.get(n, real()), repr(n)) for n in names)
    if isinstance(given, Sequence):
        if len(given) != len(names):
            raise ValueError(f"supports expects one a column, {len(names)}, got {len(given)}")
        return tuple(as_support(s, repr(n)) for s, n in zip(given, names, strict=True))
    raise TypeError(
        "supports is expected as a mapping from columns to supports, a sequence with one a column or the path of a "
        f"TOML file, got {type(given).__name__}"
    )
