"""The box of a rational-quadratic spline, and the constants of its formulas, kept from call to call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowpath.eager import is_plain


@dataclass(frozen=True)
class Box:
    """The square [low, high]^2 that K = `bins` bins fill, and the least they may be.

    `min_width` and `min_height` are shares of the side. `unit_ends` fixes the slopes of the two end knots at
    1, as identity tails need; otherwise both ends share one slope, as on a circle.
    """

    bins: int
    low: float
    high: float
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_slope: float = 1e-3
    unit_ends: bool = True

    @property
    def floors(self) -> tuple[float, float]:
        """The least width and height."""
        side = self.high - self.low
        return side * self.min_width, side * self.min_height

    @property
    def free(self) -> tuple[float, float]:
        """What the bins share above their floors, in x and in y."""
        side = self.high - self.low
        return side * (1.0 - self.bins * self.min_width), side * (1.0 - self.bins * self.min_height)

    @property
    def rows(self) -> int:
        """How many numbers an element has: K widths, K heights, and K - 1 or K slopes."""
        return 3 * self.bins - int(self.unit_ends)


class Constants(NamedTuple):
    """Numbers as tensors of one dtype: on a CPU a Python number in a formula costs an operation each time."""

    shift: Any  # c with softplus(c) + min_slope = 1
    floor: Any  # min_slope
    zero: Any
    half: Any
    one: Any
    two: Any
    ends: Tensor  # (0, 1) `(2, 1)`
    places: Tensor  # 0 to K - 1 `(K, 1)`
    free: Tensor  # `box.free` twice `(4, 1)`
    sums: tuple[Tensor, Tensor] | None = None  # see `sums`


def constants(box: Box, like: Tensor) -> Constants:
    """Those of a box, for the dtype and device of a tensor; Python numbers where tensors cannot be kept."""
    return _kept(box, like.dtype, like.device) if is_plain(like) else _made(box, like)


def sums(box: Box, like: Tensor) -> tuple[Tensor, Tensor]:
    """b `(2, K + 1, 1)` and A `(2, K + 1, K)`: b + A p are the knots of fractions p, end ones pinned.

    Made by operations, since a tracer takes a list of numbers for somebody's data.
    """
    j = torch.arange(box.bins + 1, dtype=torch.float64, device=like.device).unsqueeze(1)
    base = torch.stack([torch.where(j < box.bins, box.low + j * floor, box.high) for floor in box.floors])
    below = ((j > j[:-1].T) & (j < box.bins)).double()
    return base.to(like), torch.stack([below * free for free in box.free]).to(like)


def _made(box: Box, like: Tensor) -> Constants:
    ends, places = (torch.arange(n, dtype=like.dtype, device=like.device).unsqueeze(1) for n in (2, box.bins))
    free = torch.cat([like.new_full((1, 1), v) for v in box.free * 2])
    shift = math.log(math.expm1(1.0 - box.min_slope))
    return Constants(shift, box.min_slope, 0.0, 0.5, 1.0, 2.0, ends, places, free)


@lru_cache(maxsize=256)
def _kept(box: Box, dtype: torch.dtype, device: torch.device) -> Constants:
    with torch.inference_mode(False), torch.no_grad():
        like = torch.empty((), dtype=dtype, device=device)
        values: list[Any] = [torch.as_tensor(v, dtype=dtype, device=device) for v in _made(box, like)[:-1]]
        return Constants._make([*values, sums(box, like)])
