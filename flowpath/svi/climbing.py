"""Training the flow of fit_posterior: reverse KL by path gradients, in rounds that grow until nothing is gained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flowpath.diagnostics import ess, log_evidence, psis
from flowpath.flow import Flow
from flowpath.objectives import LogDensity
from flowpath.svi.flows import widen
from flowpath.tracing import TracingError, trace
from flowpath.tracing.plain import cuda_indices
from flowpath.training.fitting import trainable

_ROUNDS = (400, 800, 800, 1600)  # steps of the first rounds; later ones repeat the last
# Up to ten latents; above, both shrink as the root of their number, since what they cost grows with it.
_WIDE = 0.3  # how much wider the noise of half the particles is, once the path gradient is on: what trains the tails
_WIDTHS = (0.01, 0.02, 0.03)  # likewise of the final noise: 1 % costs a thousandth of a nat and guards the tails
_LIGHT = 0.25  # k-hat on the way at which no wider noise is tried: it moves by 0.2 from one set of draws to another
_CHUNK = 1000
_CLIP = 20.0


@dataclass(frozen=True)
class Judgement:
    """A flow on fresh draws of its own.

    Attributes:
        elbo, elbo_se: E_q[log p - log q] and its standard error, nats.
        ess: effective sample size as a share of the draws.
        khat: shape of the tail of the importance weights.
        log_evidence, log_evidence_se: by importance sampling.
        nonfinite: share of draws whose log p is not finite.
        draws: how many.
    """

    elbo: float
    elbo_se: float
    ess: float
    khat: float
    log_evidence: float
    log_evidence_se: float
    nonfinite: float
    draws: int

    @property
    def gap(self) -> float:
        """log Z - ELBO as far as the draws can tell: KL(q || p)."""
        return self.log_evidence - self.elbo


@dataclass
class Progress:
    """Where a climb stands: handed to watchers after each round.

    Attributes:
        history: one dict a round: step, elbo, ess, khat, gap, seconds.
        step: gradient steps done.
        skipped: steps whose gradient was not finite.
        reason: why it ended.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    skipped: int = 0
    reason: str = ""


@torch.no_grad()
def weighted_draws(
    flow: Flow, log_density: LogDensity, draws: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws u `(draws, D)` and log p - log q there, in float64."""
    points, weights = [], []
    for start in range(0, draws, _CHUNK):
        u, log_q = flow.rsample_and_log_prob(min(_CHUNK, draws - start), generator=generator)
        points.append(u)
        weights.append(log_density(u).double() - log_q.double())
    return torch.cat(points), torch.cat(weights)


def judge(log_w: Tensor) -> Judgement:
    """What log weights `(n,)` say of the flow that they were drawn with."""
    finite = torch.isfinite(log_w)
    share = 1.0 - float(finite.double().mean())
    if int(finite.sum()) < 25:
        return Judgement(-math.inf, math.nan, 0.0, math.inf, math.nan, math.nan, share, len(log_w))
    elbo = log_w[finite] if share < 1e-3 else log_w  # a draw in a thousand off the support costs no ELBO of -inf
    usable = torch.where(finite, log_w, -torch.inf)
    value, error = log_evidence(usable)
    return Judgement(
        float(elbo.mean()),
        float(elbo.std()) / math.sqrt(len(elbo)),
        float(ess(usable)),
        psis(usable)[1],
        float(value),
        float(error),
        share,
        len(log_w),
    )


class Climb:
    """Gradient ascent of the ELBO in rounds.

    Each round anneals Adam's step size by a cosine. The gradient is path + c score (see `Pathwise`): c falls from 1 to
    0 over the first steps, in which the flow is still far off and often too narrow; from then on the path gradient,
    which vanishes where q = p, is taken at noise of which half is 1.3 times as wide, so that the tails learn too.

    Args:
        flow: a `posterior_flow`, trained in place.
        log_density: log p at u `(P, D)`.
        tolerance: gap log Z - ELBO, in nats, at which the climb ends.
        learning_rate: peak step size of the first round.
        particles: draws a step in the first three rounds; later ones take twice as many.
        max_steps, deadline: gradient steps and time (of `time.monotonic`) at which it ends, or None.
        whole: the log density of all the data, by which rounds are judged, where `log_density` takes minibatches. None
            where it cannot be had: then rounds have an ELBO and no more, and the last weights are kept.
    """

    def __init__(
        self,
        flow: Flow,
        log_density: LogDensity,
        *,
        tolerance: float,
        learning_rate: float,
        particles: int,
        max_steps: int | None,
        deadline: float | None,
        whole: LogDensity | None,
    ) -> None:
        self.flow, self.log_density, self.whole = flow, log_density, whole
        self.tolerance, self.learning_rate, self.particles = tolerance, learning_rate, particles
        self.max_steps, self.deadline = max_steps, deadline
        self.parameters = trainable(flow)
        self.progress = Progress()
        self._shrink = min(1.0, math.sqrt(10.0 / flow.event_shape.numel()))
        self._began = time.monotonic()
        self._best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
        self._calls: dict[int, Callable[[Tensor, Tensor], list[Tensor]]] = {}

    def run(self, watch: Callable[[Progress], object]) -> Progress:
        """Climb until an end is reached; Ctrl-C ends it too. The flow is left with the best weights of all rounds."""
        try:
            for number, steps in enumerate(self._rounds()):
                self._round(number, steps)
                watch(self.progress)
                if self._ended():
                    break
        except KeyboardInterrupt:
            self.progress.reason = "interrupted"
            self._assess()
        self._restore()
        return self.progress

    def _rounds(self) -> Iterator[int]:
        number = 0
        while True:
            steps = _ROUNDS[min(number, len(_ROUNDS) - 1)]
            yield steps if self.max_steps is None else min(steps, self.max_steps - self.progress.step)
            number += 1

    def _round(self, number: int, steps: int) -> None:
        particles = self.particles * (2 if number > 2 else 1)
        step = self._step(particles)
        peak = self.learning_rate * 0.7**number
        optimizer = torch.optim.Adam(self.parameters, lr=peak, fused=True)
        like = self.flow.base.like
        scale = torch.ones(particles, 1, dtype=like.dtype, device=like.device)
        scale[::2] = 1.0 + _WIDE * self._shrink
        share = torch.zeros((), dtype=like.dtype, device=like.device)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (i + 1) / 50) * _cosine(i / steps)
            score = max(0.0, 1.0 - i / (0.2 * steps)) if number == 0 else 0.0
            noise = torch.randn(particles, *self.flow.event_shape, dtype=like.dtype, device=like.device)
            grads = step(noise if score else noise * scale, share.fill_(score))
            self._update(optimizer, grads)
            self.progress.step += 1
            if self.deadline is not None and i % 10 == 9 and time.monotonic() > self.deadline:
                break
        self._assess()

    def _update(self, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        norm = nn.utils.clip_grad_norm_(self.parameters, _CLIP)
        if bool(torch.isfinite(norm)):
            optimizer.step()
        else:
            self.progress.skipped += 1

    def _step(self, particles: int) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """Gradients of the surrogate from noise `(P, D)` and c: traced to one graph where the model allows."""
        if particles in self._calls:
            return self._calls[particles]
        like = self.flow.base.like
        noise = torch.randn(particles, *self.flow.event_shape, dtype=like.dtype, device=like.device)
        share = torch.ones((), dtype=like.dtype, device=like.device)
        try:
            traced = trace(self._gradients, [noise, share], live=self.flow.state_dict(keep_vars=True).values())
            call = lambda noise, share: traced.run([noise, share])  # noqa: E731
            if not self._agrees(call, noise, share):
                call = self._gradients
        except TracingError:
            call = self._gradients
        self._calls[particles] = call
        return call

    def _agrees(self, call: Callable[[Tensor, Tensor], list[Tensor]], noise: Tensor, share: Tensor) -> bool:
        """Whether the graph gives the function's gradients at another noise than that it was traced at."""
        other = torch.randn_like(noise) * 0.5
        found = []
        for f in (call, self._gradients):
            with torch.random.fork_rng(cuda_indices([noise])):
                torch.manual_seed(0)
                found.append(f(other, share))
        tolerance = 1e-6 if noise.dtype == torch.float64 else 1e-2
        return all(
            torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()), equal_nan=True)
            for a, b in zip(*found, strict=True)
            if b.numel()
        )

    def _gradients(self, noise: Tensor, share: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            r = self.flow.record_draws((len(noise),), None, noise)
            score_q = self.flow.transform.pull_score(r.record, -noise)
            leaf = r.x.detach().requires_grad_()
            log_p = self.log_density(leaf)
            (score_p,) = torch.autograd.grad(log_p.sum(), leaf)
            path = (r.x * (score_q - score_p).detach()).sum(-1)
            total = r.log_base + r.ladj - (r.x * score_p.detach()).sum(-1)
            loss = (share * total + (1.0 - share) * path).mean()
            return list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))

    # -- rounds' ends

    def _assess(self) -> None:
        """Judge the flow as it is on the same noise each time, choose its width, keep the best."""
        width, judged = self._chosen()
        widen(self.flow, width)
        p = self.progress
        p.history.append(
            {
                "step": p.step,
                "elbo": judged.elbo,
                "ess": judged.ess,
                "khat": judged.khat,
                "gap": judged.gap,
                "width": width,
                "seconds": time.monotonic() - self._began,
            }
        )
        if self.whole is None or judged.elbo > self._best[0] or not self._best[1]:
            self._best = judged.elbo, {k: v.detach().clone() for k, v in self.flow.state_dict().items()}
        widen(self.flow, 1.0)

    def _chosen(self) -> tuple[float, Judgement]:
        found = []
        for extra in _WIDTHS:
            width = 1.0 + extra * self._shrink
            widen(self.flow, width)
            found.append((width, self._judged()))
            if self.whole is None or found[-1][1].khat < _LIGHT:
                break
        return found[0] if self.whole is None else _narrowest(found)

    def _judged(self) -> Judgement:
        generator = torch.Generator(self.flow.base.like.device).manual_seed(0x5EED)
        judged = judge(weighted_draws(self.flow, self.whole or self.log_density, 4 * _CHUNK, generator)[1])
        if self.whole is not None:
            return judged
        return replace(judged, ess=math.nan, khat=math.nan, log_evidence=math.nan, log_evidence_se=math.nan)

    def _restore(self) -> None:
        if self._best[1]:
            self.flow.load_state_dict(self._best[1])

    def _ended(self) -> bool:
        p = self.progress
        last = p.history[-1]
        if last["gap"] <= self.tolerance and last["khat"] < (0.25 if len(p.history) == 1 else 0.4):
            p.reason = "converged"
        elif len(p.history) > 3 and p.history[-2]["gap"] - last["gap"] < max(0.15 * last["gap"], 0.2 * self.tolerance):
            p.reason = "no further gain"
        elif self.max_steps is not None and p.step >= self.max_steps:
            p.reason = "max_steps"
        elif self.deadline is not None and time.monotonic() > self.deadline:
            p.reason = "time_limit"
        return bool(p.reason)


def _narrowest(found: list[tuple[float, Judgement]]) -> tuple[float, Judgement]:
    """The narrowest noise of tails that are heavy enough, or the best k-hat that 0.006 nats of the ELBO buy."""
    elbo = found[0][1].elbo
    paid = [f for f in found if f[1].elbo > elbo - 0.006]
    light = [f for f in paid if f[1].khat < _LIGHT]
    return light[0] if light else min(paid or found[:1], key=lambda f: f[1].khat)


def _cosine(share: float) -> float:
    """From 1 to 0.01."""
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share))
