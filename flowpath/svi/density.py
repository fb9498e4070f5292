"""The unconstrained log density of a Pyro model, at many points at once."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates  # type: ignore[import-untyped]
from pyro import poutine
from pyro.infer.enum import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.fx import GraphModule

from flowpath.svi.handlers import Place, default_dtype, quiet
from flowpath.svi.looking import ModelError, Trace, depth, first_trace, latents, scores, showing_part
from flowpath.svi.rows import all_rows
from flowpath.tracing import Traced, trace
from flowpath.tracing.plain import cuda_indices

PARTICLES = "_flowpath_particles"


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
        checked: whether observations must lie in the supports of their distributions.

    Attributes:
        sites: the continuous latents, name -> Site; dim: how many numbers they take unconstrained.
        discrete: names of the latents that are summed out. subsampled: plates that show some of their rows.
        dtype, device: of u. asked: the dtype that the user's model has, where `promoted` made this one.
        start: the point u `(D,)` of a draw of the prior. mode: "plate", "vmap" or "loop".
        notes: what is worth telling.

    Raises:
        ModelError: no continuous latent, a discrete one that cannot be enumerated, local latents in a subsampling
            plate, latents on more than one device, an observation off its support; when called, latents that come and
            go.

    Example:
        >>> import torch, flowpath as fp, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     tau = pyro.sample("tau", dist.Exponential(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, tau), obs=y)
        >>> log_p = fp.svi.ModelDensity(model, (torch.ones(3),))
        >>> u = torch.tensor([[0.0], [1.0]])  # log tau
        >>> log_p(u)
        tensor([-5.2568, -7.6781])
        >>> log_p.values(u)["tau"]
        tensor([1.0000, 2.7183])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self._default = torch.get_default_dtype()
        first = first_trace(model, args, self.kwargs, checked)
        self.sites, self.discrete = latents(first)
        self.subsampled, self.nest = showing_part(first), depth(first)
        values = {name: first.nodes[name]["value"] for name in self.sites}
        self.dtype = functools.reduce(torch.promote_types, (v.dtype for v in values.values()))
        self.asked, self.device = self.dtype, next(iter(values.values())).device
        self.dim = max(site.stop for site in self.sites.values())
        self.start = self._packed(values, first)
        self._graph: tuple[Traced, GraphModule] | None = None
        self.notes: list[str] = []
        self.mode = self._choose_mode()

    # -- one point, many points

    def direct(self, u: Tensor) -> Tensor:
        """log p by one run of the model: at u `(D,)` a scalar, at `(P, D)`, in a plate of points, `(P,)`."""
        if self.discrete and len(u) == 1 and u.dim() == 2:  # sums over plates drop dims of size one
            return self.direct(u[0]).unsqueeze(0)
        trace, place = self.run(u)
        if self.discrete:
            return place.ladj + _summed_out(trace, PARTICLES if u.dim() > 1 else None)
        return place.ladj + sum(self.by_point(site["log_prob"], u) for site in scores(trace))

    def __call__(self, u: Tensor) -> Tensor:
        """log p at u `(P, D)`: `(P,)`, by the mode that was chosen."""
        return self._by(self.mode, u)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p `(P,)` and its gradient `(P, D)`; no graph is attached."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = self(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def of_all_data(self) -> Callable[[Tensor], Tensor]:
        """log p at u `(P, D)` with all rows of a subsampling plate, in blocks of the model's own size.

        Raises:
            ModelError: the model does not take its rows from the plate's indices, or several plates subsample.
        """
        return all_rows(self) if self.subsampled else self

    def _by(self, mode: str, u: Tensor) -> Tensor:
        if mode == "plate":
            return self.direct(u)
        if mode == "vmap":
            graph, module = self._one_traced()
            rest = [*graph.held, *graph.noise()]
            return torch.vmap(lambda row: module(row, *rest)[0])(u)
        return torch.stack([self.direct(row) for row in u])

    def _one_traced(self) -> tuple[Traced, GraphModule]:
        """The one-point density as a graph, which torch.vmap can follow where it cannot follow Pyro."""
        if self._graph is None:
            graph = trace(self.direct, [self.start])
            self._graph = graph, graph.module()
        return self._graph

    # -- a run of the model

    def run(self, u: Tensor, *handlers: Messenger) -> tuple[Trace, Place]:
        """The model's trace with its log densities at u `(D,)` or `(P, D)`, and what placed the latents there."""
        place = Place(self.sites, u, self.nest)
        model = self.model
        if self.discrete:
            dim = -self.nest - (1 if u.dim() == 1 else 2)
            model = poutine.enum(config_enumerate(model, default="parallel"), first_available_dim=dim)
        with quiet(), default_dtype(self._default), poutine.block(), ExitStack() as stack:
            if u.dim() > 1:
                stack.enter_context(pyro.plate(PARTICLES, len(u), dim=-self.nest - 1))
            for handler in handlers:
                stack.enter_context(handler)
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(place)
            model(*self.args, **self.kwargs)
            self._refuse_changes(tracer.trace)
            tracer.trace.compute_log_prob()
        return tracer.trace, place

    def _refuse_changes(self, trace: Trace) -> None:
        found = {site["name"] for site in scores(trace) if not site["is_observed"]}
        changed = found ^ {*self.sites, *self.discrete}
        if changed:
            raise ModelError(
                f"latent site {min(changed)!r} comes and goes with the values of others: the posterior has no fixed "
                "number of latents; sample it in every run, or split the model"
            )

    def at(self, values: Mapping[str, Tensor]) -> Trace:
        """The model's trace with these values of the latents, at one point."""
        data = {name: torch.as_tensor(values[name]).to(self.device, self.dtype) for name in self.sites}
        with quiet(), default_dtype(self._default), poutine.block(), poutine.trace() as tracer:
            poutine.condition(self.model, data=data)(*self.args, **self.kwargs)
        return tracer.trace

    def by_point(self, log_prob: Tensor, u: Tensor) -> Tensor:
        """A site's log density summed to a number for each point of u."""
        if u.dim() > 1 and log_prob.dim() == self.nest + 1:
            return log_prob.reshape(len(log_prob), -1).sum(-1)
        return log_prob.sum()

    # -- values and points

    def starts(self, init: Mapping[str, Tensor] | None = None) -> Tensor:
        """Points to look for the posterior from, `(6, D)`: the middle of every support, points around it, a draw of the
        prior; and, first, the values of all latents in `init`."""
        like = self.start
        around = torch.rand(4, self.dim, dtype=like.dtype, device=like.device) * 4.0 - 2.0
        rows = [torch.zeros_like(like), *around, like]
        return torch.stack(rows if init is None else [self.pack(init), *rows])

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at u `(P, D)`: name -> `(P, *shape)`."""
        if self.mode != "plate":
            runs = [self.run(row)[0] for row in u]
            return {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in self.sites}
        run, _ = self.run(u)
        return {name: run.nodes[name]["value"].reshape(len(u), *site.shape) for name, site in self.sites.items()}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The point u `(D,)` at which the latents have these values.

        Raises:
            ValueError: a latent is missing or of another shape.
        """
        for name, site in self.sites.items():
            if name not in values:
                raise ValueError(f"pack expects a value for every latent, {name!r} lacks one")
            shape = torch.as_tensor(values[name]).shape
            if shape != site.shape:
                raise ValueError(f"pack expects latent {name!r} of shape {tuple(site.shape)}, got {tuple(shape)}")
        run = self.at(values)
        return self._packed({name: run.nodes[name]["value"] for name in self.sites}, run)

    def _packed(self, values: Mapping[str, Tensor], run: Trace) -> Tensor:
        parts = [biject_to(run.nodes[n]["fn"].support).inv(v).flatten() for n, v in values.items()]
        return torch.cat([p.to(self.dtype) for p in parts]).detach()

    def ladj(self, u: Tensor) -> Tensor:
        """log |det dx / du| at u `(D,)`: a scalar."""
        return self.run(u)[1].ladj

    # -- the way over points

    def _choose_mode(self) -> str:
        """The fastest way over points that agrees with the one-point density."""
        u = self.start + 0.1 * torch.arange(3, dtype=self.dtype, device=self.device).unsqueeze(-1)
        close = 1e-6 if self.dtype == torch.float64 else 1e-3  # what rounding explains
        with torch.no_grad(), torch.random.fork_rng(cuda_indices([u])):
            wanted = torch.stack([self._seeded(self.direct, row) for row in u])
            for mode in ("plate", "vmap"):
                try:
                    found = self._seeded(functools.partial(self._by, mode), u)
                except Exception:  # whatever a model raises where it does not broadcast
                    continue
                if found.shape == wanted.shape and _agree(found, wanted, close):
                    return mode
        self.notes.append("the model takes one point at a time, which is slow: let it broadcast over a leading plate")
        return "loop"

    def _seeded(self, call: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        torch.manual_seed(0)
        return call(u)


def _summed_out(trace: Trace, keep: str | None) -> Tensor:
    """The log density with enumerated sites summed out, a number for each row of the plate `keep`, if any."""
    trace.pack_tensors()
    plates = set(trace.plate_to_symbol.values())
    terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in scores(trace):
        frames = (f.name for f in site["cond_indep_stack"] if f.vectorized)
        terms.setdefault(frozenset(trace.plate_to_symbol[n] for n in frames), []).append(site["packed"]["log_prob"])
    sums = set(trace.symbol_to_dim) - plates
    target = frozenset() if keep is None else frozenset({trace.plate_to_symbol[keep]})
    with shared_intermediates() as cache:
        return contract_to_tensor(terms, sums, target_ordinal=target, cache=cache)


def _agree(found: Tensor, wanted: Tensor, close: float) -> bool:
    return torch.allclose(found.double(), wanted.double(), close, close, equal_nan=True)
