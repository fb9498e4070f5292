"""Does a flow's sampler belong to its density, and are both finite: the checks that need no truth."""

from __future__ import annotations

import torch
from torch import Tensor

from flowpath.diagnostics.report import Part
from flowpath.flow import Flow, leaves
from flowpath.transform import Transform

_AGREE = {torch.float64: 1e-6, torch.float32: 0.05}  # nats by which two ways to one density may differ
_RARE = 1e-3  # share of rows beyond that which is still rounding in steep places


def soundness(flow: Flow, x: Tensor, context: Tensor | None, draws: Tensor, log_q: Tensor) -> list[Part]:
    """Parts that can make a flow unsound.

    Args:
        flow: in eval mode.
        x: rows `(N, *event)`, context `(N, C)` or None.
        draws: `(N, *event)` from one pass under the same contexts, with log_q `(N,)` from that very pass.
    """
    return [
        _finite(flow, x, context, draws, log_q),
        _densities_agree(flow, context, draws, log_q),
        _round_trip("round trip of the rows", flow, x, context),
        _round_trip("round trip of the flow's draws", flow, draws, context),
        _beyond_box(flow, x, context),
    ]


def _finite(flow: Flow, x: Tensor, context: Tensor | None, draws: Tensor, log_q: Tensor) -> Part:
    log_p = flow.log_prob(x, context)
    bad_rows = int((~torch.isfinite(log_p)).sum())
    bad_draws = int((~torch.isfinite(draws.flatten(1)).all(1) | ~torch.isfinite(log_q)).sum())
    says = f"{bad_rows} of {len(x)} rows have no finite density, {bad_draws} of {len(draws)} draws are not finite"
    says = says if bad_rows or bad_draws else f"the densities of all {len(x)} rows and {len(draws)} draws"
    grade = "fail" if bad_draws or torch.isnan(log_p).any() else "warn" if bad_rows else "pass"
    doubt = f"{bad_rows} rows have density zero"
    return Part("finite", grade, says, {"rows": bad_rows, "draws": bad_draws}, doubt)  # type: ignore[arg-type]


def _densities_agree(flow: Flow, context: Tensor | None, draws: Tensor, log_q: Tensor) -> Part:
    """log q as the sampler states it against log q as the density scores the same draw."""
    gap = (flow.log_prob(draws, context) - log_q).abs()
    limit = _AGREE.get(draws.dtype, 0.05)
    beyond = float((~(gap <= limit)).double().mean())
    worst = float(gap.nan_to_num(torch.inf).max())
    says = f"log q of a draw, from sampling and from scoring it: largest difference {worst:.2g} nats"
    if beyond > _RARE:
        says += f"; {beyond:.1%} of the draws differ by more than {limit:g}: sampler and density do not belong together"
    grade = "fail" if beyond > _RARE else "pass"
    return Part("sampler against density", grade, says, {"worst": worst, "share": beyond})  # type: ignore[arg-type]


def _round_trip(name: str, flow: Flow, x: Tensor, context: Tensor | None) -> Part:
    """x -> noise -> x, relative to the spread of each feature."""
    back = flow.to_data(flow.to_noise(x, context), context)
    size = x.std(0).clamp_min(torch.finfo(x.dtype).tiny) + 1e-6 * x.abs().amax(0)
    error = ((back - x).abs() / size).flatten(1).amax(1)
    beyond = float((~(error <= 0.01)).double().mean())
    worst = float(error.nan_to_num(torch.inf).max())
    says = f"largest error {worst:.2g} of a feature's spread"
    if beyond > _RARE:
        says += f"; {beyond:.1%} do not come back to within a hundredth"
    return Part(name, "fail" if beyond > _RARE else "pass", says, {"worst": worst, "share": beyond})


def _beyond_box(flow: Flow, x: Tensor, context: Tensor | None) -> Part:
    """The largest share of rows that a spline layer sees outside its box, where it is the identity."""
    name, share, value = "", 0.0, x
    for (label, layer), step in zip(leaves("transform", flow.transform), flow.trace(x, context), strict=True):
        box = _box(layer)
        if box is not None:
            outside = float(((value < box[0]) | (value > box[1])).any(-1).double().mean())
            name, share = (label, outside) if outside > share else (name, share)
        value = step.value
    says = f"{share:.1%} of the rows lie outside the spline box" + (f" of {name}" if name else "")
    if share > 0.05:
        says += ", where a spline cannot bend: raise bound, or whiten"
    doubt = f"{share:.0%} of the rows lie beyond a spline's box"
    return Part("spline box", "warn" if share > 0.05 else "pass", says, {"share": share}, doubt)


def _box(layer: Transform) -> tuple[float, float] | None:
    box = getattr(getattr(layer, "element", None), "box", None)
    return None if box is None or not box.unit_ends else (box.low, box.high)
