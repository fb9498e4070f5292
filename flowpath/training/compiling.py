"""torch.compile where it pays, and plain running where it does not or cannot."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

CompileMode = bool | Literal["auto"]
_TRIAL = 50  # steps after which the pace of plain running is known
_COST = 60.0  # seconds a compilation takes on a slow machine
_GAIN = 0.25  # share of a plain step that compiling saves, cautiously (speed notes: 0.2 at D=43, 0.7 at D=2)


class Runner:
    """Calls the objective and its backward pass, compiled from some step on or never.

    With "auto" compilation begins once the plain pace shows that it will save at least its own cost over again; a
    machine without a compiler, and a compilation that fails, leave plain running, with one warning where compiling
    had been asked for.

    Args:
        objective: the module; its forward returns the loss.
        mode: True, False or "auto".
        device: where it runs.
    """

    def __init__(self, objective: nn.Module, mode: CompileMode, device: torch.device) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f'fit expects compile=True, False or "auto", got {mode!r}')
        self._objective = objective
        self._call: Callable[..., Tensor] = objective
        self._auto = mode == "auto" and has_compiler(device)
        self._base: tuple[int, float] | None = None
        self.compiled = False
        if mode is True:
            self._ask(device)

    def _ask(self, device: torch.device) -> None:
        if has_compiler(device):
            self._compile()
        else:
            _warn_plain(f"there is no compiler ({'Triton' if device.type == 'cuda' else 'g++ or clang++'})")

    def _compile(self) -> None:
        self._auto = False
        try:
            with validation_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch about torch, while it imports a compiler
                self._call, self.compiled = torch.compile(self._objective), True
        except Exception as error:
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        self._call, self.compiled = self._objective, False
        self._objective.zero_grad(set_to_none=True)
        first = next(iter(str(error).splitlines()), "")
        _warn_plain(f"compilation failed: {type(error).__name__}: {first}")

    def __call__(self, *batch: Tensor | None) -> Tensor:
        """The loss of a batch, its gradients left in the parameters (none where the loss is not finite)."""
        if not self.compiled:
            return _backward(self._objective, batch)
        try:
            with validation_kept():
                return _backward(self._call, batch)
        except Exception as error:  # whatever a compiler may raise; the plain call raises again what is the user's
            self._fall_back(error)
            return _backward(self._objective, batch)

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
                self._compile()


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here: a C++ compiler for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name)


@contextmanager
def validation_kept() -> Iterator[None]:
    """torch.compile switches the validation of all torch distributions off, for good: put it back."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _warn_plain(why: str) -> None:
    warnings.warn(f"fit runs without torch.compile: {why}", stacklevel=5)


def _backward(call: Callable[..., Tensor], batch: tuple[Tensor | None, ...]) -> Tensor:
    loss = call(*batch)
    loss.backward()
    return loss
