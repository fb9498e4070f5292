"""Nothing is bought with accuracy: a flowpath flow with an nflows flow's weights gives its numbers.

`matched(kind, shape)` makes both; `worst_difference` compares log_prob, draws' log densities and the gradient in x, in
float64. The timed flows are made here too, so that both do the same arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import flowpath as fp
from experiments.bench.peers import LIBRARIES, Rival, Shape, rival_of

TOLERANCE = 1e-10


def matched(kind: str, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Rival, Rival]:
    """A flow of flowpath and the flow of nflows it has the weights of."""
    theirs = LIBRARIES["nflows"][kind](shape)
    theirs.module.to(dtype)
    if kind != "coupling":
        return rival_of(fp.from_nflows(theirs.module, native=True)), theirs
    ours = LIBRARIES["flowpath"][kind](shape)
    ours.module.to(dtype)
    for layer, other in zip(ours.module.transform.transforms, theirs.module._transform._transforms, strict=True):
        _copy(layer.conditioner, other.transform_net, layer.element)
    return ours, theirs


@torch.no_grad()
def _copy(ours: fp.MLP, theirs: nn.Module, element: fp.RationalQuadratic) -> None:
    """nflows divides the logits by the root of the width; its slopes are softplus(a) + m, ours softplus(a + c) + m."""
    linears = [layer for layer in theirs.net if isinstance(layer, nn.Linear)]
    for mine, other in zip((*ours.hidden, ours.final), linears, strict=True):
        mine.load_state_dict(other.state_dict())
    P, logits = element.num_params, 2 * element.bins
    factor, shift = (ours.final.weight.new_full((P, 1), v) for v in (1.0, 0.0))
    factor[:logits] /= math.sqrt(theirs.hidden_features)
    shift[logits:] = math.log(math.expm1(1.0 - element.box.min_slope))
    weight = linears[-1].weight.unflatten(0, (-1, P)).transpose(0, 1) * factor[..., None]
    bias = linears[-1].bias.unflatten(0, (-1, P)).T * factor - shift
    ours.final.weight.copy_(weight.flatten(0, 1))
    ours.final.bias.copy_(bias.flatten())


def worst_difference(kind: str, shape: Shape, rows: int = 64) -> float:
    """The largest difference between the two, in float64; relative for numbers above 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours, theirs = (r.module for r in matched(kind, shape, torch.float64))
    x = 2.0 * torch.randn(rows, shape.features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for flow in (ours, theirs):
        at = x.clone().requires_grad_()
        log_prob = flow.log_prob(at)
        (slope,) = torch.autograd.grad(log_prob.sum(), at)
        noise = flow.to_noise(x) if flow is ours else flow.transform_to_noise(x)
        back = flow.to_data(noise) if flow is ours else flow._transform.inverse(noise)[0]
        found.append((log_prob.detach(), slope, noise.detach(), back.detach()))
    return max(float(((a - b).abs() / b.abs().clamp_min(1.0)).max()) for a, b in zip(*found, strict=True))
