"""Handlers that run a Pyro model at given latents, at given rows, or for a first look."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to

Message: TypeAlias = Any  # Pyro's messages are dicts, its traces graphs of them


@dataclass(frozen=True)
class Site:
    """A continuous latent of the model and its place among the packed unconstrained numbers.

    Attributes:
        name: the site's.
        shape: of its value, for one point.
        free_shape: of its unconstrained value.
        batch_dims: how many of the leading dims are batch dims.
        start: first of its numbers in u.
        plates: names of the plates it stands in.
    """

    name: str
    shape: torch.Size
    free_shape: torch.Size
    batch_dims: int
    start: int
    plates: tuple[str, ...]

    @property
    def stop(self) -> int:
        """One past its last number in u."""
        return self.start + self.free_shape.numel()


class First(Messenger):
    """Draws each latent from its prior, in the middle of its support where the prior is flat.

    Args:
        dtype: what it has at least.
        device: where to put it, or None for where the prior is. Priors of numbers are nowhere, and drawn on the CPU.
        drawn: False for the middle of every support.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None, drawn: bool = True) -> None:
        super().__init__()
        self.dtype, self.device, self.drawn = dtype, device, drawn

    def _pyro_sample(self, msg: Message) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or isinstance(msg["fn"], _Subsample):
            return
        value = self._value(msg["fn"])
        if value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, self.dtype))
        msg["value"], msg["done"] = value if self.device is None else value.to(self.device), True

    def _value(self, fn: Distribution) -> Tensor:
        if self.drawn or getattr(fn.support, "is_discrete", False):
            with suppress(NotImplementedError):
                return fn.sample()
        return middle(fn)


def middle(fn: Distribution, like: Tensor | None = None) -> Tensor:
    """A point in the middle of the support of a distribution, of the dtype and device of `like`."""
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
    return transform(torch.zeros(shape) if like is None else like.new_zeros(shape))


class Place(Messenger):
    """Gives the latents the values of packed points u, `(D,)` or `(P, D)`, and sums the ladj of their supports."""

    def __init__(self, sites: dict[str, Site], u: Tensor, nest: int) -> None:
        super().__init__()
        self.sites, self.u, self.nest = sites, u, nest
        self.ladj = u.new_zeros(u.shape[:-1])

    def _pyro_sample(self, msg: Message) -> None:
        site = self.sites.get(msg["name"])
        if site is None:
            return
        lead = self.u.shape[:-1]
        gap = (1,) * (self.nest - site.batch_dims) if lead else ()
        free = self.u[..., site.start : site.stop].reshape((*lead, *gap, *site.free_shape))
        transform = biject_to(msg["fn"].support)
        value = transform(free)
        self.ladj = self.ladj + transform.log_abs_det_jacobian(free, value).reshape((*lead, -1)).sum(-1)
        msg["value"], msg["done"] = value, True


class Block(Messenger):
    """Gives subsampling plates the rows of a block."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.rows and isinstance(msg["fn"], _Subsample):
            msg["value"], msg["done"] = self.rows[msg["name"]], True


@contextmanager
def quiet() -> Iterator[None]:
    """Without validation of distributions, which tracing cannot follow, and without the warnings of Pyro's checks."""
    torch_before, pyro_before = Distribution._validate_args, pyro.settings.get("validate_distributions_pyro")
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore")
        Distribution.set_default_validate_args(False)
        try:
            yield
        finally:
            Distribution.set_default_validate_args(torch_before)
            pyro.settings.set(validate_distributions_pyro=pyro_before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors in this dtype, put back afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
