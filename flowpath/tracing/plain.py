"""Running a function for its graph: without looks at values, and with everything put back afterwards."""

from __future__ import annotations

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

from flowpath.eager import recording
from flowpath.tracing.graphs import Facts

ONE_AT_A_TIME = threading.RLock()


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Inside, nothing looks at a tensor's value: no validation of distributions, no warnings about NaN.

    `x.item()` gives a number where it is known, a tensor without gradient where not. All is put back. What is switched
    off is so in the whole process, so one thread is inside at a time; others meanwhile run without validation.
    """
    with ONE_AT_A_TIME, _plain_tensors():
        yield


@contextmanager
def _plain_tensors() -> Iterator[None]:
    quiet = {name: False for name in pyro.settings.get() if name.startswith("validate_")}
    with ExitStack() as stack:
        stack.enter_context(pyro.settings.context(**quiet))
        stack.enter_context(_patched(Distribution, "_validate_sample", lambda self, value: None))
        stack.enter_context(_patched(pyro.util, "torch_isnan", lambda x: False))
        # What torch.export does too: code that branches on values takes its branch without.
        stack.enter_context(_patched(torch.compiler, "_is_compiling_flag", True))
        stack.enter_context(recording())
        # A node's fake tensor takes torch as long to make as all the rest; the passes need the four facts only.
        if hasattr(proxy_tensor, "extract_val"):
            stack.enter_context(_patched(proxy_tensor, "extract_val", Facts.of))
        stack.enter_context(_Items())
        yield


class _Items(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.item:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args)
        except RuntimeError:
            return args[0].detach()


@contextmanager
def _patched(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of buffers back that a run changes, such as those of a batch normalisation."""
    before = [(x, x.detach().clone()) for x in tensors if not x.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, copy in before:
                x.copy_(copy)


def cuda_indices(*groups: Sequence[Any]) -> list[int]:
    """The CUDA devices of tensors, as `torch.random.fork_rng` wants them."""
    found = {x.device.index for group in groups for x in group if isinstance(x, Tensor) and x.is_cuda}
    return sorted(i for i in found if i is not None)


def laid_out(grad: Tensor, p: Tensor) -> Tensor:
    """A gradient with the strides of its parameter, as backward() leaves it."""
    return grad if grad.stride() == p.stride() else grad.new_empty_strided(p.shape, p.stride()).copy_(grad)
