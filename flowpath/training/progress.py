"""Who looks on while a fit runs: a progress bar, TensorBoard, the user's own functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

from flowpath.training.loop import State, Watcher


class Bar:
    """A tqdm bar over the budget, with train and validation scores and the time that remains; silent off a terminal.

    Args:
        total: steps of the whole budget, None where it is not known.
        show: True, False, or "auto" for a terminal only.
    """

    def __init__(self, total: int | None, show: bool | Literal["auto"]) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, disable=None if show == "auto" else not show, unit="step", desc="fit", leave=True)

    def step(self, state: State) -> None:
        self._bar.update(state.step - self._bar.n)

    def epoch(self, state: State) -> None:
        scores = {"train": f"{state.train:.3f}", "validation": f"{state.validation:.3f}"}
        self._bar.set_postfix({"epoch": state.epoch, **scores}, refresh=False)

    def close(self) -> None:
        self._bar.close()


class Scalars:
    """TensorBoard scalars of each epoch.

    Args:
        folder: where the event files go.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "fit: log_dir= writes for TensorBoard, which is not installed: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def step(self, state: State) -> None:
        pass

    def epoch(self, state: State) -> None:
        for name, value in state.history[-1].items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, state.step)

    def close(self) -> None:
        self._writer.close()


class Callbacks:
    """The user's functions, called with the state at the end of each epoch.

    Raises:
        TypeError: one of them cannot be called.
    """

    def __init__(self, functions: Any) -> None:
        self._functions: list[Callable[[State], object]] = [functions] if callable(functions) else list(functions)
        for f in self._functions:
            if not callable(f):
                raise TypeError(f"fit expects callbacks to be functions of the state, got {type(f).__name__}")

    def step(self, state: State) -> None:
        pass

    def epoch(self, state: State) -> None:
        for f in self._functions:
            f(state)

    def close(self) -> None:
        pass


def watchers(callbacks: Any, log_dir: Any, progress: Any, total: int | None) -> list[Watcher]:
    """All who look on: TensorBoard where `log_dir` is given, the user's functions, the bar over `total` steps."""
    scalars = [] if log_dir is None else [Scalars(log_dir)]
    return [*scalars, Callbacks(callbacks), Bar(total, progress)]
