"""Flows among Pyro's parameters: registering one, and noticing one that would never be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
from torch import nn

from flowpath.distribution import FlowDistribution
from flowpath.flow import Flow


def module(name: str, flow: Flow) -> Flow:
    """Register a flow's parameters in Pyro's store, so that SVI trains them: call it inside the model or guide.

    `pyro.module` does the same, but where the store already holds tensors of another flow under that name it hands
    those to the optimiser and this flow stays as it is, without a word; here that raises. A flow that is an attribute
    of a `PyroModule` needs no registering.

    Args:
        name: a name of its own for each flow of the process.
        flow: the flow, or any `nn.Module`.

    Returns:
        The flow.

    Raises:
        TypeError: flow is no module. ValueError: the store holds other tensors under the name.

    Example:
        >>> import flowpath as fp, pyro
        >>> flow = fp.realnvp(2)
        >>> def guide():
        ...     fp.svi.module("posterior", flow)
        ...     pyro.sample("z", flow())
    """
    if not isinstance(flow, nn.Module):
        raise TypeError(f"svi.module expects a flow, got {type(flow).__name__}")
    store = pyro.get_param_store()
    for key, parameter in flow.named_parameters():
        full = f"{name}$$${key}"
        if parameter.requires_grad and full in store and store._params[full] is not parameter:
            raise ValueError(
                f"svi.module({name!r}): Pyro's store holds another tensor as {full!r}, of an earlier flow, so this one "
                "would not be trained; give it a name of its own, or forget all with pyro.clear_param_store()"
            )
    frozen = [p for p in flow.parameters() if not p.requires_grad]
    if not frozen:
        pyro.module(name, flow)
        return flow
    for key, parameter in flow.named_parameters():
        if parameter.requires_grad:
            pyro.param(f"{name}$$${key}", parameter)
    return flow


def leaf_of(parameter: Any) -> Any:
    """The tensor that an optimiser moves: that behind a param site's value, or itself (Pyro's module-local ones)."""
    return parameter.unconstrained() if hasattr(parameter, "unconstrained") else parameter


def flow_of(fn: Any) -> FlowDistribution | None:
    """The flow distribution that a site's distribution is, or wraps."""
    while not isinstance(fn, FlowDistribution):
        fn = getattr(fn, "base_dist", None)
        if fn is None:
            return None
    return fn


class Watch:
    """For ELBOs: a place to note which parameters are trained anyway, while traces are searched for others."""

    _reached: list[nn.Parameter] | None = None

    @contextmanager
    def watching(self, reached: list[nn.Parameter]) -> Iterator[None]:
        """Inside it `refuse_untrained` looks at traces."""
        self._reached = reached
        try:
            yield
        finally:
            self._reached = None

    def watching_modules(self, *parts: Any) -> AbstractContextManager[None]:
        """`watching` where model and guide are modules, whose parameters a torch optimiser has."""
        if not all(isinstance(m, nn.Module) for m in parts):
            return nullcontext()
        return self.watching([p for m in parts for p in m.parameters()])

    def refuse_untrained(self, sites: Iterable[Any]) -> None:
        """Raise where a flow in these sites is trained by nobody."""
        if self._reached is not None:
            refuse_untrained(sites, self._reached)


def refuse_untrained(sites: Iterable[Any], reached: Iterable[nn.Parameter] = ()) -> None:
    """Raise where a site's flow has trainable parameters that no param site (and nobody else) hands to the optimiser.

    Args:
        sites: the messages of a trace or two.
        reached: parameters that are trained in another way.
    """
    sites = list(sites)
    held = {id(leaf_of(site["value"])) for site in sites if site["type"] == "param"}
    held |= {id(p) for p in reached}
    for site in sites:
        q = flow_of(site["fn"]) if site["type"] == "sample" else None
        if q is not None and any(p.requires_grad and id(p) not in held for p in q.flow.parameters()):
            raise ValueError(
                f"the flow at site {site['name']!r} has trainable parameters that are not registered with Pyro, so "
                "nothing would train it: make it an attribute of a PyroModule, or call fp.svi.module(name, flow) in "
                "the model or guide; a flow that is to stay as it is wants flow.requires_grad_(False)"
            )
