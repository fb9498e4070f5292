"""A first look at a Pyro model: its latents, its plates, and what fit_posterior cannot take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from flowpath.svi.handlers import First, Site, quiet

Trace: TypeAlias = Any  # Pyro's graph of messages


class ModelError(ValueError):
    """A model that fit_posterior cannot take; the message says which site and why.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("count", dist.Poisson(3.0))
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> fp.svi.ModelDensity(model)
        Traceback (most recent call last):
        ...
        flowpath.svi.looking.ModelError: latent site 'count' is discrete (Poisson) and cannot be enumerated; marginalise
        it in the model, or infer it by another method
    """


@dataclass(frozen=True)
class Rows:
    """A plate that shows some of its rows: how many it has, and how many a call shows."""

    size: int
    shown: int


def first_trace(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], checked: bool) -> Trace:
    """A run of the model at draws of its prior, or in the middle of all supports where it fails there.

    Args:
        model, args, kwargs: what to run.
        checked: whether observations are validated.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    dtypes = [x.dtype for x in tensors if x.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()
    device = next((x.device for x in tensors if x.device.type != "cpu"), None)
    failed: Exception | None = None
    # A flat prior has no dtype of its own, so where the model's data are in a closure only a product tells.
    for first in (First(d, device, drawn) for drawn in (True, False) for d in (dtype, torch.float64)):
        try:
            trace = _run(model, args, kwargs, first)
        except ModelError:
            raise
        except (RuntimeError, ValueError) as error:  # LinAlgError is a RuntimeError
            failed = failed or error
            continue
        if checked:
            _validate(trace)
        return trace
    raise failed or RuntimeError("unreachable")


def _run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: First) -> Trace:
    with quiet(), poutine.block(), poutine.trace() as tracer, first:
        try:
            model(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "device" in str(error):
                raise ModelError(_devices(tracer.trace, args, kwargs, error)) from error
            raise
    return tracer.trace


def _validate(trace: Trace) -> None:
    """Observations lie in the supports of their distributions."""
    for site in scores(trace):
        fn, value = site["fn"], site["value"]
        if not site["is_observed"] or not isinstance(value, Tensor):
            continue
        off = int((~fn.support.check(value)).sum())
        if off:
            raise ModelError(
                f"the observation at site {site['name']!r} has {off} values outside the support of its "
                f"{type(fn).__name__}, {fn.support}"
            )


def _devices(trace: Trace, args: Any, kwargs: Any, error: Exception) -> str:
    """Which tensors are where, for a model that mixes devices."""
    found = {n: str(s["value"].device) for n, s in trace.nodes.items() if isinstance(s.get("value"), Tensor)}
    given = [str(x.device) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    last = next(reversed(found), "the start")
    return (
        f"the model mixes devices after site {last!r}: its sites are on {found}, its arguments on {given}; put data, "
        f"constants and priors' parameters on one device ({error})"
    )


def scores(trace: Trace) -> list[Any]:
    """The sites that carry a log density."""
    return [s for s in trace.nodes.values() if s["type"] == "sample" and not isinstance(s["fn"], _Subsample)]


def depth(trace: Trace) -> int:
    """How many batch dims the model's sites and plates take."""
    frames = [f.dim for s in scores(trace) for f in s["cond_indep_stack"] if f.vectorized]
    return max([len(s["fn"].batch_shape) for s in scores(trace)] + [-min(frames, default=0)])


def showing_part(trace: Trace) -> dict[str, Rows]:
    """The plates that show some of their rows only, drawn or given."""
    found = {}
    for name, site in trace.nodes.items():
        if isinstance(site.get("fn"), _Subsample) and len(site["value"]) < site["fn"].size:
            found[name] = Rows(site["fn"].size, len(site["value"]))
    return found


def latents(trace: Trace) -> tuple[dict[str, Site], list[str]]:
    """The continuous latents and their places in u, and the names of the discrete ones.

    Raises:
        ModelError: no continuous latent; a discrete one that cannot be enumerated, or beside a subsampling plate; one
            that is local to a plate that subsamples; latents on several devices.
    """
    unseen = [s for s in scores(trace) if not s["is_observed"]]
    discrete = [s for s in unseen if getattr(s["fn"].support, "is_discrete", False)]
    continuous = [s for s in unseen if s not in discrete]
    parts = showing_part(trace)
    if not continuous:
        raise ModelError("the model has no continuous latent site, so there is no density to fit a flow to")
    _refuse_unsummable(discrete, parts)
    _refuse_local(continuous, parts)
    _refuse_scattered(continuous)
    sites: dict[str, Site] = {}
    start = 0
    for s in continuous:
        free = biject_to(s["fn"].support).inv(s["value"]).shape
        plates = tuple(f.name for f in s["cond_indep_stack"])
        site = Site(s["name"], s["value"].shape, free, len(s["fn"].batch_shape), start, plates)
        sites[s["name"]], start = site, site.stop
    return sites, [s["name"] for s in discrete]


def _refuse_unsummable(discrete: list[Any], parts: dict[str, Rows]) -> None:
    for site in discrete:
        if not site["fn"].has_enumerate_support:
            raise ModelError(
                f"latent site {site['name']!r} is discrete ({type(site['fn']).__name__}) and cannot be enumerated; "
                "marginalise it in the model, or infer it by another method"
            )
        if parts:
            raise ModelError(
                f"latent site {site['name']!r} is discrete and plate {next(iter(parts))!r} subsamples: summed-out "
                "sites and minibatches do not go together here; pass all rows, or marginalise it in the model"
            )


def _refuse_local(continuous: list[Any], parts: dict[str, Rows]) -> None:
    for site in continuous:
        local = [f.name for f in site["cond_indep_stack"] if f.name in parts]
        if local:
            raise ModelError(
                f"latent site {site['name']!r} lies in plate {local[0]!r}, which subsamples: its numbers would "
                "belong to places in the minibatch, not to rows; use fp.svi.AmortizedFlow, or all rows at once"
            )


def _refuse_scattered(continuous: list[Any]) -> None:
    devices = {s["name"]: str(s["value"].device) for s in continuous}
    if len(set(devices.values())) > 1:
        raise ModelError(f"the latents are on more than one device: {devices}")
