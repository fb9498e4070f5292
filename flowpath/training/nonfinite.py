"""Where a number that is not finite came from: the rows, the layer, the columns, in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpath.training.batches import Batch
from flowpath.training.front import Front


def explain(front: Front, names: tuple[str, ...], batch: Batch) -> str:
    """What is wrong with a batch whose loss or gradient was not finite.

    Args:
        front: of the flow that is trained.
        names: of the columns.
        batch: (x, context, weights) as the objective had them; the gradients are still in the parameters.

    Returns:
        A sentence that names the columns and the layer, or the parameters whose gradient it was.
    """
    x, context = batch[0], batch[1]
    if x is None:
        return ""
    bad = ~torch.isfinite(x.flatten(1))
    if bool(bad.any()):
        held = [_name(names, i) for i in bad.any(0).nonzero().flatten().tolist()]
        return f"{int(bad.any(1).sum())} of {len(x)} rows hold NaN or infinity in {_words('column', held)}"
    with torch.no_grad():
        layer, rows = _first_layer(front, x, context)
    if rows is not None:
        return f"{int(rows.sum())} of {len(x)} rows, first at the layer {layer}; {_extremes(x, rows, names)}"
    sick = [
        name
        for name, p in front.flow.named_parameters()
        if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    where = f"the gradient of {_words('parameter', sick)}" if sick else "the gradient overflowed"
    return f"{where}; {_extremes(x, torch.ones(len(x), dtype=torch.bool, device=x.device), names)}"


def _first_layer(front: Front, x: Tensor, context: Tensor | None) -> tuple[str, Tensor | None]:
    """The first layer that gives a value or ladj that is not finite, and the rows for which it does."""
    layers = front.inner.trace(x, context)
    names = front.names if len(front.names) == len(layers) else [step.name for step in layers]
    for name, step in zip(names, layers, strict=True):
        rows = ~(torch.isfinite(step.value.flatten(1)).all(1) & torch.isfinite(step.ladj))
        if bool(rows.any()):
            return name, rows
    rows = ~torch.isfinite(front.inner.log_prob(x, context))
    return f"base {type(front.inner.base).__name__}", rows if bool(rows.any()) else None


def _extremes(x: Tensor, rows: Tensor, names: tuple[str, ...]) -> str:
    """The columns in which these rows lie farthest out."""
    size = x[rows].flatten(1).abs().amax(0)
    top = size.topk(min(2, len(size))).indices.tolist()
    held = [f"{_name(names, i)} (up to {size[i]:.3g})" for i in top]
    return f"after whitening they lie farthest out in {_words('column', held)}"


def _name(names: tuple[str, ...], i: int) -> str:
    return names[i] if i < len(names) else str(i)


def _words(word: str, held: list[str]) -> str:
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f"{word if len(held) == 1 else word + 's'} {', '.join(held[:3])}{more}"
