"""Who looks on: whether derivatives written by hand, and tensors kept from call to call, may be used here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_plain(like: Tensor) -> bool:
    """Whether neither a tracer nor a transform looks on, which would leave its mark on a tensor made meanwhile."""
    return type(like) is Tensor and not is_watched()


def is_watched() -> bool:
    """Whether torch.compile, or what records as if it did, or torch.func looks on."""
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Whether torch.func's transforms are at work."""
    return torch._C._are_functorch_transforms_active()


def number(value: float, like: Tensor) -> Any:
    """A number of a formula, kept as a tensor of a dtype and device: on a CPU a Python number costs an operation more.

    The number itself where tensors cannot be kept.
    """
    return _kept_number(value, like.dtype, like.device) if is_plain(like) else value


@lru_cache(maxsize=256)
def _kept_number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.tensor(value, dtype=dtype, device=device)


class _Recording(threading.local):
    on = False


_recording = _Recording()


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd's own backward passes are recorded, as `flowpath.tracing` does: it says that it compiles."""
    before, _recording.on = _recording.on, True
    try:
        yield
    finally:
        _recording.on = before


def keeps_operations() -> bool:
    """Whether operations run as they are written: torch.compile makes others of them."""
    return _recording.on or not torch.compiler.is_compiling()


def differentiates_by_hand() -> bool:
    """Whether a backward pass may come, and plain autograd is what will run it.

    Not where gradients are off; not under torch.compile and torch.func, which differentiate the operations
    themselves; not in a dual level of forward-mode differentiation.
    """
    return torch.is_grad_enabled() and keeps_operations() and not is_transformed() and forward_ad._current_level < 0


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Inside torch.autocast, a context without it: products there keep the dtype of their factors."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
