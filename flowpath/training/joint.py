"""A training step's loss and gradients as one graph, in which autograd has no part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.foreign_bases import ConditionalBase, TorchBase
from flowpath.tracing import trace
from flowpath.tracing.comparing import Differs, difference, is_quicker
from flowpath.tracing.graphs import Facts
from flowpath.tracing.plain import cuda_indices, kept, laid_out

Batch = Sequence[Tensor | None]
_CHECK = 100  # the step of the second comparison with plain running; the next come at twice, four times, ... that
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def kind_of(batch: Batch) -> tuple[Any, ...]:
    """What of a batch a graph depends on."""
    return Facts.of(tuple(batch))


def is_known(objective: nn.Module) -> bool:
    """Whether all that the objective does is a function of batch, parameters and buffers, as far as can be known.

    So it is for the modules of flowpath and torch. Others may keep state in Python, draw by NumPy or look at values;
    distributions from outside check values; hooks want to be called.
    """
    modules = list(objective.modules())
    return (
        all(type(m).__module__.partition(".")[0] in ("flowpath", "torch") for m in modules)
        and not any(isinstance(m, (ConditionalBase, TorchBase)) for m in modules)
        and not any(getattr(m, hooks, None) for m in modules for hooks in _HOOKS)
        and not any(is_hooked(p) for p in objective.parameters())
    )


def is_hooked(p: Tensor) -> bool:
    """Whether something looks on at the gradient of a parameter."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


class JointStep:
    """The step for batches of one kind, from one graph.

    The objective is run once for its graph (`flowpath.tracing`), its backward pass included. Run op by op the graph
    gives what plain running gives, bit for bit on a CPU, without autograd; compiled by torch's inductor, which sees it
    as a whole, what it gives but for rounding. Random numbers are drawn outside, so that dropout takes those that it
    would. What the objective does in Python is fixed in the graph: `is_known` says where that is right. The step is
    compared with the plain one, loss, gradients and buffers, at once, and after 100, 200, 400, ... calls.

    Args:
        objective: the module; its forward returns the loss.
        batch: of the kind; finite.

    Raises:
        flowpath.tracing.TracingError: the objective looks at values.
        Differs: the graph is not the step.
    """

    def __init__(self, objective: nn.Module, batch: Batch) -> None:
        self.kind, self._objective = kind_of(batch), objective
        self._modules, self._all = list(objective.modules()), list(objective.parameters())
        self._trained = [p for p in self._all if p.requires_grad]
        self._mode = self._mode_now()
        self._buffers = list(objective.buffers())
        self._reached: list[int] = []

        def step(*batch: Tensor | None) -> list[Tensor]:
            loss, grads = self._plain(batch)
            self._reached = [i for i, g in enumerate(grads) if g is not None]
            laid = (laid_out(g, p) for g, p in zip(grads, self._trained, strict=True) if g is not None)
            return [loss, *laid]

        self._traced = trace(step, batch, live=[*self._all, *self._buffers])
        self._run: Callable[[list[Tensor]], list[Any]] = self._traced.run
        self._exact = not any(x.is_cuda for x in self._tensors(batch))
        self._calls, self._checks = 0, 0
        if not self._compare(batch):
            raise Differs("the loss or a gradient of the batch is not finite")

    def compile(self, batch: Batch) -> None:
        """Go through inductor from now on. Raises whatever a compiler may raise, and Differs."""
        self._run, self._exact = self._traced.compiled(self._tensors(batch)), False
        self._compare(batch)

    def fits(self, kind: tuple[Any, ...]) -> bool:
        """Whether the graph is right for batches of a kind, with the parameters that are trained now."""
        return kind == self.kind and self._mode_now() == self._mode

    def _mode_now(self) -> tuple[Any, ...]:
        return [m.training for m in self._modules], [p.requires_grad for p in self._all]

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch of the kind, its gradients added to those of the parameters."""
        self._calls += 1
        if self._calls >= _CHECK * 2**self._checks and self._compare(batch):
            self._checks += 1
        loss, *grads = self._run(self._tensors(batch))
        for i, g in zip(self._reached, grads, strict=True):
            p = self._trained[i]
            p.grad = g if p.grad is None else p.grad + g
        return loss

    def is_quicker(self, batch: Batch) -> bool:
        """Whether it takes less time than the plain step. Leaves gradients, generators and buffers as they were."""
        tensors = self._tensors(batch)
        with self._unseen(tensors):
            return is_quicker(lambda: self._run(tensors)[0], lambda: self._plain(batch)[0].detach())

    def _compare(self, batch: Batch) -> bool:
        """Raise Differs where the graph is not the step; False where the batch is not finite, which shows nothing."""
        tensors = self._tensors(batch)
        with self._unseen(tensors):
            loss, all_grads = self._plain(batch)
            grads = [g for g in all_grads if g is not None]
            held = [b.clone() for b in self._buffers]
        if [*map(id, self._objective.buffers())] != [*map(id, self._buffers)]:
            raise Differs("the step replaces buffers, which a graph would go on reading")
        if not all(bool(x.isfinite().all()) for x in (loss, *grads)):
            return False
        with self._unseen(tensors):
            ours, *our_grads = self._run(tensors)
            same = len(grads) == len(our_grads) and all(map(_like, self._buffers, held))
            exact = same and torch.equal(loss, ours) and all(map(torch.equal, grads, our_grads))
        if exact:
            return True
        wrong: str | None = "it reaches other parameters, or leaves other buffers"
        if same:
            rounding = "they differ in rounding" if self._exact else None
            wrong = difference(loss, grads, ours, our_grads, "the plain one's") or rounding
        if wrong is not None:
            steps = f" (after {self._calls} steps)" if self._calls else ""
            raise Differs(f"the graph of the step is not the step: {wrong}{steps}")
        return True

    def _plain(self, batch: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = self._objective(*batch)
        return loss, torch.autograd.grad(loss, self._trained, allow_unused=True)

    @staticmethod
    def _tensors(batch: Batch) -> list[Tensor]:
        return [x for x in batch if x is not None]

    @contextmanager
    def _unseen(self, tensors: list[Tensor]) -> Iterator[None]:
        """Put generators and buffers back."""
        with kept(self._buffers), torch.random.fork_rng(cuda_indices(tensors, self._trained)):
            yield


def _like(a: Tensor, b: Tensor) -> bool:
    """Whether two buffers are equal but for the rounding of a compiler."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=1e-3, equal_nan=True))
