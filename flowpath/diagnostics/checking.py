"""`fp.check`: is the fit sound, and is it any good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowpath.diagnostics.quality import beside_baselines, calibration, two_sample
from flowpath.diagnostics.report import Part, Report
from flowpath.diagnostics.soundness import soundness
from flowpath.flow import Flow

_MOST, _FEW = 20_000, 200


def check(
    flow: Flow,
    x: Any,
    context: Any = None,
    weights: Any = None,
    *,
    rows: str = "held out",
    seed: int = 0,
) -> Report:
    """Whether a flow is sound, and whether it describes these rows.

    Sound: every density and draw is finite, scoring a draw gives the density it was drawn with, rows and draws come
    back from the noise they are mapped to, and rows lie inside the spline boxes. Good: its mean log density beside a
    full Gaussian's and a Gaussian mixture's (BIC-chosen, each fitted to the other half of the rows) with paired
    standard errors, a classifier two-sample test, the calibration of its credible levels. At most 20,000 rows, drawn by
    seed; torch's random state is not touched. With weights, what has no weighted form is skipped by name.

    Args:
        flow: a flow; its mode is left as found.
        x: rows `(N, *event)` that the fit did not see; an array or tensor, brought to the flow's dtype and device.
        context: `(N, C)` or None. weights: `(N,)` or None.
        rows: where the rows come from, for the verdict: "held out", "early-stopping", "training".
        seed: of all draws.

    Returns:
        Report: printable, with `to_dict()` and `to_html()`.

    Raises:
        ValueError: no rows, or rows that do not fit the flow.

    Example:
        >>> import torch, flowpath as fp
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> report = fp.check(fp.gaussian(2), x)
        >>> report.sound
        True
    """
    x, context, weights = (_tensor(flow, v) for v in (x, context, weights))
    if x is None or not len(x):
        raise ValueError("check expects rows to look at, got none")
    x, context, weights = _some(x, context, weights, seed)
    generator = torch.Generator(flow.base.like.device).manual_seed(seed)
    with _evaluating(flow), torch.no_grad():
        draws, log_draws = _draws(flow, len(x), context, generator)
        parts = soundness(flow, x, context, draws, log_draws)
        sound = all(p.grade != "fail" for p in parts)
        if sound and len(x) >= _FEW:
            parts += _quality(flow, x, context, weights, draws, seed)
    return Report(_verdict(parts, sound, len(x), rows), sound, tuple(parts), len(x))


def _quality(
    flow: Flow, x: Tensor, context: Tensor | None, weights: Tensor | None, draws: Tensor, seed: int
) -> list[Part]:
    log_q = flow.log_prob(x, context).cpu()
    x, draws = x.cpu(), draws.cpu()
    given, w = (None if t is None else t.cpu() for t in (context, weights))
    found = [two_sample(x, given, draws, w, seed)]
    if torch.isfinite(log_q).all():
        found.insert(0, beside_baselines(x, given, log_q, w, seed))
    return [*found, calibration(flow, x.to(flow.base.like.device), context, weights, seed)]


def _verdict(parts: list[Part], sound: bool, n: int, rows: str) -> str:
    where = "" if rows == "held out" else f" (on the {rows} rows, so better than the truth)"
    if not sound:
        failed = [p for p in parts if p.grade == "fail"]
        return f"not sound: {failed[0].name}: {failed[0].says}"
    if n < _FEW:
        return f"sound; whether it is any good cannot be told from n = {n}"
    doubts = [p.doubt or p.name for p in parts if p.grade == "warn"]
    if not doubts:
        return f"sound, and good as far as {n} rows can tell{where}"
    return f"sound, but {'; '.join(doubts)}{where}"


def _tensor(flow: Flow, value: Any) -> Tensor | None:
    if value is None:
        return None
    like = next(flow.parameters(), flow.base.like)
    return torch.as_tensor(value).to(like.device, like.dtype)


def _some(
    x: Tensor, context: Tensor | None, weights: Tensor | None, seed: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """At most 20,000 rows in a seeded random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_MOST].to(x.device)
    for name, t in (("context", context), ("weights", weights)):
        if t is not None and len(t) != len(x):
            raise ValueError(f"check expects {name} for each of the {len(x)} rows, got {len(t)}")
    return x[order], None if context is None else context[order], None if weights is None else weights[order]


def _draws(flow: Flow, n: int, context: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One draw a row, under the row's context."""
    return flow.rsample_and_log_prob(n if context is None else (), context, generator=generator)


@contextmanager
def _evaluating(flow: Flow) -> Iterator[None]:
    mode = flow.training
    flow.eval()
    try:
        yield
    finally:
        flow.train(mode)
