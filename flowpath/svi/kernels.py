"""Steps of Adam and ClippedAdam for all parameters at once: a few kernel calls, and little Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import Optimizer

_KERNELS: dict[type, Any] = {torch.optim.Adam: torch._fused_adam_, torch.optim.AdamW: torch._fused_adamw_}
_SPECIAL = ("amsgrad", "capturable", "differentiable")


class FusedSteps:
    """The fused kernel of torch's Adam or AdamW on lists that are made once.

    Args:
        optimizer: whose settings and states are used, and moved on; it has taken a step.
        params: the parameters to step, in the order of the gradients to come.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        places = {id(p): i for i, p in enumerate(params)}
        self.kernel = _KERNELS[type(optimizer)]
        self.groups: list[tuple[dict[str, Any], list[int], list[list[Tensor]]]] = []
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if id(p) in places]
            states = [optimizer.state[p] for p in mine]
            lists = [mine, *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))]
            if mine:
                self.groups.append((group, [places[id(p)] for p in mine], lists))

    @staticmethod
    def fits(optimizer: Optimizer | None, params: Sequence[Tensor]) -> bool:
        """Whether the optimiser's step is what this class computes."""
        if type(optimizer) not in _KERNELS or not all(optimizer.state.get(p) for p in params):  # type: ignore[union-attr]
            return False
        plain = all(g.get("fused") and not any(g.get(k) for k in _SPECIAL) for g in optimizer.param_groups)  # type: ignore[union-attr]
        return plain and len({(p.dtype, p.device) for p in params}) == 1

    def step(self, grads: Sequence[Tensor]) -> None:
        """One step."""
        with torch.no_grad():
            for group, places, (params, averages, squares, steps) in self.groups:
                torch._foreach_add_(steps, 1)
                self.kernel(
                    params,
                    [grads[i] for i in places],
                    averages,
                    squares,
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=group["maximize"],
                )


class ForeachClippedAdam(ClippedAdam):
    """Pyro's ClippedAdam, all parameters of a group in each kernel call."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not taken."""
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update([p.data for p in params], [p.grad.data for p in params], params, group)

    def _update(self, data: list[Tensor], grads: list[Tensor], params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(data, states, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_clamp_min_(grads, -group["clip_norm"])
        torch._foreach_clamp_max_(grads, group["clip_norm"])
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, data, alpha=group["weight_decay"]))
        torch._foreach_mul_(mean, beta1)
        torch._foreach_add_(mean, grads, alpha=1 - beta1)
        spread = torch._foreach_sub(grads, mean) if group["centered_variance"] else grads
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, spread, spread, value=1 - beta2)
        scale = torch._foreach_sqrt(square)
        torch._foreach_add_(scale, group["eps"])
        sizes = [-group["lr"] * math.sqrt(1 - beta2 ** s["step"]) / (1 - beta1 ** s["step"]) for s in states]
        torch._foreach_addcdiv_(data, mean, scale, sizes)
