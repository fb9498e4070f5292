"""Optimisers for compiled SVI: Pyro's, which keep one torch optimiser for each parameter, run as one for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import get_param_store
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.optim import is_scheduler
from torch import Tensor
from torch.optim import Optimizer

from flowpath.svi.kernels import ForeachClippedAdam, FusedSteps

Factory = Callable[[list[Tensor]], Optimizer]

# Their fused kernels compute what the loop over parameters computes, in one call.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_LISTS = 32  # lists of parameters that are kept ready for the fused kernel
_RUNTIME = {"params", "fused", "foreach"}  # how a group is run, not what it computes


class Updates:
    """What steps the parameters: a torch optimiser, a factory of one, or an optimiser of Pyro.

    Raises:
        TypeError: for another object, and for optimisers that need more than gradients; it names them.
    """

    def __init__(self, optimizer: Optimizer | Factory | PyroOptim) -> None:
        self._factory: Factory | None = None
        self._pyro: _PyroGroups | None = None
        self.torch: Optimizer | None = None
        if isinstance(optimizer, Optimizer):
            self.torch = _checked(optimizer)
        elif isinstance(optimizer, PyroOptim):
            self._pyro = _PyroGroups(optimizer)
        elif callable(optimizer) and not hasattr(optimizer, "optimizer"):
            self._factory = optimizer
        else:
            raise TypeError(
                "CompiledSVI expects a torch optimizer, a function of the parameters that returns one, or an optimizer "
                f"of pyro.optim, got {type(optimizer).__name__}{_advice(optimizer)}"
            )

    @property
    def trained(self) -> list[Tensor] | None:
        """The parameters of a torch optimiser, which trains these and no others; None where SVI's are trained."""
        if self.torch is None or self._factory is not None or self._pyro is not None:
            return None
        return [p for group in self.torch.param_groups for p in group["params"]]

    def cover(self, params: Sequence[Tensor]) -> None:
        """Take new parameters in."""
        if self._pyro is not None:
            self._pyro.cover(params)
        elif self._factory is not None and self.torch is None:
            made = self._factory(list(params))
            if not isinstance(made, Optimizer):
                raise TypeError(
                    f"CompiledSVI expects the optimizer's function to return a torch optimizer, got {made!r}"
                )
            self.torch = _checked(made)
        elif self._factory is not None and self.torch is not None:
            known = {id(p) for group in self.torch.param_groups for p in group["params"]}
            if new := [p for p in params if id(p) not in known]:
                self.torch.add_param_group({"params": new})

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """One step with these gradients, which are taken out of the parameters afterwards."""
        if self._pyro is not None and self._pyro.step_fused(params, grads):
            return
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if self._pyro is not None:
            self._pyro.step(params)
        elif self.torch is not None:
            self.torch.step()
        for p in params:
            p.grad = None


def _checked(optimizer: Optimizer) -> Optimizer:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("CompiledSVI: LBFGS evaluates the loss several times a step; use Adam or another optimizer")
    return optimizer


def _advice(optimizer: Any) -> str:
    if hasattr(optimizer, "optimizer"):
        return ": pass its optimizer, and call its step() beside svi.step()"
    if type(optimizer).__module__.startswith("pyro.optim.multi"):
        return ", which needs Hessians of the loss"
    return ""


class _PyroGroups:
    """One torch optimiser over all parameters of a PyroOptim, with the states and settings of its single ones.

    Those stay what the user sees: `get_state`, `save`, schedulers and settings by hand all work.
    """

    def __init__(self, optimizer: PyroOptim) -> None:
        made = optimizer.pt_optim_constructor
        if made is torch.optim.LBFGS or type(optimizer).__name__ == "HorovodOptimizer":
            name = "LBFGS" if made is torch.optim.LBFGS else "HorovodOptimizer"
            raise TypeError(f"CompiledSVI does not run {name}; use pyro.optim.Adam or another optimizer")
        self.optimizer = optimizer
        self.merged: Optimizer | None = None
        self.single: dict[Tensor, dict[str, Any]] = {}  # parameter -> the group of its own optimiser
        self._rates: list[Any] = []
        self._fresh: list[Tensor] = []
        self._fused: dict[int, tuple[Sequence[Tensor], FusedSteps]] = {}

    def cover(self, params: Sequence[Tensor]) -> None:
        """Make the single optimisers of new parameters as Pyro does, then the one over all."""
        new = [p for p in params if p not in self.single]
        for p in new:
            self.single[p] = self._own(p).param_groups[0]
        if new:
            self._fresh = list(self.single)
            self._merge()

    def _own(self, p: Tensor) -> Optimizer:
        """A parameter's own optimiser, made as PyroOptim makes it."""
        o = self.optimizer
        if p not in o.optim_objs:
            o.optim_objs[p] = o._get_optim(p)
            o.grad_clip[p] = o._get_grad_clip(p)  # type: ignore[arg-type]
            state = o._state_waiting_to_be_consumed.pop(get_param_store().param_name(p), None)
            if state is not None and is_scheduler(o.optim_objs[p]):
                o.optim_objs[p].load_state_dict(state["scheduler"])
                o.optim_objs[p].optimizer.load_state_dict(state["optimizer"])
            elif state is not None:
                o.optim_objs[p].load_state_dict(state)
        return o.optim_objs[p].optimizer if is_scheduler(o.optim_objs[p]) else o.optim_objs[p]

    def _merge(self) -> None:
        self._fused.clear()
        first = next(iter(self.single))
        kind = type(self._own(first))
        groups = self._groups()
        if kind is ClippedAdam:
            self.merged = ForeachClippedAdam(groups)
        else:
            quick = {"fused": True} if kind in _FUSED and self._fusible() else {}
            make: Any = self.optimizer.pt_optim_constructor
            self.merged = make(groups, **self.optimizer._get_optim_args(first) | quick)
        for p in self.single:
            if state := self._own(p).state.get(p):
                self.merged.state[p] = _moved(state, p) if self._fusible() else state

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters with equal settings together."""
        groups: dict[str, dict[str, Any]] = {}
        for p, own in self.single.items():
            settings = {k: v for k, v in own.items() if k not in _RUNTIME}
            groups.setdefault(repr(sorted(settings.items())), {"params": [], **settings})["params"].append(p)
        self._rates = [own.get("lr") for own in self.single.values()]
        return list(groups.values())

    def _fusible(self) -> bool:
        chosen = any(own.get("fused") or own.get("foreach") for own in self.single.values())
        kinds = {(p.device.type, p.is_floating_point()) for p in self.single}
        return not chosen and kinds <= {("cpu", True), ("cuda", True)}

    def step_fused(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
        """The step by the fused kernel, for a list of parameters that has been stepped before; whether that could be.

        The list is known by its identity, so it must not change.
        """
        self._follow_rates()
        known = self._fused.get(id(params))
        if known is None or known[0] is not params or any(g is None for g in grads):
            return False
        known[1].step(grads)  # type: ignore[arg-type]
        return True

    def _follow_rates(self) -> None:
        if [own.get("lr") for own in self.single.values()] != self._rates:
            self._regroup()

    def step(self, params: Sequence[Tensor]) -> None:
        """What PyroOptim's call does to each of the parameters, which hold their gradients."""
        self._follow_rates()
        for p in params:
            clip = self.optimizer.grad_clip[p]
            if clip is not None:
                clip(p)
        if self.merged is not None:
            self.merged.step()
            self._write_back(self.merged)
            clips = any(self.optimizer.grad_clip[p] for p in params)
            if not clips and FusedSteps.fits(self.merged, params) and all(p.grad is not None for p in params):
                if len(self._fused) >= _LISTS:
                    self._fused.clear()
                self._fused[id(params)] = params, FusedSteps(self.merged, params)

    def _regroup(self) -> None:
        """A scheduler, or the user, has changed the settings of the single optimisers."""
        self._fused.clear()
        if self.merged is not None:
            kept = {k: v for k, v in self.merged.param_groups[0].items() if k in _RUNTIME - {"params"}}
            self.merged.param_groups = [g | kept for g in self._groups()]

    def _write_back(self, merged: Optimizer) -> None:
        """Let the single optimisers have the states, and rates that the optimiser changes itself."""
        if self._fresh:
            for p in [p for p in self._fresh if p in merged.state]:
                own = self._own(p)
                own.state[p] = merged.state[p]
                own._opt_called = True  # type: ignore[attr-defined]  # or torch's schedulers warn
            self._fresh = [p for p in self._fresh if p not in merged.state]
        for group in merged.param_groups:
            if group.get("lr") is not self.single[group["params"][0]].get("lr"):
                for p in group["params"]:
                    self.single[p]["lr"] = group["lr"]
                self._rates = [own.get("lr") for own in self.single.values()]


def _moved(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """The fused kernels want the count of steps where the parameter is."""
    if isinstance(state.get("step"), Tensor):
        state["step"] = state["step"].to(p.device, torch.float32)
    return state
