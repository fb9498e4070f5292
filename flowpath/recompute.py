"""Layers computed anew in the backward pass: memory of one layer instead of all, for one more forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowpath.eager import is_watched
from flowpath.transform import Chain, Direction, Transform


def run(
    t: Transform, direction: Direction, value: Tensor, context: Tensor | None, *, checkpoint_layers: bool
) -> tuple[Tensor, Tensor]:
    """Either direction of a transform; with `checkpoint_layers` the graph keeps what enters its layers, and no more.

    The layers of a Chain, nested ones opened, are recomputed one by one when their gradient is due, from the same
    input and with the same random numbers, so that gradients are the same bit for bit. torch.compile and torch.func
    decide for themselves what is kept.
    """
    if not checkpoint_layers or not torch.is_grad_enabled() or is_watched():
        return t.run(direction, value, context if t.context else None)
    from torch.utils.checkpoint import checkpoint

    ladjs = []
    for layer in _layers(t, direction):
        given = context if layer.context else None
        value, ladj = checkpoint(layer.run, direction, value, given, use_reentrant=False)
        ladjs.append(ladj)
    return value, sum(ladjs[1:], ladjs[0])


def _layers(t: Transform, direction: Direction) -> list[Transform]:
    """The leaves of a Chain in the order in which the direction visits them."""
    if not isinstance(t, Chain):
        return [t]
    return [leaf for part in t._ordered(direction) for leaf in _layers(part, direction)]


@contextmanager
def checkpointing(flow: Any, asked: bool) -> Iterator[None]:
    """Inside, the Flow recomputes its layers if that is asked for here or was before; it leaves as it came."""
    before = flow.checkpoint_layers
    flow.checkpoint_layers = asked or before
    try:
        yield
    finally:
        flow.checkpoint_layers = before
