"""Whether a traced or compiled step is right, and how quick it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Differs(RuntimeError):
    """The graph of a step is not the step."""


def difference(
    loss: Any, grads: Sequence[Tensor | None], ours: Any, our_grads: Sequence[Tensor | None], whose: str
) -> str | None:
    """How a step's loss and gradients differ from the right ones beyond rounding, in words; None where they do not.

    Args:
        loss, grads: the right ones; a gradient that is None counts as zeros.
        ours, our_grads: the step's.
        whose: the right ones' owner, in the genitive: "Pyro's".
    """
    floats = [g for g in grads if g is not None] or [torch.as_tensor(loss)]
    tolerance = 1e-6 if all(g.dtype == torch.float64 for g in floats) else 1e-3
    a, b = (float(torch.as_tensor(v).detach()) for v in (loss, ours))
    if not (a == b or abs(a - b) <= tolerance * max(1.0, abs(a)) or (a != a and b != b)):
        return f"its loss is {b:.7g} where {whose} is {a:.7g}"
    largest = max([float(g.detach().abs().max()) for g in grads if g is not None and g.numel()], default=0.0)
    largest = max(largest, 1e-4 * max(1.0, abs(a)))  # a gradient that vanishes is rounding, in either
    largest = largest if math.isfinite(largest) else 1.0
    for i, (g, h) in enumerate(zip(grads, our_grads, strict=True)):
        x, y = (torch.zeros(()) if t is None else t.detach() for t in (g, h))
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance * largest, equal_nan=True):
            return f"its gradient of parameter {i} is not {whose} (by {float((x - y).abs().max()):.2g})"
    return None


def is_quicker(new: Callable[[], Any], old: Callable[[], Any], rounds: int = 5, calls: int = 3) -> bool:
    """Whether the best round of calls of `new`, which return numbers or scalars, is shorter than that of `old`."""
    times = [(_seconds(new, calls), _seconds(old, calls)) for _ in range(rounds)]
    return min(n for n, _ in times) < min(o for _, o in times)


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        float(run())
    return time.perf_counter() - start
