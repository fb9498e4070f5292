"""An nflows 0.14 flow as a flowpath flow, with flowpath's weights as linear functions of those of nflows.

Both libraries compute the same maps; four things differ in the numbers that drive them:

- nflows divides the width and height logits of a spline by sqrt(hidden_features);
- its slopes and scales are softplus(a) + m, ours softplus(a + c) + m with c such that a = 0 gives 1;
- its last layer emits the numbers feature by feature, ours number by number;
- the degrees of its MADE's hidden units go round (1, 2, ..., 1, 2, ...), ours ascend.

The weights stay attached to the nflows parameters, so that a gradient through our flow arrives there.
"""

from __future__ import annotations

import math

import torch
from nflows.flows.base import Flow as NflowsFlow
from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.permutations import Permutation as NflowsPermutation
from torch import Tensor, nn

import flowpath as fp

Weights = dict[str, Tensor]


def flow(theirs: NflowsFlow) -> tuple[fp.Flow, Weights]:
    """A flowpath flow and, name by name, the weights with which it is `theirs`."""
    parts = [_transform(t) for t in theirs._transform._transforms]
    features = theirs._distribution._shape[0]
    ours = fp.Flow(fp.Chain([t for t, _ in parts]), fp.StandardNormal(features))
    weights = {f"transform.transforms.{i}.{name}": w for i, (_, ws) in enumerate(parts) for name, w in ws.items()}
    return ours, weights


def _transform(theirs: nn.Module) -> tuple[fp.Transform, Weights]:
    if isinstance(theirs, NflowsPermutation):
        return fp.Permutation(theirs._permutation.tolist()), {}
    if isinstance(theirs, PiecewiseRationalQuadraticCouplingTransform):
        return _coupling(theirs)
    if isinstance(theirs, MaskedAffineAutoregressiveTransform):
        return _autoregressive(theirs)
    raise TypeError(f"expected a permutation, a spline coupling or an affine MAF layer, got {type(theirs).__name__}")


def _coupling(theirs: PiecewiseRationalQuadraticCouplingTransform) -> tuple[fp.Transform, Weights]:
    net, bins, moved = theirs.transform_net, theirs.num_bins, theirs.transform_features.tolist()
    element = fp.RationalQuadratic(
        bins,
        bound=theirs.tail_bound,
        min_width=theirs.min_bin_width,
        min_height=theirs.min_bin_height,
        min_slope=theirs.min_derivative,
    )
    ours = fp.ResidualMLP(
        theirs.num_identity_features,
        len(moved),
        num_params=element.num_params,
        hidden_features=net.hidden_features,
        blocks=len(net.blocks),
    )
    layers = {"initial": net.initial_layer}
    for i, block in enumerate(net.blocks):
        layers[f"first.{i}"], layers[f"second.{i}"] = block.linear_layers
    factor = torch.ones(element.num_params)
    factor[: 2 * bins] /= math.sqrt(net.hidden_features)
    shift = torch.zeros(element.num_params)
    shift[2 * bins :] = _unit(theirs.min_derivative)
    weights = {f"{name}.{k}": w for name, layer in layers.items() for k, w in layer.named_parameters()}
    weights |= _final(net.final_layer, len(moved), factor, shift)
    mask = [j in moved for j in range(theirs.features)]
    return fp.Coupling(mask, element, ours), _under("conditioner", weights)


def _autoregressive(theirs: MaskedAffineAutoregressiveTransform) -> tuple[fp.Transform, Weights]:
    made, d = theirs.autoregressive_net, theirs.features
    if made.use_residual_blocks:
        raise TypeError("flowpath's MaskedMLP has no residual blocks; build the MADE with use_residual_blocks=False")
    hidden = [made.initial_layer, *(block.linear for block in made.blocks)]
    element = fp.Affine(min_scale=theirs._epsilon)
    orders = [layer.degrees.argsort(stable=True) for layer in hidden]
    ours = fp.MaskedMLP(
        d,
        num_params=2,
        hidden_features=[len(order) for order in orders],
        degrees=[layer.degrees[order].tolist() for layer, order in zip(hidden, orders, strict=True)],
    )
    weights, columns = {}, torch.arange(d)
    for i, (layer, rows) in enumerate(zip(hidden, orders, strict=True)):
        weights[f"hidden.{i}.weight"] = layer.weight[rows][:, columns]
        weights[f"hidden.{i}.bias"] = layer.bias[rows]
        columns = rows
    final = _final(made.final_layer, d, torch.ones(2), torch.tensor([_unit(theirs._epsilon), 0.0]))
    final["final.weight"] = final["final.weight"][:, columns]
    return fp.MaskedAutoregressive(d, element, ours), _under("conditioner", weights | final)


def _final(layer: nn.Linear, features: int, factor: Tensor, shift: Tensor) -> Weights:
    """The last layer with its rows number by number, each number (P,) scaled by `factor` and lowered by `shift`."""
    weight = layer.weight.unflatten(0, (features, -1)).transpose(0, 1) * factor[:, None, None]
    bias = layer.bias.unflatten(0, (features, -1)).T * factor[:, None] - shift[:, None]
    return {"final.weight": weight.flatten(0, 1), "final.bias": bias.flatten()}


def _unit(floor: float) -> float:
    """c with softplus(c) + floor = 1."""
    return math.log(math.expm1(1.0 - floor))


def _under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": w for name, w in weights.items()}
