"""The first look at a Pyro model: where its latents start, and what a guide of fixed shape cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_leaves

from flowpath.svi.handlers import middle
from flowpath.svi.replay import Hold, Site, is_subsample, latents, sites_of, subsampled


class FlatStart:
    """An init function that starts priors which cannot be sampled (flat ones) at 0 in the unconstrained space.

    Args:
        init: the init function for all others.
    """

    def __init__(self, init: Callable[..., Any]) -> None:
        self.init, self._like = init, torch.zeros(())

    def __call__(self, site: Site) -> Tensor:
        try:
            return self.init(site)
        except NotImplementedError:
            return middle(site["fn"], self._like)

    @contextmanager
    def like(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Flat priors know no dtype or device: inside it they take those of the first floating argument."""
        self._like = next((x for x in tree_leaves((args, kwargs)) if _floating(x)), torch.zeros(())).detach()
        try:
            yield
        finally:
            self._like = torch.zeros(())


def check_prototype(model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where the model's latents, or their supports, are not the same at another point.

    Raises:
        ValueError: local latents under a subsampled plate; sites that come and go; a support that moves.
    """
    for name, site in latents(prototype):
        plate = subsampled(site)
        if plate is not None:
            raise ValueError(
                f"AutoFlow: latent {name!r} is local to plate {plate!r}, of which the model shows a part at a time; a "
                "flow over all latents would tie it to places in the minibatch, not to rows: amortise it with "
                "fp.svi.AmortizedFlow(model, encoder)"
            )
    elsewhere = _elsewhere(model, prototype, args, kwargs)
    if elsewhere is None:
        return
    found = dict(latents(elsewhere))
    for name, site in latents(prototype):
        if name not in found:
            raise ValueError(f"AutoFlow: latent {name!r} comes and goes with the values of others")
        if not _same_support(site, found[name]):
            culprit = _culprit(model, prototype, name, args, kwargs)
            raise ValueError(
                f"AutoFlow: the support of latent {name!r} depends on {culprit}; "
                "a guide with a fixed map to it would leave it: sample a latent of fixed support (say u between 0 and "
                "1) and compute this one from it"
            )
    for name in found:
        if name not in prototype and not is_subsample(found[name]):
            raise ValueError(f"AutoFlow: latent {name!r} comes and goes with the values of others")


def kind_of(
    model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.dtype, torch.device]:
    """The dtype that latents and observations have in common, and the device of the latents."""
    trace = _at(model, {n: s["value"] for n, s in latents(prototype)}, args, kwargs)
    values = [s["value"] for _, s in sites_of(trace) if s["type"] == "sample" and _floating(s["value"])]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    devices = {v.device for v in values}
    device = next((d for d in devices if d.type != "cpu"), values[0].device)
    return dtype, device


def _at(model: Callable[..., Any], values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The model's trace at given latents, without the checks that they are legal."""
    with pyro.validation_enabled(False), poutine.block(), poutine.trace() as tracer, Hold(values):
        model(*args, **kwargs)
    return tracer.trace


def _elsewhere(
    model: Callable[..., Any], prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace | None:
    """The model's trace at other latents, as far off as it can be run (a matrix may cease to be positive definite)."""
    for move in (0.7, 0.1, 0.01):
        try:
            return _at(model, _shifted(prototype, None, move), args, kwargs)
        except (RuntimeError, ValueError):
            continue
    return None


def _shifted(prototype: Trace, only: str | None, by: float = 0.7) -> dict[str, Tensor]:
    """The latents (or one of them) moved in the unconstrained space."""
    values = {}
    for name, site in latents(prototype):
        to = biject_to(site["fn"].support)
        move = by if only in (None, name) else 0.0
        values[name] = to(to.inv(site["value"]) + move)
    return values


def _same_support(one: Site, other: Site) -> bool:
    """Whether two maps from the unconstrained space agree at a point of it."""
    u = biject_to(one["fn"].support).inv(one["value"]) + 0.3
    try:
        first, second = (biject_to(s["fn"].support)(u) for s in (one, other))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return first.shape == second.shape and bool(torch.allclose(first, second, equal_nan=True))


def _culprit(
    model: Callable[..., Any], prototype: Trace, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """The latents on which the support of one depends, in words."""
    site = prototype.nodes[name]
    found = []
    for other, _ in latents(prototype):
        if other != name and not _same_support(
            site, dict(latents(_at(model, _shifted(prototype, other), args, kwargs)))[name]
        ):
            found.append(repr(other))
    return " and ".join(found) or "other latents"


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
