"""The unconstrained log density of a Pyro model, at many points at once."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates  # type: ignore[import-untyped]
from pyro import poutine
from pyro.infer.enum import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.utils import _pytree as pytree

from flowpath.svi.handlers import Block, First, Place, Site, loud, quiet
from flowpath.svi.tracing import Traced, trace

PARTICLES = "_flowpath_particles"
_AGREE = 1e-6  # relative difference of two ways to the same density that rounding explains, in float64


class ModelError(ValueError):
    """A model that fit_posterior cannot take; the message says which site and why."""


class ModelDensity:
    r"""log p(x, data) of a Pyro model as a function of its packed, unconstrained latents u,

    .. math:: \log p(u) = \log p(x(u), \text{data}) + \log |\det \partial x / \partial u|,

    for one point `(D,)` or P points `(P, D)` at once. The points stand in a plate left of all the model's; where the
    model does not broadcast over it (its one-point density is the judge), torch.vmap or a loop takes its place. The
    transform of a latent is made anew from the support that the model gives it at the point, so supports may depend on
    other latents. Discrete latents that can be enumerated are summed out in parallel.

    Args:
        model: the Pyro model.
        args, kwargs: what it is called with.
        checked: whether the first run validates arguments and observations of the distributions, as Pyro does.

    Attributes:
        sites: the continuous latents, name -> Site; dim: how many numbers they take unconstrained.
        dtype, device: of u. asked: the dtype that the user's model has, where `promoted` made this one.
        mode: "plate", "vmap" or "loop". notes: what is worth telling.

    Raises:
        ModelError: no continuous latent, a discrete one that cannot be enumerated, local latents in a subsampling
            plate, latents on more than one device.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs, self._checked = model, args, kwargs or {}, checked
        first = self._first_trace()
        self.plates = {name: site["fn"] for name, site in first.nodes.items() if isinstance(site.get("fn"), _Subsample)}
        self.subsampled = {
            n: fn for n, fn in self.plates.items() if fn.subsample_size is not None and fn.subsample_size < fn.size
        }
        latents = [s for s in first.nodes.values() if s["type"] == "sample" and not _given(s)]
        self.discrete = [s["name"] for s in latents if getattr(s["fn"].support, "is_discrete", False)]
        self._refuse_unsummable(latents)
        self.sites = _sites([s for s in latents if s["name"] not in self.discrete])
        self._refuse_local(latents)
        values = [first.nodes[name]["value"] for name in self.sites]
        self.dtype = functools.reduce(torch.promote_types, (v.dtype for v in values))
        self.asked, self.device = self.dtype, _one_device(values, self.sites)
        self.dim = max(site.stop for site in self.sites.values())
        self.nest = max([len(s["fn"].batch_shape) for s in first.nodes.values() if _scored(s)] + [_depth(first)])
        self.start = self.pack({name: first.nodes[name]["value"] for name in self.sites}, first)
        self.mode = "plate"
        self._graph: Traced | None = None
        self.notes: list[str] = []
        self._choose_mode()

    def _first_trace(self) -> Any:
        """A run of the model at draws of its prior; a flat prior has no dtype of its own and takes the data's."""
        floats = [
            x.dtype
            for x in pytree.tree_leaves((self.args, self.kwargs))
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        wanted = functools.reduce(torch.promote_types, floats, torch.get_default_dtype() if not floats else floats[0])
        try:
            return self._first_run(wanted)
        except RuntimeError:  # a product of two dtypes, as of a flat prior's value and data in a closure
            return self._first_run(torch.float64)

    def _first_run(self, dtype: torch.dtype) -> Any:
        with ExitStack() as stack:
            stack.enter_context(loud() if self._checked else quiet())
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(First(dtype))
            try:
                self.model(*self.args, **self.kwargs)
            except RuntimeError as error:
                if "device" in str(error):
                    raise ModelError(_devices(tracer.trace, self.args, self.kwargs, error)) from error
                raise
        return tracer.trace

    # -- one point, many points

    def one(self, u: Tensor) -> Tensor:
        """log p at a single point u `(D,)`: a scalar."""
        found, place = self._run(u)
        total = self._summed_out(found, None) if self.discrete else sum(s["log_prob"].sum() for s in _scores(found))
        return total + place.ladj

    def broadcast(self, u: Tensor) -> Tensor:
        """log p at u `(P, D)` with a plate of points: `(P,)`. The model must broadcast."""
        trace, place = self._run(u)
        if self.discrete:
            return self._summed_out(trace, PARTICLES) + place.ladj
        total = place.ladj
        for site in _scores(trace):
            log_prob = site["log_prob"]
            total = total + (
                log_prob.reshape(len(log_prob), -1).sum(-1) if log_prob.dim() == self.nest + 1 else log_prob.sum()
            )
        return total

    def __call__(self, u: Tensor) -> Tensor:
        """log p at u `(P, D)`: `(P,)`, by the mode that was chosen."""
        if self.mode == "plate":
            return self.broadcast(u)
        if self.mode == "vmap":
            graph = self._one_traced()
            rest = [*graph.held, *graph.noise()]
            return torch.vmap(lambda row: graph._module(row, *rest)[0])(u)
        return torch.stack([self.one(row) for row in u])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p `(P,)` and its gradient `(P, D)`; no graph is attached."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = self(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def _one_traced(self) -> Traced:
        """The one-point density as a graph, which torch.vmap can follow where it cannot follow Pyro."""
        if self._graph is None:
            self._graph = trace(self.one, [self.start])
        return self._graph

    def _run(self, u: Tensor, *handlers: Messenger) -> tuple[Any, Place]:
        place = Place(self.sites, u, self.nest)
        model = self.model
        if self.discrete:
            dim = -self.nest - (1 if u.dim() == 1 else 2)
            model = poutine.enum(config_enumerate(model, default="parallel"), first_available_dim=dim)
        with quiet(), poutine.block(), ExitStack() as stack:
            if u.dim() > 1:
                stack.enter_context(pyro.plate(PARTICLES, len(u), dim=-self.nest - 1))
            for handler in handlers:
                stack.enter_context(handler)
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(place)
            model(*self.args, **self.kwargs)
            tracer.trace.compute_log_prob()
        return tracer.trace, place

    def _summed_out(self, trace: Any, keep: str | None) -> Tensor:
        """The log density with enumerated sites summed out, a number for each row of the plate `keep`, if any."""
        trace.pack_tensors()
        plates = set(trace.plate_to_symbol.values())
        terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site in _scores(trace):
            frames = (f.name for f in site["cond_indep_stack"] if f.vectorized)
            terms.setdefault(frozenset(trace.plate_to_symbol[n] for n in frames), []).append(site["packed"]["log_prob"])
        sums = set(trace.symbol_to_dim) - plates
        target = frozenset() if keep is None else frozenset({trace.plate_to_symbol[keep]})
        with shared_intermediates() as cache:
            return contract_to_tensor(terms, sums, target_ordinal=target, cache=cache)

    # -- values and points

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at u `(P, D)`: name -> `(P, *shape)`."""
        found = [self._values(row) for row in u] if self.mode != "plate" else None
        if found is not None:
            return {name: torch.stack([f[name] for f in found]) for name in self.sites}
        trace, _ = self._run(u)
        return {
            n: trace.nodes[n]["value"]
            .expand(-1, *(1,) * (self.nest - s.batch_dims), *s.shape)
            .reshape(len(u), *s.shape)
            for n, s in self.sites.items()
        }

    def _values(self, u: Tensor) -> dict[str, Tensor]:
        trace, _ = self._run(u)
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def pack(self, values: dict[str, Tensor], trace: Any = None) -> Tensor:
        """The point u `(D,)` at which the latents have these values."""
        if trace is None:
            with quiet(), poutine.block(), poutine.trace() as tracer, poutine.condition(data=values):
                self.model(*self.args, **self.kwargs)
            trace = tracer.trace
        parts = [biject_to(trace.nodes[n]["fn"].support).inv(values[n]).flatten() for n in self.sites]
        return torch.cat([p.to(self.dtype) for p in parts]).detach()

    def log_prob_of_values(self, values: dict[str, Tensor], log_q: Callable[[Tensor], Tensor]) -> Tensor:
        """The density of values of all latents, from that of u: log q(u) - log |det dx / du|, a scalar."""
        missing = [n for n in self.sites if n not in values]
        if missing:
            raise ValueError(f"log_prob expects a value for every latent; {', '.join(missing)} lack one")
        u = self.pack(values)
        return log_q(u) - self._run(u)[1].ladj

    # -- subsampling plates

    def of_all_data(self) -> Callable[[Tensor], Tensor]:
        """log p at u `(P, D)` with all rows of the subsampling plates, in blocks of the model's own size.

        Raises:
            ModelError: the model does not take its rows from the plate's indices, or several plates subsample.
        """
        if not self.subsampled:
            return self
        if len(self.subsampled) > 1:
            raise ModelError(f"several plates subsample ({', '.join(self.subsampled)})")
        (name, fn), *_ = self.subsampled.items()
        blocks = [
            torch.arange(s, s + fn.subsample_size, device=self.device) for s in range(0, fn.size, fn.subsample_size)
        ]
        blocks[-1] = blocks[-1] - max(int(blocks[-1][-1]) + 1 - fn.size, 0)
        probe = self.start.unsqueeze(0)
        with torch.no_grad():
            if torch.equal(self._block(probe, name, blocks[0], None), self._block(probe, name, blocks[-1], None)):
                raise ModelError(
                    f"the model is given a minibatch of plate {name!r} instead of taking its rows by the plate's "
                    "indices, so the density of all the data cannot be had"
                )

        def whole(u: Tensor) -> Tensor:
            total, seen = torch.zeros((), dtype=u.dtype, device=u.device), 0
            for rows in blocks:
                fresh = rows >= seen
                total = total + self._block(u, name, rows, fresh, first=seen == 0)
                seen = int(rows[-1]) + 1
            return total

        return whole

    def _block(self, u: Tensor, name: str, rows: Tensor, fresh: Tensor | None, first: bool = True) -> Tensor:
        """What a block of rows adds to log p; the sites outside the plate count with the first block."""
        if self.mode != "plate":
            return torch.stack([self._block_of(row, name, rows, fresh, first) for row in u])
        return self._block_of(u, name, rows, fresh, first)

    def _block_of(self, u: Tensor, name: str, rows: Tensor, fresh: Tensor | None, first: bool) -> Tensor:
        trace, place = self._run(u, Block({name: rows}))
        lead = u.shape[:-1]
        total = place.ladj if first else torch.zeros_like(place.ladj)
        for site in _scores(trace):
            frame = next((f for f in site["cond_indep_stack"] if f.name == name), None)
            log_prob = site["log_prob"]
            if frame is not None:
                log_prob = log_prob * (len(rows) / self.subsampled[name].size)
                if fresh is not None and frame.dim is not None:
                    log_prob = log_prob * fresh.to(log_prob.dtype).reshape(-1, *(1,) * (-frame.dim - 1))
            elif not first:
                continue
            many = bool(lead) and log_prob.dim() == self.nest + 1
            total = total + (log_prob.reshape(len(log_prob), -1).sum(-1) if many else log_prob.sum())
        return total

    # -- choices and refusals

    def _choose_mode(self) -> None:
        """The fastest way over points that agrees with the one-point density."""
        u = self.start + 0.1 * torch.arange(3, dtype=self.dtype, device=self.device).unsqueeze(-1)
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(self.device)):
            wanted = torch.stack([self._seeded(self.one, row) for row in u])
            tolerance = _AGREE if self.dtype == torch.float64 else 1e-3
            for mode in ("plate", "vmap"):
                self.mode = mode
                try:
                    found = self._seeded(self, u)
                except Exception:  # whatever a model raises where it does not broadcast
                    continue
                close = torch.isclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
                if found.shape == wanted.shape and bool(close.all()):
                    return
        self.mode = "loop"
        self.notes.append("the model takes one point at a time, which is slow: let it broadcast over a leading plate")

    def _seeded(self, call: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        torch.manual_seed(0)
        return call(u)

    def _refuse_unsummable(self, latents: list[Any]) -> None:
        if not any(s["name"] not in self.discrete for s in latents):
            raise ModelError("the model has no continuous latent site, so there is no density to fit a flow to")
        for site in latents:
            if site["name"] in self.discrete and not site["fn"].has_enumerate_support:
                raise ModelError(
                    f"latent site {site['name']!r} is discrete ({type(site['fn']).__name__}) and cannot be enumerated; "
                    "marginalise it in the model, or infer it by another method"
                )

    def _refuse_local(self, latents: list[Any]) -> None:
        for site in latents:
            local = [f.name for f in site["cond_indep_stack"] if f.name in self.subsampled]
            if local:
                raise ModelError(
                    f"latent site {site['name']!r} lies in plate {local[0]!r}, which subsamples: its numbers would "
                    "belong to places in the minibatch, not to rows; use fp.svi.AmortizedFlow, or all rows at once"
                )


def _devices(trace: Any, args: Any, kwargs: Any, error: RuntimeError) -> str:
    """Which tensors are where, for a model that mixes devices."""
    found = {n: s["value"].device for n, s in trace.nodes.items() if isinstance(s.get("value"), Tensor)}
    given = [str(x.device) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    last = next(reversed(found), "the start")
    return (
        f"the model mixes devices after site {last!r}: its sites are on { {n: str(d) for n, d in found.items()} }, its "
        f"arguments on {given}; put data, constants and priors' parameters on one device ({error})"
    )


def _given(site: Any) -> bool:
    return site["is_observed"] or isinstance(site["fn"], _Subsample)


def _scored(site: Any) -> bool:
    return site["type"] == "sample" and not isinstance(site["fn"], _Subsample)


def _scores(trace: Any) -> list[Any]:
    return [site for site in trace.nodes.values() if _scored(site)]


def _depth(trace: Any) -> int:
    """How many dims the model's plates take."""
    dims = [f.dim for s in trace.nodes.values() if s["type"] == "sample" for f in s["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def _sites(latents: list[Any]) -> dict[str, Site]:
    sites, start = {}, 0
    for s in latents:
        free = biject_to(s["fn"].support).inv(s["value"]).shape
        plates = tuple(f.name for f in s["cond_indep_stack"])
        site = Site(s["name"], s["value"].shape, free, len(s["fn"].batch_shape), start, plates)
        sites[s["name"]], start = site, site.stop
    return sites


def _one_device(values: list[Tensor], sites: dict[str, Site]) -> torch.device:
    devices = {name: v.device for name, v in zip(sites, values, strict=True)}
    if len(set(devices.values())) > 1:
        raise ModelError(f"the latents are on more than one device: { {n: str(d) for n, d in devices.items()} }")
    return values[0].device


def _cuda(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
