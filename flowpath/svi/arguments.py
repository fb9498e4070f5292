"""The arguments of a step: of what kind they are, and which of their tensors were seen before."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

_MANY = 4096  # tensors that are remembered


def kind_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What of the arguments a trace depends on, and their tensors.

    That is shape, strides, dtype and device of tensors, the structure, and values that are no tensors.
    """
    if not kwargs and all(type(a) is Tensor for a in args):
        return tuple(_facts(x) for x in args), list(args)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    others = tuple((type(x), x) for x in leaves if not isinstance(x, Tensor))
    return (tuple(_facts(x) for x in tensors), structure, others), tensors


def _facts(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.stride(), x.requires_grad


def unhashable(args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The types among the arguments that cannot be told apart by value."""
    leaves, _ = pytree.tree_flatten((args, kwargs))
    return sorted({type(x).__name__ for x in leaves if getattr(type(x), "__hash__", None) is None})


class Seen:
    """The tensors that were seen, as they were: a write in place makes a tensor new again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def new(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that were not seen before."""
        return [x for x in tensors if not self._has(x)]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Remember tensors, without keeping them alive."""
        if len(self._known) > _MANY:
            self._known.clear()
        for x in tensors:
            self._known[id(x)] = weakref.ref(x), _version(x)

    def _has(self, x: Tensor) -> bool:
        reference, version = self._known.get(id(x), (None, -1))
        return reference is not None and reference() is x and version == _version(x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
