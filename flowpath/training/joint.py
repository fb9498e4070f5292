"""A training step's loss and gradients as one graph, in which autograd has no part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.tracing import trace
from flowpath.tracing.comparing import difference, is_quicker
from flowpath.tracing.plain import cuda_indices, kept, laid_out

Batch = Sequence[Tensor | None]
_CHECK = 100  # the step of the second comparison with plain running; the next come at twice, four times, ... that


class Differs(RuntimeError):
    """The graph of a step is not the step."""


def kind_of(batch: Batch) -> tuple[Any, ...]:
    """What of a batch a graph depends on."""
    return tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in batch)


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks on at gradients, which a graph would not call."""
    return any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters())


class JointStep:
    """The step for batches of one kind, from one graph.

    The objective is run once for its graph (`flowpath.tracing`), its backward pass included. The graph is run op by op,
    which gives what plain running gives, bit for bit on a CPU, without autograd; or torch's inductor compiles it as a
    whole, without guards or tensors saved from one pass to the other. Random numbers are drawn outside, so that dropout
    takes those that it would. What the objective does in Python is fixed in the graph; the step is compared with the
    plain one at once, and after 100, 200, 400, ... calls.

    Args:
        objective: the module; its forward returns the loss.
        batch: of the kind.
        compiled: whether inductor compiles the graph.

    Raises:
        flowpath.tracing.TracingError: the objective looks at values.
        Differs: the graph is not the step.
        Exception: whatever a compiler may raise.
    """

    def __init__(self, objective: nn.Module, batch: Batch, compiled: bool) -> None:
        self.kind, self._objective = kind_of(batch), objective
        self._all = list(objective.parameters())
        self._modes = self._mode()
        params = [p for p in self._all if p.requires_grad]
        self._live = [*self._all, *objective.buffers()]
        reached: list[Tensor] = []

        def step(*batch: Tensor | None) -> list[Tensor]:
            loss = objective(*batch)
            found = torch.autograd.grad(loss, params, allow_unused=True)
            reached[:] = [p for p, g in zip(params, found, strict=True) if g is not None]
            return [loss, *(laid_out(g, p) for p, g in zip(params, found, strict=True) if g is not None)]

        tensors = self._tensors(batch)
        traced = trace(step, batch, live=self._live)
        self._run: Callable[[list[Tensor]], list[Any]] = traced.compiled(tensors) if compiled else traced.run
        self._exact = not compiled and not any(x.is_cuda for x in tensors)
        self._params = reached
        self._calls, self._checks = 0, 0
        self._compare(batch)

    def fits(self, kind: tuple[Any, ...]) -> bool:
        """Whether the graph is right for batches of a kind, with the parameters that are trained now."""
        return kind == self.kind and self._mode() == self._modes

    def _mode(self) -> tuple[Any, ...]:
        return self._objective.training, [p.requires_grad for p in self._all]

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch of the kind, its gradients left in the parameters."""
        self._calls += 1
        if self._calls >= _CHECK * 2**self._checks:
            self._checks += 1
            self._compare(batch)
        loss, *grads = self._run(self._tensors(batch))
        for p, g in zip(self._params, grads, strict=True):
            p.grad = g
        return loss

    def is_quicker(self, batch: Batch) -> bool:
        """Whether it takes less time than the plain step. Leaves gradients, generators and buffers as they were."""
        tensors = self._tensors(batch)
        with self._unseen(tensors):
            return is_quicker(lambda: self._run(tensors)[0], lambda: self._plain(batch)[0].detach())

    def _compare(self, batch: Batch) -> None:
        tensors = self._tensors(batch)
        with self._unseen(tensors):
            torch.manual_seed(self._calls)
            loss, grads = self._plain(batch)
            torch.manual_seed(self._calls)
            ours, *our_grads = self._run(tensors)
            exact = torch.equal(loss, ours) and all(map(torch.equal, grads, our_grads))
            wrong = None if exact else difference(loss, grads, ours, our_grads, "the plain one's")
        if wrong is not None or (self._exact and not exact and bool(loss.isfinite())):
            raise Differs(f"the graph of the step is not the step: {wrong or 'they differ in rounding'}")

    def _plain(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self._objective(*batch)
        return loss, torch.autograd.grad(loss, self._params)

    @staticmethod
    def _tensors(batch: Batch) -> list[Tensor]:
        return [x for x in batch if x is not None]

    @contextmanager
    def _unseen(self, tensors: list[Tensor]) -> Iterator[None]:
        """Put generators and buffers back."""
        with kept(self._live), torch.random.fork_rng(cuda_indices(tensors, self._params)):
            yield
