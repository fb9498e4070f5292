"""One step of SVI for arguments of one kind, traced: losses and gradients without Pyro or autograd at run time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from flowpath.svi.elbo import PathMixin
from flowpath.tracing import Traced, trace
from flowpath.tracing.comparing import difference, is_quicker
from flowpath.tracing.plain import cuda_indices, kept, laid_out

Result = tuple[Any, list[Tensor | None]]  # the loss, and a gradient for each parameter that it reaches


@dataclass
class Problem:
    """A model, a guide and an ELBO, with what they were seen to touch: parameters, buffers, modules."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    elbo: Any
    params: list[Tensor] = field(default_factory=list)
    modules: dict[int, nn.Module] = field(default_factory=dict)

    def differentiate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Result:
        """Loss and gradients by Pyro and autograd."""
        for p in self.params:
            p.grad = None
        loss = self.elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss, self.take_grads()

    def take_grads(self) -> list[Tensor | None]:
        """The gradients that a backward pass left in the parameters, which are left without."""
        grads = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return grads

    def traceable(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Result:
        """Loss and gradients of the same estimator, as tensors, without a look at their values."""
        with Gradients(self.params) as found:
            if hasattr(self.elbo, "loss_and_surrogate"):
                loss, surrogate = self.elbo.loss_and_surrogate(self.model, self.guide, *args, **kwargs)
                surrogate.backward()
            else:
                loss = self.elbo.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss, [None if g is None else laid_out(g, p) for p, g in zip(self.params, found.grads, strict=True)]

    def buffers(self) -> list[Tensor]:
        """Tensors that modules hold beside their parameters."""
        owners = [*self.modules.values(), *(m for m in (self.model, self.guide) if isinstance(m, nn.Module))]
        held = (x for m in owners for x in (*m.buffers(), *m.parameters()))
        return list({id(x): x for x in held}.values())

    @contextmanager
    def noticing_modules(self) -> Iterator[None]:
        """Inside, modules that are called are noted."""

        def note(module: nn.Module, inputs: Any) -> None:
            self.modules[id(module)] = module

        hook = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def names(self) -> dict[int, str]:
        """Names by which model and guide reach tensors: variables of closures and modules, and module attributes."""
        found: dict[int, str] = {}
        for fn in (self.model, self.guide):
            for owner, values in _reachable(fn):
                for name, x in values.items():
                    if isinstance(x, Tensor):
                        found.setdefault(id(x), f"{owner}{name}")
        return found


class Gradients(TorchFunctionMode):
    """Inside, `loss.backward()` adds to `grads` instead of to the parameters, so that a trace can follow."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.params = list(params)
        self.grads: list[Tensor | None] = [None] * len(self.params)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.backward:
            return func(*args, **kwargs)
        loss, rest = args[0], dict(zip(("gradient", "retain_graph"), args[1:], strict=False)) | kwargs
        new = torch.autograd.grad(
            loss, self.params, rest.get("gradient"), retain_graph=rest.get("retain_graph"), allow_unused=True
        )
        self.grads = [b if a is None else a if b is None else a + b for a, b in zip(self.grads, new, strict=True)]
        return None


def _reachable(fn: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables of names in which a callable looks: its module's and its closure's variables, its own attributes."""
    fn = getattr(fn, "func", fn)
    if isinstance(fn, nn.Module):
        for prefix, module in fn.named_modules():
            yield f"{prefix}." if prefix else "", vars(module)
        fn = type(fn).forward
    elif inspect.ismethod(fn):
        yield "self.", vars(fn.__self__) if hasattr(fn.__self__, "__dict__") else {}
    try:
        variables = inspect.getclosurevars(inspect.unwrap(fn))
    except TypeError:
        return
    yield "", {**variables.globals, **variables.nonlocals}


class Plan:
    """The traced step for arguments of one kind: shapes, dtypes, devices, structure, values that are no tensors.

    Args:
        problem: what to trace.
        args, kwargs: arguments of the kind.
        extra: further tensors that change in place.
    """

    def __init__(
        self, problem: Problem, args: Sequence[Any], kwargs: dict[str, Any], extra: Iterable[Tensor] = ()
    ) -> None:
        self.problem = problem
        self.live = [*problem.params, *problem.buffers(), *extra]
        self.reached: list[int] = []

        def step(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
            loss, grads = problem.traceable(args, kwargs)
            self.reached = [i for i, g in enumerate(grads) if g is not None]
            return [torch.as_tensor(loss), *(grads[i] for i in self.reached)]

        self.traced: Traced = trace(step, [tuple(args), kwargs], live=self.live)
        self.params = [problem.params[i] for i in self.reached]
        self.run: Callable[[list[Tensor]], list[Any]] = self.traced.run
        self.compiled = False
        self.check = self._trace_support(args, kwargs)
        self.considered = False  # for compilation
        self.seconds = 0.0
        self.steps = self.checks = 0
        self.data = 0  # sets of data that were seen
        self._half: Callable[[list[Tensor]], list[Any]] | None = None

    def _trace_support(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[list[Tensor]], bool] | None:
        """A function that says whether the observed values lie in their supports."""

        def guided(*args: Any, **kwargs: Any) -> Any:
            drawn = poutine.trace(self.problem.guide).get_trace(*args, **kwargs)
            return poutine.replay(self.problem.model, trace=drawn)(*args, **kwargs)

        for model in (self.problem.model, guided):  # priors are quicker to draw from; flat ones cannot be
            try:
                inside = partial(_inside, model)
                return self._check_of(trace(inside, [tuple(args), kwargs], live=self.live, same_noise=False))
            except Exception:  # a support that is not defined, or hangs on values: the eager check stays
                continue
        return None

    def _check_of(self, traced: Traced) -> Callable[[list[Tensor]], bool]:
        def check(tensors: list[Tensor]) -> bool:
            if not traced.is_random:
                return bool(traced.run(tensors)[0])
            with torch.random.fork_rng(cuda_indices(tensors, self.problem.params)):
                return bool(traced.run(tensors)[0])

        return check

    def half(self, elbo: PathMixin, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Path and score gradients of half the particles, traced when they are first asked for."""
        if self._half is None:
            parts = self.problem.model, self.problem.guide

            def half(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
                return elbo._half_batch(*parts, tuple(args), kwargs)

            traced = trace(half, [tuple(args), kwargs], live=self.live)
            self._half = traced.compiled(tensors) if self.compiled else traced.run
        return self._half(tensors)

    def result(self, tensors: list[Tensor]) -> Result:
        """Loss and gradients, one for each of the problem's parameters."""
        loss, *found = self.run(tensors)
        grads: list[Tensor | None] = [None] * len(self.problem.params)
        for i, g in zip(self.reached, found, strict=True):
            grads[i] = g
        return loss, grads

    def difference(self, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor], seed: int) -> str | None:
        """How the traced step differs from Pyro's on the same noise, in words; None where it does not."""
        with kept(self.live), torch.random.fork_rng(cuda_indices(tensors, self.problem.params)):
            torch.manual_seed(seed)
            loss, grads = self.problem.differentiate(args, kwargs)
            torch.manual_seed(seed)
            ours, our_grads = self.result(tensors)
            return difference(loss, grads, ours, our_grads, "Pyro's")

    def compile(self, tensors: list[Tensor]) -> None:
        """Go through inductor from now on, where that is right and faster. Raises what a compiler raises."""
        run = self.traced.compiled(tensors)
        with kept(self.live), torch.random.fork_rng(cuda_indices(tensors, self.problem.params)):
            torch.manual_seed(0)
            loss, *grads = [r.clone() for r in self.run(tensors)]
            torch.manual_seed(0)
            ours, *our_grads = run(tensors)
            if (wrong := difference(loss, grads, ours, our_grads, "the traced one's")) is not None:
                raise ArithmeticError(f"the compiled step is not the traced one: {wrong}")
            quicker = is_quicker(lambda: run(tensors)[0], lambda: self.run(tensors)[0])
        if quicker:
            self.run, self.compiled, self._half = run, True, None


def _inside(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Whether all observed values lie in their supports, a scalar."""
    with poutine.block():
        sites = poutine.trace(model).get_trace(*args, **kwargs).nodes.values()
    observed: list[Any] = [s for s in sites if s["type"] == "sample" and s["is_observed"]]
    found = [s["fn"].support.check(s["value"]).all() for s in observed if s["value"] is not None]
    return torch.stack(found).all() if found else torch.tensor(True)
