"""SVI whose steps are traced once, and run without Pyro and autograd, op by op or compiled."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from flowpath.svi.arguments import Seen, kind_of, unhashable
from flowpath.svi.elbo import PathMixin
from flowpath.svi.steps import Plan, Problem
from flowpath.svi.updates import Factory, Updates
from flowpath.svi.weights import ScoreWeight
from flowpath.tracing import TracingError
from flowpath.tracing.comparing import Differs
from flowpath.tracing.compiler import has_compiler, name_of_compiler
from flowpath.tracing.plain import cuda_indices
from flowpath.training.compiling import CompileMode

_PLANS = 8  # kinds of arguments whose traces are kept
_KINDS = 64  # kinds after which arguments that change from step to step are taken for the cause
_TRIAL = 50  # steps after which the pace is known
_COST = 30.0  # seconds that compiling takes
_GAIN = 0.5  # share of a traced step that it saves
_CHECK = 100  # the step of the first comparison with Pyro; the next come at twice, four times, ... that
_SEEDS = (20_011, 30_011)


class CompiledSVI:
    r"""`pyro.infer.SVI` for static models at a multiple of its speed: the same steps, on the same noise.

    The first step with arguments of a kind (shapes, dtypes, devices, structure, values that are no tensors) is Pyro's.
    At the second the whole computation, arguments and parameters to loss and gradients, is traced through model,
    guide, ELBO and autograd into one graph of ATen ops (`fp.svi.trace`), compared with Pyro at two seeds, and from then
    on run without Pyro: op by op, or compiled by torch's inductor. Arguments that are tensors are inputs of the graph,
    so new data of the same shape cost nothing; parameters, buffers and tensors in closures are read where they lie.

    What a graph cannot follow is noticed: control flow on values when tracing, randomness outside torch and sites that
    come and go by the comparison, data and settings that are baked in by further comparisons at the first new data and
    at step 100, 200, 400, ... Then one warning says why, and Pyro's steps go on with the same optimiser.

    Validation: observed values are checked against their supports once per new tensor, where Pyro's validation is on.

    Args:
        model, guide: as for `pyro.infer.SVI`.
        optimizer: of `pyro.optim` (also with clipping, with settings per parameter, or a PyroLRScheduler), a torch
            optimizer, or a function of the list of parameters that returns one (`torch.optim.Adam` is one). A torch
            optimizer trains its own parameters only.
        elbo: `fp.svi.PathELBO`, `fp.svi.DRegELBO`, or an ELBO of Pyro with one loss.
        compile: False to run op by op; True to compile at once, 10 to 30 s a kind of arguments; "auto" to compile when
            what it saves is worth it. Without a C++ compiler (on a GPU: Triton) steps run op by op.

    Raises:
        TypeError: an ELBO, or an optimizer, that is not supported; the message names it.
        ValueError: from a step: data outside their support, no parameters to train.

    Example:
        >>> import flowpath as fp, pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> svi = fp.svi.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> losses = [svi.step(y) for _ in range(3)]
        >>> svi.mode
        'traced'
        >>> svi.run(100, y).shape
        torch.Size([100])
        >>> pyro.clear_param_store()
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optimizer: PyroOptim | Optimizer | Factory,
        elbo: ELBO,
        *,
        compile: CompileMode = "auto",
    ) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f'CompiledSVI expects compile=True, False or "auto", got {compile!r}')
        self.model, self.guide, self.compile = model, guide, compile
        self.elbo: Any = _checked(elbo)
        self.reason: str | None = None
        self._updates = Updates(optimizer)
        self._problem = Problem(model, guide, elbo)
        self._weight: ScoreWeight | None = None
        self._plans: OrderedDict[Any, Plan | None] = OrderedDict()
        self._kinds = 0
        self._seen = Seen()
        self._doubt = self._named = False
        self._last: Plan | None = None
        self._names: list[tuple[str, Tensor]] = []

    @property
    def mode(self) -> str:
        """How the last step was run: "eager" (Pyro's), "traced" or "compiled"."""
        if self.reason is not None or self._last is None:
            return "eager"
        return "compiled" if self._last.compiled else "traced"

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a gradient step; returns the loss."""
        loss = float(self._advance(args, kwargs))
        if loss != loss:
            self._doubt = True  # Pyro's validation names the site at the next step
            _warn_of_nan()
        return loss

    def run(self, steps: int, *args: Any, **kwargs: Any) -> Tensor:
        """Take many steps with the same arguments; returns their losses `(steps,)`, on the parameters' device.

        The losses are looked at every hundred steps only, so that a GPU is not waited for.
        """
        losses: list[Tensor] = []
        for left in range(steps, 0, -1):
            losses.append(torch.as_tensor(self._advance(args, kwargs)).detach().clone())
            if self._last is not None and self._last.steps == _TRIAL:
                self._consider(self._last, self._kind(args, kwargs)[1], self._last.seconds / _TRIAL * left / 2)
            if left % _CHECK == 1 and bool(losses[-1].isnan()):
                self._doubt = True
                _warn_of_nan()
        return torch.stack([x.to(losses[-1]) for x in losses]) if losses else torch.zeros(0)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss without a step, as Pyro computes it."""
        with torch.no_grad():
            return float(self.elbo.loss(self.model, self.guide, *args, **kwargs))

    def _advance(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A step; its loss, a number or a scalar tensor."""
        plan, tensors = self._plan(args, kwargs)
        self._last = plan
        if plan is None:
            return self._eager(args, kwargs)
        start = time.perf_counter()
        if self._weight is not None and self._weight.is_due():
            elbo = self._weight.auto
            self._weight.move(lambda: plan.half(elbo, args, kwargs, tensors))
        loss, *grads = plan.run(tensors)
        self._updates.step(plan.params, grads)
        plan.seconds += time.perf_counter() - start
        plan.steps += 1
        return loss

    def _eager(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A step of Pyro's SVI, which shows what there is to train."""
        self._doubt = False
        problem = self._problem
        with poutine.trace(param_only=True) as capture, problem.noticing_modules():
            loss = self.elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        if isinstance(loss, tuple):
            raise TypeError(f"CompiledSVI: {type(self.elbo).__name__} has a loss of several parts; use pyro.infer.SVI")
        sites: dict[str, Any] = capture.trace.nodes
        found: dict[str, Any] = {n: s["value"].unconstrained() for n, s in sites.items() if s["type"] == "param"}
        trained = self._updates.trained
        params = list({id(p): p for p in (found.values() if trained is None else trained)}.values())
        if not any(p.grad is not None for p in params):
            raise ValueError(
                "CompiledSVI: no gradient reaches a parameter that the optimizer has, so no step would change anything"
            )
        if {id(p) for p in params} != {id(p) for p in problem.params}:
            self._forget(params)
        params = problem.params
        self._names = [(n, p) for n, p in found.items() if n in pyro.get_param_store()]
        self._updates.cover(params)
        self._updates.step(params, [p.grad for p in params])
        for p in found.values():
            p.grad = None
        return loss

    def _forget(self, params: list[Tensor]) -> None:
        """There are other parameters than before: traces of the old ones are of no use."""
        self._plans = OrderedDict.fromkeys(self._plans)
        self._problem.params = params

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Plan | None, list[Tensor]]:
        """The trace for these arguments; None where Pyro is to take the step."""
        if self.reason is not None or self._doubt:
            return None, []
        key, tensors = self._kind(args, kwargs)
        if key is None or not self._is_current():
            return None, tensors
        if key not in self._plans:
            self._meet(key)
            return None, tensors
        plan = self._plans[key]
        self._plans.move_to_end(key)
        try:
            if plan is None:
                plan = self._plans[key] = self._make(args, kwargs, tensors)
            if self._is_news(plan, args, kwargs, tensors):
                self._compare(plan, args, kwargs, tensors)
        except (TracingError, Differs) as error:
            self._fall_back(f"{type(self.elbo).__name__}: {error}")
            return None, tensors
        self._consider(plan, tensors, plan.seconds)  # as much again may well follow
        return plan, tensors

    def _kind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What a trace depends on, and the tensors that it takes; None for arguments that it cannot take."""
        kind, tensors = kind_of(args, kwargs)
        modes = tuple(m.training for m in (self.model, self.guide) if isinstance(m, nn.Module))
        key = kind, modes, torch.get_default_dtype()
        try:
            hash(key)
        except TypeError:
            names = ", ".join(unhashable(args, kwargs))
            self._fall_back(f"arguments of type {names} are neither tensors nor fixed values")
            return None, tensors
        return key, tensors

    def _is_current(self) -> bool:
        """Whether Pyro's store still holds the parameters that were traced."""
        store = pyro.get_param_store()._params
        return all(store.get(name) is p for name, p in self._names)

    def _meet(self, key: Any) -> None:
        """Arguments of a new kind: Pyro takes this step, and the next is traced."""
        self._kinds += 1
        self._plans[key] = None
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        if self._kinds > _KINDS:
            self._fall_back(
                f"{_KINDS} kinds of arguments came, each of which wants a trace of its own; numbers that change from "
                "step to step should be given as tensors, and batches have one shape"
            )

    def _make(self, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Plan:
        """Trace, and compare with Pyro."""
        hooked = [n for n, p in self._names if p._backward_hooks]
        if hooked:
            raise TracingError(f"the parameter {hooked[0]!r} has a hook on its gradient")
        extra: list[Tensor] = []
        if isinstance(self.elbo, PathMixin) and self.elbo.auto:
            self._weight = self._weight or ScoreWeight(self.elbo, self._problem.params[0])
            self._problem.elbo, extra = self._weight.elbo, [self._weight.value]
        before = _ids(pyro.get_param_store())
        plan = Plan(self._problem, args, kwargs, extra)
        if before != _ids(pyro.get_param_store()):
            raise TracingError("a step makes parameters, or replaces them in Pyro's store")
        for seed in _SEEDS:
            self._check(plan, args, kwargs, tensors, seed)
        self._name_constants(plan)
        if self.compile is True:
            self._compile(plan, tensors, asked=True)
        return plan

    def _is_news(self, plan: Plan, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> bool:
        """Check data that were not seen before; whether it is time to compare with Pyro."""
        new = self._seen.new(tensors)
        due = plan.steps >= _CHECK * 2**plan.checks
        if not new:
            return due
        if Distribution._validate_args and not (plan.check is not None and plan.check(tensors)):
            with torch.random.fork_rng(cuda_indices(new)):
                self.elbo.loss(self.model, self.guide, *args, **kwargs)  # raises, and names the site
        self._seen.add(new)
        plan.data += 1
        return plan.data == 2 or due

    def _compare(self, plan: Plan, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        if plan.steps >= _CHECK * 2**plan.checks:
            plan.checks += 1
        self._check(plan, args, kwargs, tensors, _SEEDS[0] + plan.steps)

    def _check(self, plan: Plan, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor], seed: int) -> None:
        difference = plan.difference(args, kwargs, tensors, seed)
        if difference is not None:
            raise Differs(
                f"the traced step differs: {difference}; its control flow hangs on latents, its sites come and go, it "
                "draws outside torch, or it reads a setting that has changed and is not an argument"
            )

    def _fall_back(self, reason: str) -> None:
        """Leave the steps to Pyro, for good."""
        self.reason = reason
        self._plans.clear()
        warnings.warn(f"CompiledSVI goes on as Pyro's SVI: {reason}", stacklevel=5)

    def _name_constants(self, plan: Plan) -> None:
        if self._named or not plan.traced.constants:
            return
        self._named = True
        names = self._problem.names()
        told = sorted({c.told(names) for c in plan.traced.constants})
        warnings.warn(
            f"CompiledSVI: the trace holds {', '.join(told)}, which are no arguments: changes in place are seen, other "
            "tensors under the same name are not; give data to step()",
            stacklevel=6,
        )

    def _consider(self, plan: Plan, tensors: list[Tensor], seconds: float) -> None:
        """Compile where the share that it saves of this many seconds of traced steps pays for it."""
        if self.compile == "auto" and not plan.considered and seconds * _GAIN > _COST:
            self._compile(plan, tensors, asked=False)

    def _compile(self, plan: Plan, tensors: list[Tensor], *, asked: bool) -> None:
        plan.considered = True
        device = plan.params[0].device
        if not has_compiler(device):
            if asked:
                why = f"there is no compiler ({name_of_compiler(device)})"
                warnings.warn(f"CompiledSVI runs traced, not compiled: {why}", stacklevel=7)
            return
        try:
            plan.compile(tensors)
        except Exception as error:  # whatever a compiler may raise
            first = next(iter(str(error).splitlines()), "")
            warnings.warn(f"CompiledSVI runs traced, not compiled: {type(error).__name__}: {first}", stacklevel=7)


def _warn_of_nan() -> None:
    warnings.warn("Encountered NaN: loss", stacklevel=3)


def _ids(store: Any) -> dict[str, int]:
    return {name: id(p) for name, p in store.named_parameters()}


def _checked(elbo: Any) -> ELBO:
    """An ELBO that can be traced."""
    if not isinstance(elbo, ELBO):
        raise TypeError(f"CompiledSVI expects an ELBO of flowpath or Pyro, got {type(elbo).__name__}")
    name = type(elbo).__name__
    if name.startswith("Jit"):
        raise TypeError(f"CompiledSVI traces the step itself: pass {name.removeprefix('Jit')}, not {name}")
    return elbo
