"""torch.compile where it pays, and plain running where it does not or cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowpath.tracing import TracingError
from flowpath.tracing.compiler import has_compiler, name_of_compiler, validation_kept
from flowpath.training.joint import JointStep, has_hooks, kind_of

CompileMode = bool | Literal["auto"]
_TRIAL = 50  # steps after which the pace of plain running is known
_COST = 60.0  # seconds a compilation takes on a slow machine
_GAIN = 0.25  # share of a plain step that compiling saves, cautiously (speed notes: 0.2 at D=43, 0.7 at D=2)


class Runner:
    """Calls the objective and its backward pass, compiled from some step on or never.

    Compiled, both are one graph (`JointStep`), for batches of the kind that came twice running; batches of other kinds
    run plainly. An objective that a graph cannot follow, or whose gradients somebody hooks, goes through torch.compile.
    With "auto" compilation begins once the plain pace shows that it will save at least its own cost over again. A
    machine without a compiler, and a compilation that fails, leave plain running, with one warning where compiling
    had been asked for.

    Args:
        objective: the module; its forward returns the loss.
        mode: True, False or "auto".
        device: where it runs.
        joint: whether all that the objective does is a function of batch, parameters and buffers, as one graph wants.
    """

    def __init__(self, objective: nn.Module, mode: CompileMode, device: torch.device, joint: bool = True) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f'fit expects compile=True, False or "auto", got {mode!r}')
        self._objective, self._joint_allowed = objective, joint
        self._call: Callable[..., Tensor] = objective
        self._auto = mode == "auto" and has_compiler(device)
        self._asked = mode is True
        self._base: tuple[int, float] | None = None
        self._wanted = False
        self._last: Any = None
        self._joint: JointStep | None = None
        if mode is True:
            self._ask(device)

    @property
    def compiled(self) -> bool:
        """Whether steps are compiled, or are to be from the next on."""
        return self._wanted or self._joint is not None or self._call is not self._objective

    def _ask(self, device: torch.device) -> None:
        if has_compiler(device):
            self._wanted = True
        else:
            _warn_plain(f"there is no compiler ({name_of_compiler(device)})")

    def __call__(self, *batch: Tensor | None) -> Tensor:
        """The loss of a batch, its gradients left in the parameters (none where the loss is not finite)."""
        kind = kind_of(batch)
        if self._wanted and kind == self._last:
            self._compile(batch)
        self._last = kind
        try:
            if self._joint is not None and self._joint.kind == kind:
                return self._joint(batch)
            with validation_kept():
                return _backward(self._call, batch)
        except Exception as error:  # whatever a compiler may raise; the plain call raises again what is the user's
            if not self.compiled:
                raise
            self._fall_back(error)
            return _backward(self._objective, batch)

    def _compile(self, batch: tuple[Tensor | None, ...]) -> None:
        """From this batch on."""
        self._wanted = False
        if not self._joint_allowed or has_hooks(self._objective):
            self._compile_by_torch()
            return
        try:
            self._joint = JointStep(self._objective, batch)
            if not self._asked and not self._joint.is_quicker(batch):
                self._joint = None
        except TracingError:
            self._compile_by_torch()
        except Exception as error:
            self._fall_back(error)

    def _compile_by_torch(self) -> None:
        try:
            with validation_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch about torch, while it imports a compiler
                self._call = torch.compile(self._objective)
        except Exception as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        self._call, self._joint, self._wanted = self._objective, None, False
        self._objective.zero_grad(set_to_none=True)
        first = next(iter(str(error).splitlines()), "")
        _warn_plain(f"compilation failed: {type(error).__name__}: {first}")

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
            if left * _GAIN > 2 * _COST:
                self._wanted = True


def _warn_plain(why: str) -> None:
    warnings.warn(f"fit runs without torch.compile: {why}", stacklevel=5)


def _backward(call: Callable[..., Tensor], batch: tuple[Tensor | None, ...]) -> Tensor:
    loss = call(*batch)
    loss.backward()
    return loss
