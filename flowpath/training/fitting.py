"""Fitting a flow to rows by maximum likelihood, and scoring rows with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flowpath.checks import check_count
from flowpath.flow import Flow
from flowpath.objectives import MaximumLikelihood
from flowpath.recompute import checkpointing
from flowpath.scope import devices, lent, random, versions
from flowpath.training.checkpoint import Checkpoint, Resumed
from flowpath.training.compiling import CompileMode, Runner
from flowpath.training.front import Front
from flowpath.training.intake import Data, Request, build, take_in
from flowpath.training.loop import Limits, Loop, State, Watcher, warn_of
from flowpath.training.nonfinite import explain
from flowpath.training.progress import watchers
from flowpath.training.results import FitResult
from flowpath.training.schedules import Schedule, ScheduleName
from flowpath.training.scoring import Score, held_out
from flowpath.training.team import Team, together

_EPOCHS, _LEAST_STEPS = 100, 2000  # the default budget: so many epochs, more where they make few steps
_PATIENT_STEPS = 400  # patience lasts at least so many steps


def fit(
    flow: Flow | str,
    x: Any,
    *,
    context: Any = None,
    weights: Any = None,
    validation: Any = 0.1,
    test: Any = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    schedule: ScheduleName | Callable[[Optimizer], LRScheduler] = "plateau",
    patience: int | None = 20,
    clip: float | None = 5.0,
    time_limit: float | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    compile: CompileMode = "auto",
    checkpoint_layers: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    callbacks: Callable[[State], object] | Sequence[Callable[[State], object]] = (),
    progress: bool | Literal["auto"] = "auto",
    **options: Any,
) -> FitResult:
    r"""Fit a flow to rows by maximum likelihood: the largest :math:`\sum_i w_i \log q(x_i \mid c_i)`.

    Rows are read in float64; the whitening is set from the training rows, unless it is set already, and done in
    float64; the rest runs in the flow's dtype. The weights that score highest on the validation rows are kept. Ctrl-C
    ends the fit and returns what there is. The same seed gives the same result on the same machine; torch's random
    state is then left as it was found.

    Under torchrun the processes fit together (torch DDP: NCCL on GPUs, gloo on CPUs). Each is called with the same rows
    and settings, reads and whitens all rows, and takes its part of every batch of `batch_size`; rank 0 alone writes,
    shows progress and calls the callbacks; all return the same weights and scores.

    Args:
        flow: a Flow, trained in place and returned in eval mode on its device, its frozen parameters left as they are;
            or the name of an architecture, built with `options`.
        x: rows `(N, *event)`: tensor, NumPy array, pandas or polars DataFrame, or a Dataset (read whole); or a stream:
            a DataLoader, or an iterator of batches such as a simulator. Items of a Dataset or a stream are x,
            (x, context), (x, context, weights) or a dict with these keys.
        context: rows `(N, C)`.
        weights: one a row `(N,)`; negative ones too, which need validation.
        validation, test: a share of the rows, rows as x, (x, context) or (x, context, weights), or None. Test rows are
            scored once, at the end.
        batch_size: rows of a step; by default a fortieth of the rows, within 32 and 256.
        epochs, steps: the budget, whichever ends first; by default 100 epochs or 2000 steps, whichever is more. An
            iterator needs steps or a time limit.
        learning_rate: of the default optimizer, Adam.
        optimizer: parameters -> Optimizer, in place of Adam.
        schedule: "plateau" (lowered when validation stalls, to zero over the last fifth of the budget), "cosine",
            "constant", or optimizer -> LRScheduler, stepped every step.
        patience: epochs without a better validation score that end the fit (more where an epoch has few steps); None to
            spend the budget.
        clip: largest gradient norm, or None.
        time_limit: seconds.
        seed: of weights, split, shuffles and dropout; None takes them from torch's global generator.
        device: where to train; "auto" is a GPU where there is one.
        compile: True: steps are compiled from the second on. False: they run as they are written. "auto": from some
            step on as one graph, in a long fit compiled, where the pace shows that it pays; a graph alone gives the
            same numbers, on a CPU bit for bit, where a compiler may round otherwise. A flow with foreign modules or
            hooks, or a fit with callbacks, has no graph; "auto" leaves it as it is.
        checkpoint_layers: compute layers anew in the backward pass: a step takes the memory of one layer, and the
            time of one more forward pass; the same gradients, without compile.
        checkpoint: a folder or .safetensors file, written atomically while training.
        resume: a checkpoint to go on from, with the same rows and settings; on one CPU thread the result is bit for
            bit that of a fit that was never stopped (with `compile=False`, in-memory rows and no time limit).
        log_dir: folder for TensorBoard scalars.
        callbacks: functions of the `State`, called after each epoch; `state.stop = True` ends the fit.
        progress: show a bar; "auto" on a terminal.
        options: arguments of the architecture, with a name.

    Returns:
        FitResult: the flow, the scores with standard errors, the history.

    Raises:
        TypeError, ValueError: rows that are no numbers, empty, not finite, constant, duplicate or too few, each named;
            rows that do not fit the flow; settings out of range; a flow with nothing to train; under torchrun, a stream
            or rows that differ between processes.
        FileNotFoundError, FileExistsError: `resume` of nothing; `checkpoint` over an unfinished fit.

    Example:
        >>> import torch, flowpath as fp
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3 + 10
        >>> result = fp.fit("gaussian", x, test=0.2, seed=0, steps=100, learning_rate=0.05)
        >>> -5.5 < result.test_log_prob < -4.5
        True
    """
    resumed = None if resume is None else Resumed.read(resume)
    home, away = devices(flow, device)
    with together(away) as team, random(_seed(seed, team), resumed is not None, away):
        flow, x = build(flow, x, context, options)
        order_seed = int(torch.randint(2**62, ())) if resumed is None else int(resumed.identity["order_seed"])
        with lent(flow, home, away), checkpointing(flow, checkpoint_layers):
            opt = (optimizer or partial(adam, learning_rate))(trainable(flow))
            front = Front(flow)
            objective = MaximumLikelihood(front.inner)
            kept = nn.ModuleList([objective, *front.parts()])
            if resumed is not None:
                resumed.weights_into(kept)
            team.same_weights(kept)
            data = take_in(front, Request(x, context, weights, validation, test, batch_size, steps, order_seed, team))
            limits = _limits(data, epochs, steps, patience, clip, time_limit)
            _warn_if_slow(flow)
            loop = Loop(
                Runner(
                    team.share_out(objective, data.batches),
                    team.compiles(False if flow.checkpoint_layers else compile),
                    away,
                    joint=team.size == 1 and not callbacks,
                ),
                data.batches,
                None if data.validation is None else partial(held_out, front, data.validation, team),
                kept,
                opt,
                Schedule(schedule, opt, limits.patience),
                limits,
                team.lead(lambda: _watchers(callbacks, log_dir, progress, limits, data)) or [],
                partial(explain, front, data.names),
                None if checkpoint is None else team.lead(lambda: Checkpoint(checkpoint, data.identity, resume)),
                State(flow=flow, notes=list(data.notes)),
                team,
            )
            if resumed is not None:
                resumed.check(data.identity)
                resumed.into(loop)
            team.agree(data.identity | vars(limits) | {"step": loop.state.step})
            team.part_ways(order_seed + loop.state.step)
            loop.run()
            warn_of(loop.state)
            there = None if loop.state.stop_reason == "interrupted" else team  # a signal may have ended the others
            tested = None if data.test is None else held_out(front, data.test, there)
    return _result(loop, data, tested, seed, away)


def _seed(seed: int | None, team: Team) -> int | None:
    """Rank 0's seed; without one the processes of a team share a number from its global generator."""
    if seed is None and team.size > 1:
        seed = int(torch.randint(2**62, ()))
    return team.share(seed)


def _result(loop: Loop, data: Data, tested: Score | None, seed: int | None, device: torch.device) -> FitResult:
    state = loop.state
    scored = state.best_epoch > 0
    best = next((row for row in state.history if row["epoch"] == state.best_epoch), {})
    return FitResult(
        flow=state.flow,
        history=state.history,
        best_epoch=state.best_epoch,
        stop_reason=str(state.stop_reason),
        epochs=state.epoch,
        steps=state.step,
        skipped=state.skipped,
        seconds=state.seconds,
        validation_log_prob=best["validation"] if scored else None,
        validation_se=best["validation_se"] if scored else None,
        test_log_prob=None if tested is None else tested[0],
        test_se=None if tested is None else tested[1],
        notes=state.notes,
        rows=data.counts,
        seed=seed,
        device=str(device),
        compiled=loop.runner.compiled,
        versions=versions(),
        settings={
            "learning_rate": loop.schedule.rate,
            "batch_size": data.identity.get("batch_size"),
            **vars(loop.limits),
        },
    )


def trainable(flow: Flow) -> list[nn.Parameter]:
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        count = sum(1 for _ in flow.parameters())
        held = f"all its {count} parameters are frozen (requires_grad is False)" if count else "it has no parameters"
        raise ValueError(f"fit: there is nothing to train in this flow: {held}")
    return parameters


def adam(learning_rate: float, parameters: list[nn.Parameter]) -> Optimizer:
    if not learning_rate > 0:
        raise ValueError(f"fit expects learning_rate > 0, got {learning_rate}")
    try:
        return Adam(parameters, lr=learning_rate, fused=True)
    except RuntimeError:  # a device without the fused kernel
        return Adam(parameters, lr=learning_rate)


def _limits(
    data: Data,
    epochs: int | None,
    steps: int | None,
    patience: int | None,
    clip: float | None,
    time_limit: float | None,
) -> Limits:
    """The budget, with the defaults that depend on how many steps an epoch has."""
    for name, value in (("epochs", epochs), ("steps", steps), ("patience", patience)):
        if value is not None:
            check_count("fit", name, value)
    for name, limit in (("clip", clip), ("time_limit", time_limit)):
        if limit is not None and not limit > 0:
            raise ValueError(f"fit expects {name} > 0 or None, got {limit}")
    of_epoch = data.batches.steps or 1
    if not (epochs or steps or time_limit):
        if data.endless:
            raise ValueError("fit: an iterator of batches may never end; pass steps= or time_limit=")
        epochs = max(_EPOCHS, math.ceil(_LEAST_STEPS / of_epoch)) if data.batches.steps else _EPOCHS
    if patience is not None and data.batches.steps:
        patience = max(patience, math.ceil(_PATIENT_STEPS / of_epoch))
    return Limits(epochs, steps, patience, clip, time_limit)


def _watchers(callbacks: Any, log_dir: Any, progress: Any, limits: Limits, data: Data) -> list[Watcher]:
    total = limits.steps
    if total is None and limits.epochs and data.batches.steps:
        total = limits.epochs * data.batches.steps
    return watchers(callbacks, log_dir, progress, total)


def _warn_if_slow(flow: Flow) -> None:
    """An IAF fits by inverting: its step took 2.8, 4.5 and 6.5 times a MAF's at 2, 8 and 32 features.

    (Architectures' defaults, batch 256, one CPU core, process time: about 1.9 + 0.9 log2 D.)
    """
    cost, d = flow.transform.forward_cost, flow.event_shape.numel()
    if cost == "parallel" or d == 1:
        return
    flow.warn_if_slow(
        "fit",
        cost,
        f"this flow scores data one feature after another: a step on {d} features costs about "
        f"{1.9 + 0.9 * math.log2(d):.0f} times a MAF's; to fit data use fp.maf or fp.nsf, and keep fp.iaf for sampling",
    )
