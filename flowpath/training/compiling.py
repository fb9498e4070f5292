"""One graph a step, or torch.compile, where it pays, and plain running where it does not or cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowpath.tracing.compiler import has_compiler, name_of_compiler, validation_kept
from flowpath.training.joint import JointStep, is_known, kind_of

CompileMode = bool | Literal["auto"]
_TRIAL = 50  # steps after which the pace of plain running is known
# Seconds that it takes on a slow machine, and the share of a plain step that it saves, cautiously: docs/speed.md
_COST, _GAIN = 60.0, 0.2
_TRACE_COST, _TRACE_GAIN = 2.0, 0.1


class Runner:
    """Calls the objective and its backward pass, from some step on as one graph, which may be compiled.

    The graph (`JointStep`) is made for batches of the kind that came twice running; batches of other kinds run plainly.
    With True it is compiled at once; an objective that a graph cannot follow, or that is not known well enough to be
    fixed in one (`is_known`), goes through torch.compile. With "auto" the plain pace shows whether compiling, or a
    graph that is run op by op, will save at least twice its own cost. A machine without a compiler, and a compilation
    that fails, leave plain running, with one warning where compiling had been asked for.

    Args:
        objective: the module; its forward returns the loss.
        mode: True, False or "auto".
        device: where it runs.
        joint: whether nothing from outside, such as another process or a callback, has a part in the steps.
    """

    def __init__(self, objective: nn.Module, mode: CompileMode, device: torch.device, joint: bool = True) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f'fit expects compile=True, False or "auto", got {mode!r}')
        self._objective, self._joint_allowed, self._device = objective, joint, device
        self._call: Callable[..., Tensor] = objective
        self._auto, self._asked = mode == "auto", mode is True
        self._base: tuple[int, float] | None = None
        self._wanted: Literal["graph", "compiled"] | None = None
        self._last: Any = None
        self._joint: JointStep | None = None
        self.compiled = False
        if mode is True:
            self._ask()

    def _ask(self) -> None:
        if has_compiler(self._device):
            self._wanted = "compiled"
        else:
            _warn_plain(f"there is no compiler ({name_of_compiler(self._device)})")

    def __call__(self, *batch: Tensor | None) -> Tensor:
        """The loss of a batch, its gradients left in the parameters (none where the loss is not finite)."""
        kind = kind_of(batch)
        if self._wanted is not None and kind == self._last:
            wanted, self._wanted = self._wanted, None
            self._prepare(batch, compiled=wanted == "compiled")
        self._last = kind
        try:
            if self._joint is not None and self._joint.fits(kind):
                return self._joint(batch)
            with validation_kept():
                return _backward(self._call, batch)
        except Exception as error:  # whatever a compiler may raise; the plain call raises again what is the user's
            if self._joint is None and not self.compiled:
                raise
            self._fall_back(error)
            return _backward(self._objective, batch)

    def _prepare(self, batch: tuple[Tensor | None, ...], compiled: bool) -> None:
        """A graph from this batch on; where there can be none and compiling is wanted, torch.compile."""
        joint = self._graph(batch)
        if joint is None:
            if compiled:
                self._compile_by_torch()
            return
        if compiled:
            try:
                joint.compile(batch)
            except Exception as error:  # whatever a compiler may raise
                self._fall_back(error)
                return
        if self._asked or joint.is_quicker(batch):
            self._joint, self.compiled = joint, compiled

    def _graph(self, batch: tuple[Tensor | None, ...]) -> JointStep | None:
        if not self._joint_allowed or not is_known(self._objective):
            return None
        try:
            return JointStep(self._objective, batch)
        except Exception:  # a tracer may fail in any way; plain running shows what is the user's
            return None

    def _compile_by_torch(self) -> None:
        try:
            with validation_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch about torch, while it imports a compiler
                self._call, self.compiled = torch.compile(self._objective), True
        except Exception as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        compiled = self.compiled
        self._call, self._joint, self._wanted, self.compiled = self._objective, None, None, False
        self._objective.zero_grad(set_to_none=True)
        first = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if compiled or self._asked:
            _warn_plain(f"compilation failed: {first}")
        else:
            warnings.warn(f"fit goes on without a graph of its step: {first}", stacklevel=5)

    def observe(self, step: int, seconds: float, progress: float) -> None:
        """Told after each step how many were done, in what time, and the share of the budget spent."""
        if not self._auto:
            return
        if self._base is None:
            self._base = step, seconds
        elif step - self._base[0] >= _TRIAL:
            pace = (seconds - self._base[1]) / (step - self._base[0])
            left = pace * step * (1.0 - progress) / progress if progress > 0 else 0.0
            self._auto = False
            if left * _GAIN > 2 * _COST and has_compiler(self._device):
                self._wanted = "compiled"
            elif left * _TRACE_GAIN > 2 * _TRACE_COST:
                self._wanted = "graph"


def _warn_plain(why: str) -> None:
    warnings.warn(f"fit runs without torch.compile: {why}", stacklevel=5)


def _backward(call: Callable[..., Tensor], batch: tuple[Tensor | None, ...]) -> Tensor:
    loss = call(*batch)
    loss.backward()
    return loss
