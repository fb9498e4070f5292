"""Learning rates through a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

ScheduleName = Literal["cosine", "constant", "plateau"]
_PLATEAU_FACTOR = 0.3
_COOLING = 0.2  # the share of the budget over which "plateau" goes to zero at its end


class Schedule:
    """The learning rate of the next step: the optimizer's own rate times a factor.

    Args:
        spec: "plateau" (times 0.3 whenever validation has not improved for half the patience, and down to zero over
            the last fifth of the budget), "cosine" (half a cosine over the budget), "constant", or a function
            optimizer -> torch LRScheduler, which is stepped after every step.
        optimizer: whose rate it sets.
        patience: epochs, for "plateau".

    Raises:
        ValueError: another name. TypeError: a function that returns no LRScheduler.
    """

    def __init__(
        self, spec: ScheduleName | Callable[[Optimizer], LRScheduler], optimizer: Optimizer, patience: int | None = None
    ) -> None:
        self._optimizer, self._spec, self._drop_after = optimizer, spec, max(1, (patience or 10) // 2)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._factor, self._begun, self._theirs = 1.0, False, None
        if callable(spec):
            self._theirs = spec(optimizer)
            if not isinstance(self._theirs, LRScheduler) or isinstance(self._theirs, ReduceLROnPlateau):
                raise TypeError(
                    f"fit expects schedule(optimizer) to return an LRScheduler stepped every step, got "
                    f'{type(self._theirs).__name__}; for a plateau pass schedule="plateau"'
                )
        elif spec not in ("cosine", "constant", "plateau"):
            raise ValueError(f'fit expects schedule "cosine", "constant", "plateau" or a function, got {spec!r}')

    def apply(self, progress: float) -> float:
        """Set the rate for the next step, `progress` in [0, 1] through the budget; returns it."""
        if self._theirs is not None:
            if self._begun:
                self._theirs.step()
            self._begun = True
            return float(self._optimizer.param_groups[0]["lr"])
        factor = self._factor_at(progress)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def _factor_at(self, progress: float) -> float:
        if self._spec == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return self._factor * min(1.0, (1.0 - progress) / _COOLING) if self._spec == "plateau" else 1.0

    @property
    def rate(self) -> float:
        """The optimizer's own rate, before any factor."""
        return self._rates[0]

    def judged(self, since_best: int) -> None:
        """Told after each validation how many epochs ago the best one was."""
        if self._spec == "plateau" and since_best and since_best % self._drop_after == 0:
            self._factor *= _PLATEAU_FACTOR

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        theirs = None if self._theirs is None else self._theirs.state_dict()
        return {"rates": self._rates, "factor": self._factor, "begun": self._begun, "theirs": theirs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self._rates, self._factor, self._begun = state["rates"], state["factor"], state["begun"]
        if self._theirs is not None and state["theirs"] is not None:
            self._theirs.load_state_dict(state["theirs"])
