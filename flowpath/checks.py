"""Checks of what users pass, and the broadcasting of a context against x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_count(who: str, name: str, value: int, least: int = 1) -> None:
    """A whole number of at least `least`, or an error that names the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{who} expects {name} to be a whole number of at least {least}, got {value!r}")


def check_inputs(
    who: nn.Module, name: str, x: Tensor, shape: Sequence[int] | None, context: Tensor | None, width: int | None
) -> tuple[Tensor, Tensor | None]:
    """Check x `(*batch, *event)` and context `(*batch, C)` for module `who`; broadcast their batch shapes.

    Args:
        who: the module that asks; its class names the error, its first parameter gives dtype and device.
        name: "x" or "z", for the message.
        x, context: what the caller passed.
        shape: the event shape, or None for one event dim of any width.
        width: the context's width, 0 for none, None to ignore it.

    Returns:
        x and context with one common batch shape; context None where none is used.
    """
    title = type(who).__name__
    _check_tensor(title, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{title} expects {name} of a floating dtype, got {x.dtype}; convert it with {name}.float()")
    event_dim = 1 if shape is None else len(shape)
    if x.dim() < event_dim or (shape is not None and tuple(x.shape[x.dim() - event_dim :]) != tuple(shape)):
        want = "at least one dimension" if shape is None else event_words(shape)
        raise ValueError(f"{title} expects {name} with {want}, got shape {tuple(x.shape)}")
    check_like(who, name, x)
    if width is None:
        return x, None
    if context is None:
        if width:
            raise ValueError(f"{title} expects a context with {width} features, got none; pass context=")
        return x, None
    _check_tensor(title, "the context", context)
    if not width:
        raise ValueError(f"{title} takes no context, got one of shape {tuple(context.shape)}; build it with context=")
    check_context(who, context, width)
    check_like(who, "context", context)
    return _broadcast(title, name, x, event_dim, context)


def event_words(shape: Sequence[int]) -> str:
    return f"{shape[0]} features" if len(shape) == 1 else f"event shape {tuple(shape)}"


def _check_tensor(title: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{title} expects {name} to be a tensor, got {type(x).__name__}; use torch.as_tensor")


def check_context(who: nn.Module, context: Tensor, width: int | None) -> None:
    """A context is a tensor `(*batch, width)`, of any width where that is None."""
    title = type(who).__name__
    _check_tensor(title, "the context", context)
    if context.dim() < 1 or width not in (None, context.shape[-1]):
        want = "features" if width is None else f"{width} features"
        raise ValueError(f"{title} expects a context with {want}, got shape {tuple(context.shape)}")


def check_like(who: nn.Module, name: str, x: Tensor, *, dtype: bool = True) -> None:
    """x is on the device of the module's first parameter and, if that is asked, of its dtype."""
    title, like = type(who).__name__, next(who.parameters(), None)
    if like is None:
        return
    if x.device != like.device:
        raise ValueError(f"{title} is on {like.device}, got {name} on {x.device}; move one with .to(...)")
    if dtype and x.dtype != like.dtype:
        raise TypeError(
            f"{title} holds {like.dtype} numbers, got {name} of {x.dtype}; convert {name} with "
            f".to({like.dtype}), or the module"
        )


def _broadcast(title: str, name: str, x: Tensor, event_dim: int, context: Tensor) -> tuple[Tensor, Tensor]:
    split = x.dim() - event_dim
    if x.shape[:split] == context.shape[:-1]:
        return x, context
    try:
        batch = torch.broadcast_shapes(x.shape[:split], context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{title}: the batch shapes of {name} {tuple(x.shape[:split])} and context {tuple(context.shape[:-1])} "
            "do not broadcast"
        ) from None
    return x.expand(*batch, *x.shape[split:]), context.expand(*batch, context.shape[-1])
