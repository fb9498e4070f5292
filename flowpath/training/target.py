"""Fitting a flow to an unnormalised density: the loop of `fit`, over the flow's own draws."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flowpath import architectures
from flowpath.checks import check_count
from flowpath.diagnostics import ess, log_evidence, psis
from flowpath.estimators import Estimator
from flowpath.flow import Flow
from flowpath.objectives import LogDensity
from flowpath.scope import devices, lent, processes, random, versions
from flowpath.training.batches import Batch
from flowpath.training.checkpoint import Checkpoint, Resumed
from flowpath.training.compiling import CompileMode, Runner
from flowpath.training.fitting import adam, trainable
from flowpath.training.loop import Limits, Loop, State, warn_of
from flowpath.training.progress import watchers
from flowpath.training.schedules import Schedule, ScheduleName
from flowpath.training.scoring import Score
from flowpath.variational import ReverseKL

_SEED = 0x5EED  # of the draws that score the epochs: the same each time, so that scores compare
_CHUNK = 4096


@dataclass
class TargetResult:
    """A flow fitted to an unnormalised density p, and how good it is, judged on fresh draws of it.

    Attributes:
        flow: in eval mode, with the best weights.
        elbo, elbo_se: E_q[log p - log q] in nats, a lower bound of log Z, and its standard error.
        ess: effective sample size of the importance weights p / q, as a share of the draws.
        khat: shape of their tail (PSIS); below 0.5 good, 0.5 to 0.7 usable, above 0.7 not to be trusted.
        log_evidence, log_evidence_se: log Z by importance sampling.
        nonfinite_share: share of draws whose log p is NaN or infinite.
        gradient_snr: |mean| / sqrt(trace of the covariance) of the last step's gradient estimator.
        score_weight: the weight of the score part that "auto" arrived at; None without it.
        history, best_epoch, stop_reason, steps, skipped, seconds, notes, draws, seed, device, versions: as they were.
    """

    flow: Flow = field(repr=False)
    elbo: float
    elbo_se: float
    ess: float
    khat: float
    log_evidence: float
    log_evidence_se: float
    nonfinite_share: float
    gradient_snr: float
    score_weight: float | None
    history: list[dict[str, float]] = field(repr=False)
    best_epoch: int
    stop_reason: str
    steps: int
    skipped: int
    seconds: float
    draws: int
    notes: list[str] = field(default_factory=list)
    seed: int | None = None
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)

    def verdict(self) -> str:
        """One line in plain words."""
        if self.nonfinite_share > 0:
            return f"log p is not finite at {self.nonfinite_share:.2%} of the flow's draws: give the flow p's support"
        if not self.khat < 0.7:
            return f"k-hat {self.khat:.2f}: importance weights are not to be trusted; train longer or use a larger flow"
        band = "good" if self.khat < 0.5 else "usable"
        return f"k-hat {self.khat:.2f}: importance weights are {band}, as far as the flow's own draws can tell"

    def summary(self) -> str:
        """The result in a few lines."""
        return "\n".join(
            [
                self.verdict(),
                f"ELBO {self.elbo:.3f} ± {self.elbo_se:.3f} nats, log Z {self.log_evidence:.3f} ± "
                f"{self.log_evidence_se:.3f}, ESS {self.ess:.1%} of {self.draws} draws",
                f"{self.steps} steps in {self.seconds:.1f} s on {self.device}; ended: {self.stop_reason}; "
                f"gradient SNR {self.gradient_snr:.2g}"
                + ("" if self.score_weight is None else f", score weight {self.score_weight:.2f}"),
                *(f"  {note}" for note in self.notes),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All but flow and history, as JSON values."""
        held = {k: v for k, v in vars(self).items() if k not in ("flow", "history")}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in held.items()}


class _NoData:
    """What the loop asks of data, for an objective that draws its own: epochs of empty batches."""

    offset = 0.0

    def __init__(self, steps: int) -> None:
        self.steps: int | None = steps

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """`steps` calls without arguments."""
        del epoch
        return (() for _ in range(start, self.steps or 0))


def fit_target(
    flow: Flow | str,
    log_density: LogDensity,
    *,
    estimator: Estimator | None = None,
    objective: Callable[[Flow, LogDensity], nn.Module] | None = None,
    num_samples: int = 256,
    steps: int = 2000,
    learning_rate: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    schedule: ScheduleName | Callable[[Optimizer], LRScheduler] = "cosine",
    patience: int | None = None,
    clip: float | None = 100.0,
    time_limit: float | None = None,
    draws: int = 10_000,
    context: Tensor | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    compile: CompileMode = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    callbacks: Callable[[State], object] | Sequence[Callable[[State], object]] = (),
    progress: bool | Literal["auto"] = "auto",
    **options: Any,
) -> TargetResult:
    r"""Fit a flow q to a density p known up to a constant, by default by the least :math:`KL(q \| p)`.

    Every twentieth of the steps the ELBO is estimated on the same noise, and the best weights are kept.

    Args:
        flow: a Flow, trained in place; or the name of an architecture, built with `options` (`features=` at least).
        log_density: unnormalised log p, `(n, *batch, *event)` to `(n, *batch)`.
        estimator: of the gradient; `Pathwise("auto")` by default.
        objective: (flow, log_density) -> module in place of `ReverseKL`: `partial(fp.IWBound, num_samples=8)`.
        num_samples: draws a step.
        steps, learning_rate, optimizer, schedule, clip, time_limit, seed, device, compile, checkpoint, resume, log_dir,
            callbacks, progress: as in `fit`.
        patience: evaluations without a better ELBO that end the fit, or None.
        draws: fresh draws the result is judged on, at least 100.
        context: `(*batch, C)` for a conditional flow.
        options: arguments of the architecture, with a name.

    Returns:
        TargetResult: the flow, ELBO, ESS, k-hat, log Z with errors, gradient SNR, history.

    Raises:
        ValueError, TypeError: settings out of range; a cost of the wrong shape; an estimator that does not suit;
            several processes (torchrun).

    Example:
        >>> import torch, flowpath as fp
        >>> def log_p(z):
        ...     return -0.5 * (z - 3).square().sum(-1)
        >>> result = fp.fit_target("gaussian", log_p, features=2, steps=300, learning_rate=0.05, seed=0)
        >>> abs(result.log_evidence - 1.838) < 0.05
        True
    """
    if processes() > 1:
        raise ValueError(
            f"fit_target: {processes()} processes were started (WORLD_SIZE), but it fits in one; start it without "
            "torchrun, and draw more samples a step with num_samples="
        )
    for name, value in (("num_samples", num_samples), ("steps", steps)):
        check_count("fit_target", name, value)
    check_count("fit_target", "draws", draws, least=100)
    resumed = None if resume is None else Resumed.read(resume)
    home, away = devices(flow, device)
    with random(seed, resumed is not None, away):
        flow = _built(flow, options)
        with lent(flow, home, away):
            made = objective or partial(ReverseKL, estimator=estimator, num_samples=num_samples, context=context)
            goal = made(flow, log_density).to(away)
            opt = (optimizer or partial(adam, learning_rate))(trainable(flow) + _own(log_density))
            limits = Limits(steps=steps, patience=patience, clip=clip, time_limit=time_limit)
            identity = {"order_seed": 0, "objective": type(goal).__name__, "num_samples": num_samples}
            loop = Loop(
                Runner(goal, compile, away, joint=False),
                _NoData(max(1, steps // 20)),
                partial(_score, flow, log_density, context),
                goal,
                opt,
                Schedule(schedule, opt, patience),
                limits,
                watchers(callbacks, log_dir, progress, steps),
                lambda batch: "log p or its gradient is not finite at some of the flow's draws",
                None if checkpoint is None else Checkpoint(checkpoint, identity, resume),
                State(flow=flow),
            )
            if resumed is not None:
                resumed.weights_into(goal)
                resumed.check(identity)
                resumed.into(loop)
            loop.run()
            warn_of(loop.state)
            snr = _gradient_snr(goal, loop.parameters)
            flow.eval()
            judged = _judge(flow, log_density, context, draws)
    state, weight = loop.state, getattr(goal, "score_weight", None)
    return TargetResult(
        flow=flow,
        **judged,
        gradient_snr=snr,
        score_weight=float(weight) if weight is not None and getattr(goal, "auto", False) else None,
        history=state.history,
        best_epoch=state.best_epoch,
        stop_reason=str(state.stop_reason),
        steps=state.step,
        skipped=state.skipped,
        seconds=state.seconds,
        draws=draws,
        notes=state.notes,
        seed=seed,
        device=str(away),
        versions=versions(),
    )


def _built(flow: Flow | str, options: dict[str, Any]) -> Flow:
    if isinstance(flow, str):
        known = architectures.architectures
        if flow not in known:
            raise ValueError(f"fit_target: there is no architecture {flow!r}; there are {', '.join(sorted(known))}")
        if "features" not in options:
            raise ValueError(f'fit_target("{flow}", ...) expects features=, the width of z')
        return known[flow](**options)
    if options:
        raise TypeError(f"fit_target: {sorted(options)} belong to an architecture's name; this flow is built already")
    return flow


def _own(log_density: LogDensity) -> list[nn.Parameter]:
    """The target's own trainable parameters, where it is a module."""
    return [p for p in log_density.parameters() if p.requires_grad] if isinstance(log_density, nn.Module) else []


@torch.no_grad()
def _log_weights(
    flow: Flow, log_density: LogDensity, context: Tensor | None, draws: int, generator: torch.Generator | None = None
) -> Tensor:
    """log p - log q of fresh draws, `(draws, B)`, in float64; B contexts, 1 without."""
    found = []
    for start in range(0, draws, _CHUNK):
        z, log_q = flow.rsample_and_log_prob(min(_CHUNK, draws - start), context, generator=generator)
        found.append((log_density(z) - log_q).double())
    return torch.cat(found).reshape(draws, -1)


def _score(flow: Flow, log_density: LogDensity, context: Tensor | None) -> Score:
    """The ELBO on 2,048 draws from the same noise each time; -inf where some density is not finite."""
    generator = torch.Generator(flow.base.like.device).manual_seed(_SEED)
    training = flow.training
    log_w = _log_weights(flow.eval(), log_density, context, 2048, generator).mean(1)
    flow.train(training)
    if not torch.isfinite(log_w).all():
        return -math.inf, math.nan
    return float(log_w.mean()), float(log_w.std()) / math.sqrt(len(log_w))


def _judge(flow: Flow, log_density: LogDensity, context: Tensor | None, draws: int) -> dict[str, float]:
    """The result's numbers; with a batch of contexts, averages over it (the largest k-hat)."""
    log_w = _log_weights(flow, log_density, context, draws)
    finite = torch.isfinite(log_w)
    elbo = log_w.mean(1)
    weights = torch.where(torch.isnan(log_w) | torch.isposinf(log_w), -torch.inf, log_w)
    some = bool(torch.isfinite(weights).any(0).all())
    value, error = log_evidence(weights)
    return {
        "elbo": float(elbo.mean()),
        "elbo_se": float(elbo.std()) / math.sqrt(draws),
        "ess": float(ess(weights).mean()) if some else 0.0,
        "khat": max(psis(w)[1] for w in weights.unbind(1)) if some else math.inf,
        "log_evidence": float(value.mean()),
        "log_evidence_se": float(error.square().mean().sqrt()) / math.sqrt(log_w.shape[1]),
        "nonfinite_share": 1.0 - float(finite.double().mean()),
    }


def _gradient_snr(goal: nn.Module, parameters: list[Tensor], repeats: int = 16) -> float:
    """Signal-to-noise ratio of the estimator's gradient with the final weights."""
    rows = []
    for _ in range(repeats):
        grads = torch.autograd.grad(goal(), parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    g = torch.stack(rows)
    noise = float(g.var(0).sum())
    signal = max(float(g.mean(0).square().sum()) - noise / repeats, 0.0)  # less what noise adds to the mean's square
    return math.sqrt(signal / noise) if noise > 0 else math.inf
