"""Eight densities in the plane, each with an exact log density, so that a flow's error can be told from entropy.

Curves are many close centres with Gaussian noise: a finite mixture whose density is a sum, with nothing approximated.
Randomness comes from the generator that is passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_CENTRES = 1200  # neighbours on a curve are then closer than the noise is wide


class PlaneSet(Protocol):
    """A density that draws itself and knows its log density."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows `(count, 2)`."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats of x `(N, 2)`: `(N,)`; -inf outside the support."""
        ...


@dataclass(frozen=True)
class Mixture:
    """Equal, round Gaussians: centres `(M, 2)` and their common standard deviation."""

    centres: Tensor
    sd: float

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[which] + self.sd * torch.randn(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        log_norm = math.log(2.0 * math.pi * self.sd**2 * len(self.centres))
        chunks = [torch.cdist(part, self.centres.to(x)).square() for part in x.split(4096)]
        return torch.cat([torch.logsumexp(-0.5 * d / self.sd**2, 1) for d in chunks]) - log_norm


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the dark fields of a board of 4 x 4 on [-2, 2]^2."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        field = torch.randint(8, (count,), generator=generator)
        row = field // 2
        corner = torch.stack([2 * (field % 2) + row % 2, row], 1) - 2.0
        return corner + torch.rand(count, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        dark = (x.floor().sum(1) % 2 == 0) & (x >= -2.0).all(1) & (x < 2.0).all(1)
        return torch.where(dark, -math.log(8.0), -math.inf)


@dataclass(frozen=True)
class Pinwheel:
    """Five Gaussian arms twisted by an angle that grows with the radius: the twist keeps areas, hence the density."""

    arms: int = 5
    radius: float = 1.8
    radial_sd: float = 0.5
    tangential_sd: float = 0.15
    twist: float = 0.5

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        sds = torch.tensor([self.radial_sd, self.tangential_sd])
        straight = torch.randn(count, 2, generator=generator) * sds + torch.tensor([self.radius, 0.0])
        arm = torch.randint(self.arms, (count,), generator=generator)
        return _rotate(straight, 2 * math.pi * arm / self.arms + self._angle(straight))

    def log_prob(self, x: Tensor) -> Tensor:
        terms = []
        for arm in range(self.arms):
            straight = _rotate(x, -2 * math.pi * arm / self.arms - self._angle(x))
            u = (straight[:, 0] - self.radius) / self.radial_sd
            v = straight[:, 1] / self.tangential_sd
            terms.append(-0.5 * (u.square() + v.square()))
        log_norm = math.log(2 * math.pi * self.radial_sd * self.tangential_sd * self.arms)
        return torch.logsumexp(torch.stack(terms), 0) - log_norm

    def _angle(self, x: Tensor) -> Tensor:
        return self.twist * x.square().sum(1).sqrt()


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _steps(count: int) -> Tensor:
    return (torch.arange(count) + 0.5) / count


def two_moons() -> PlaneSet:
    upper = _polar(torch.tensor(1.0), math.pi * _steps(_CENTRES // 2))
    lower = torch.tensor([1.0, 0.5]) - upper
    return Mixture(torch.cat([upper, lower]) * 1.5 - torch.tensor([0.75, 0.375]), 0.1)


def rings() -> PlaneSet:
    circles = [_polar(torch.tensor(r), 2 * math.pi * _steps(_CENTRES // 3)) for r in (0.7, 1.5, 2.3)]
    return Mixture(torch.cat(circles), 0.08)


def two_spirals() -> PlaneSet:
    turn = 3 * math.pi * _steps(_CENTRES // 2).sqrt()
    arm = _polar(turn / 4.0, turn)
    return Mixture(torch.cat([arm, -arm]), 0.1)


def eight_gaussians() -> PlaneSet:
    return Mixture(_polar(torch.tensor(2.0), 2 * math.pi * torch.arange(8) / 8), 0.2)


def cosine() -> PlaneSet:
    x = 6.0 * _steps(_CENTRES) - 3.0
    return Mixture(torch.stack([x, 1.5 * torch.cos(2.5 * x)], 1), 0.12)


def swiss_roll() -> PlaneSet:
    turn = 1.5 * math.pi * (1.0 + 2.0 * _steps(_CENTRES))
    return Mixture(_polar(turn / 6.0, turn), 0.12)


SETS: dict[str, Callable[[], PlaneSet]] = {
    "two moons": two_moons,
    "rings": rings,
    "checkerboard": Checkerboard,
    "pinwheel": Pinwheel,
    "two spirals": two_spirals,
    "eight gaussians": eight_gaussians,
    "cosine": cosine,
    "swiss roll": swiss_roll,
}
"""Sets by name."""
