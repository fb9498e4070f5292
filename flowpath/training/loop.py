"""The training loop: one page over an objective module whose forward returns the loss."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowpath.training.batches import Batch, Batches
from flowpath.training.checkpoint import Checkpoint, Signals
from flowpath.training.compiling import Runner
from flowpath.training.schedules import Schedule
from flowpath.training.scoring import Score
from flowpath.training.team import Team

_IN_A_ROW, _SHARE, _SHARE_FROM = 20, 0.1, 100  # non-finite batches that end a fit: in a row; of all steps, from so many
_EXPLAINED = 3

TRY = (
    "try a lower learning_rate, a smaller clip, or a Whiten first; look at the columns named, and at the support: data "
    "on a bound have density 0 or infinity"
)


@dataclass
class State:
    """Where a fit stands: what callbacks are given, and, but for `flow`, what a checkpoint keeps.

    Attributes:
        epoch, step, batch: completed epochs, completed steps, and steps within the running epoch.
        train, validation, validation_se: mean log density in nats in the latest epoch; NaN where there is none.
        best, best_epoch: the highest validation score and the epoch that reached it, 0 for none.
        learning_rate, grad_norm, seconds: of now, of the latest step, of the fit so far.
        skipped: batches skipped because loss or gradient was not finite.
        history: one row an epoch.
        stop: set it to True to end the fit after this epoch.
        stop_reason: why the fit ended; None while it runs.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    train: float = math.nan
    validation: float = math.nan
    validation_se: float = math.nan
    best: float = -math.inf
    best_epoch: int = 0
    since_best: int = 0
    learning_rate: float = math.nan
    grad_norm: float = math.nan
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    counted: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stop: bool = False
    stop_reason: str | None = None
    flow: Any = None

    def as_json(self) -> dict[str, Any]:
        """Everything but the flow."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "flow"}


@dataclass(frozen=True)
class Limits:
    """When a fit ends and how far a step goes. None: no such limit."""

    epochs: int | None = None
    steps: int | None = None
    patience: int | None = None
    clip: float | None = None
    time_limit: float | None = None


class Watcher(Protocol):
    """What looks on: a progress bar, TensorBoard, a user's callback."""

    def step(self, state: State) -> None: ...

    def epoch(self, state: State) -> None: ...

    def close(self) -> None: ...


class Loop:
    """Gradient steps on an objective until a limit is reached, the best weights kept.

    Args:
        runner: calls the objective, compiled or not.
        batches: what the objective is called with.
        evaluate: the held-out score, or None; the weights that score highest are the result's.
        kept: the module whose state is kept as best weights and in checkpoints.
        optimizer, schedule: of the objective's parameters.
        limits: when to end.
        watchers: who looks on.
        explain: a non-finite batch in words.
        checkpoint: where to write, or None.
        team: the processes that fit together.
    """

    def __init__(
        self,
        runner: Runner,
        batches: Batches,
        evaluate: Callable[[], Score] | None,
        kept: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        limits: Limits,
        watchers: Sequence[Watcher] = (),
        explain: Callable[[Batch], str] = lambda batch: "",
        checkpoint: Checkpoint | None = None,
        state: State | None = None,
        team: Team | None = None,
    ) -> None:
        self.runner, self.batches, self.evaluate, self.kept = runner, batches, evaluate, kept
        self.optimizer, self.schedule, self.limits = optimizer, schedule, limits
        self.watchers, self.explain, self.checkpoint = watchers, explain, checkpoint
        self.state, self.team = state or State(), team or Team()
        self.heard: int | None = None  # the signal that ends the fit, in whichever process it came
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.best: dict[str, Tensor] = {}

    def run(self) -> State:
        """Train to the end; then the best weights are in place. Ctrl-C ends it early, with what there is."""
        state, self._started = self.state, time.perf_counter() - self.state.seconds
        try:
            with Signals() as self.signals:
                state.stop_reason = self._why_stop() or (self._why_stop_at_epoch() if state.batch == 0 else None)
                while state.stop_reason is None:
                    self._epoch()
                self._write(at="end")
                if state.counted:
                    self._close_epoch()
        except KeyboardInterrupt:
            if self.team.size > 1:
                raise  # the others cannot follow
            state.stop_reason = "interrupted"
        finally:
            self.restore_best()
            for watcher in self.watchers:
                watcher.close()
        self.signals.pass_on(self.heard)
        return state

    def _epoch(self) -> None:
        state, before = self.state, self.state.step
        for batch in self.batches.epoch(state.epoch, state.batch):
            self._step(batch)
            state.stop_reason = self._why_stop()
            if state.stop_reason is not None:
                return
            self._write(at="step")
        if state.step == before and state.batch == 0:
            state.stop_reason = "the data ended"
            return
        self._close_epoch()
        state.stop_reason = self._why_stop_at_epoch()
        if state.stop_reason is None:
            self._write(at="epoch")

    def _step(self, batch: Batch) -> None:
        state = self.state
        state.learning_rate = self.schedule.apply(self.progress())
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.runner(*batch)
        norm = self._clip()
        clock = time.perf_counter() - self._started
        value, state.grad_norm, state.seconds, self.heard = self.team.measure(loss, norm, clock, self.signals.received)
        state.step, state.batch = state.step + 1, state.batch + 1
        if math.isfinite(value) and math.isfinite(state.grad_norm):
            self.optimizer.step()
            state.in_a_row, state.counted = 0, state.counted + 1
            state.loss_sum, state.norm_sum = state.loss_sum + value, state.norm_sum + state.grad_norm
        else:
            self._skip(batch, value, loss)
        self.runner.observe(state.step, state.seconds, self.progress())
        for watcher in self.watchers:
            watcher.step(state)

    def _clip(self) -> Tensor:
        """The norm of all gradients together, which are scaled down to the limit where there is one."""
        if self.limits.clip is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.limits.clip)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _skip(self, batch: Batch, value: float, loss: Tensor) -> None:
        state = self.state
        state.skipped, state.in_a_row = state.skipped + 1, state.in_a_row + 1
        if state.skipped <= _EXPLAINED:
            found = f"loss {value:g}, gradient norm {state.grad_norm:g}"
            told = self.team.gather((bool(torch.isfinite(loss)), self.explain(batch)))
            state.notes.append(f"step {state.step}: {found}; {min(told, key=lambda t: t[0])[1]}")

    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]: of steps or epochs, or of time if that is more."""
        limits, state = self.limits, self.state
        shares = [0.0]
        if limits.steps:
            shares.append(state.step / limits.steps)
        if limits.epochs:
            steps = self.batches.steps
            shares.append((state.epoch + (state.batch / steps if steps else 0.0)) / limits.epochs)
        if limits.time_limit:
            shares.append(state.seconds / limits.time_limit)
        return min(1.0, max(shares))

    def _why_stop(self) -> str | None:
        """A reason that ends the fit within an epoch."""
        limits, state = self.limits, self.state
        if self.heard is not None:
            return "interrupted"
        if state.in_a_row >= _IN_A_ROW or (state.step >= _SHARE_FROM and state.skipped > _SHARE * state.step):
            return "too many non-finite batches"
        if limits.steps is not None and state.step >= limits.steps:
            return "all steps done"
        if limits.time_limit is not None and state.seconds >= limits.time_limit:
            return "time limit"
        return None

    def _why_stop_at_epoch(self) -> str | None:
        limits, state = self.limits, self.state
        if state.stop:
            return "stopped by a callback"
        if limits.patience is not None and self.evaluate is not None and state.since_best >= limits.patience:
            return f"no better validation score in {limits.patience} epochs"
        return "all epochs done" if limits.epochs is not None and state.epoch >= limits.epochs else None

    def _close_epoch(self) -> None:
        """Score, keep the best weights, write the row of history."""
        state = self.state
        state.epoch, state.batch = state.epoch + 1, 0
        state.train = self.batches.offset - state.loss_sum / state.counted if state.counted else math.nan
        if self.evaluate is not None:
            state.validation, state.validation_se = self.evaluate()
            self._judge()
        row = {name: getattr(state, name) for name in ("epoch", "step", "train", "validation", "validation_se")}
        norm = state.norm_sum / state.counted if state.counted else math.nan
        row |= {"learning_rate": state.learning_rate, "grad_norm": norm, "skipped": state.skipped}
        state.history.append(row | {"seconds": state.seconds})
        state.loss_sum = state.norm_sum = state.counted = 0
        self.team.lead(self._tell)
        state.stop = self.team.share(state.stop)

    def _tell(self) -> None:
        for watcher in self.watchers:
            watcher.epoch(self.state)

    def _judge(self) -> None:
        state = self.state
        if state.validation > state.best:  # false for NaN
            state.best, state.best_epoch, state.since_best = state.validation, state.epoch, 0
            self.best = {k: v.detach().clone() for k, v in self.kept.state_dict().items()}
        else:
            state.since_best += 1
        self.schedule.judged(state.since_best)

    def restore_best(self) -> None:
        """Put the best weights in place, where a validation score has chosen some."""
        if self.best:
            self.kept.load_state_dict(self.best)

    def _write(self, at: str) -> None:
        if self.checkpoint is not None and self.checkpoint.due(at):
            self.checkpoint.write(self)


def warn_of(state: State) -> None:
    """Say aloud that a fit ended because of non-finite batches, where they come from, and what to try."""
    if state.stop_reason == "too many non-finite batches":
        warnings.warn(
            f"fit stopped: {state.skipped} of {state.step} batches were not finite and were skipped. First, "
            f"{state.notes[0]}; {TRY}",
            stacklevel=3,
        )
