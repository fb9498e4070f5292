"""Guides run once more with their draws held: what path gradients are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from flowpath.distribution import FlowDistribution
from flowpath.estimators import reaches

Site: TypeAlias = Any  # Pyro's message, a dict


class Recorder(Messenger):
    """Draws the flows of a guide in one pass with what their score needs; `flows[name]` is (z, log q, its score)."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: dict[str, tuple[Tensor, Tensor, Callable[[], Tensor]]] = {}

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        fresh = not (msg["done"] or msg["is_observed"] or msg["args"] or msg["kwargs"]) and msg["value"] is None
        if fresh and isinstance(fn, FlowDistribution) and fn.has_rsample:
            refuse_dropout(msg["name"], fn.flow)
            self.flows[msg["name"]] = drawn = fn.rsample_and_score()
            msg["value"], msg["done"] = drawn[0], True


class Hold(Messenger):
    """Gives sites the values held for them; all others, deterministic ones among them, run as they are."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class Recording:
    """A guide that remembers its last run, plates' indices included, and can be run again at its draws.

    Args:
        guide: the guide, a callable.
    """

    trace: Trace

    def __init__(self, guide: Callable[..., Any]) -> None:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise TypeError(
                f"path gradients need a guide that can be called; {type(poutine.unwrap(guide)).__name__} is a Messenger"
            )
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.recorder = Recorder()
        with self.recorder, poutine.trace() as tracer:
            out = self.guide(*args, **kwargs)
        self.trace = tracer.trace
        return out

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, dict[str, Tensor]]:
        """The guide's trace at leaf copies of its reparameterised draws, and the leaves by site name.

        Delta sites are recomputed: they are functions of the others. Discrete draws and subsamples stay.
        """
        held, leaves = {}, {}
        for name, site in latents(self.trace):
            if is_delta(site["fn"]):
                continue
            value = detach_provenance(site["value"])
            if getattr(site["fn"], "has_rsample", False):
                value = leaves[name] = value.detach().clone().requires_grad_()
            held[name] = value
        with torch.enable_grad(), poutine.block(), poutine.trace() as tracer, Hold(held):
            self.guide(*args, **kwargs)
        return tracer.trace, leaves

    def path_terms(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """z . d log q / dz by site, a scalar each, whose gradient is that of log q through the draws alone.

        The log densities of Delta sites are left out: they are no densities, and keep their whole gradient.
        """
        with torch.enable_grad():
            alone = self._flows_alone()
            if alone is not None:
                return alone
            trace, leaves = self.again(args, kwargs)
            if not leaves:
                return {}
            terms = [t for t in (q.sum() for _, q in self.log_q(trace, leaves)) if t.requires_grad]
            slopes = torch.autograd.grad(terms, list(leaves.values()), allow_unused=True) if terms else []
            return self.along(leaves, slopes) if terms else {}

    def _flows_alone(self) -> dict[str, Tensor] | None:
        """The same without a second run, where every draw is of a flow whose context no other draw reaches."""
        drawn = {n: s for n, s in latents(prune_subsample_sites(self.trace)) if not is_delta(s["fn"])}
        if not set(drawn) <= set(self.recorder.flows):
            return None
        values = [site["value"] for site in drawn.values()]
        if len(drawn) > 1 and any(reaches(s["fn"].context, v) for s in drawn.values() for v in values):
            return None
        return {n: scaled(_along_event(s, self.recorder.flows[n][2]()), s).sum() for n, s in drawn.items()}

    def along(self, leaves: dict[str, Tensor], slopes: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """z . slope by site, a scalar each, for slopes at the leaves."""
        values = {name: site["value"] for name, site in latents(self.trace)}
        return {n: (values[n] * g).sum() for n, g in zip(leaves, slopes, strict=True) if g is not None}

    def log_q(self, trace: Trace, leaves: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """log q of each latent but Delta sites at its leaf, `(*batch,)`, scaled and masked.

        A flow whose context no leaf reaches takes value and score from its recorded pass.
        """
        for name, site in latents(prune_subsample_sites(trace)):
            if is_delta(site["fn"]):
                continue
            context = getattr(site["fn"], "context", None)
            if name in self.recorder.flows and not any(reaches(context, leaf) for leaf in leaves.values()):
                _, value, score = self.recorder.flows[name]
                log_q = _along_event(site, score())
                log_q = value.detach() + (log_q - log_q.detach())
            else:
                log_q = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            yield name, scaled(log_q, site)


def _along_event(site: Site, slope: Tensor) -> Tensor:
    """value . slope over the event dims, `(*batch,)`."""
    return (site["value"] * slope).flatten(-site["fn"].event_dim).sum(-1)


def scaled(log_prob: Tensor, site: Site) -> Tensor:
    """A site's log density under its scale and mask."""
    return scale_and_mask(log_prob, site["scale"], site["mask"])


def sites_of(trace: Trace) -> list[tuple[str, Site]]:
    """All that a trace recorded, with the names."""
    return list(trace.nodes.items())


def latents(trace: Trace) -> list[tuple[str, Site]]:
    """The unobserved sample sites, subsamples among them."""
    return [(n, s) for n, s in sites_of(trace) if s["type"] == "sample" and not s["is_observed"]]


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass, however it is wrapped."""
    while fn is not None and not isinstance(fn, dist.Delta):
        fn = getattr(fn, "base_dist", None)
    return fn is not None


def is_subsample(site: Site) -> bool:
    """Whether the site is a plate's choice of rows."""
    return isinstance(site["fn"], _Subsample)


def subsampled(site: Site) -> str | None:
    """The name of a plate around the site that shows a part of its data only, or None."""
    frames = (f for f in site["cond_indep_stack"] if f.full_size is not None and f.full_size != f.size)
    return next((f.name for f in frames), None)


def refuse_dropout(name: str, flow: nn.Module) -> None:
    """A flow that is random beyond its noise has no density at the draw: name it."""
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in flow.modules()):
        raise ValueError(
            f"the flow at site {name!r} has dropout and is in training mode: its density changes from call to call; "
            "build it with dropout=0.0, or call flow.eval()"
        )
