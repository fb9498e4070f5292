"""nflows' layers rebuilt from flowpath's parts, with flowpath's weights as functions of those of nflows.

Both libraries compute the same maps; these things differ in the numbers that drive them:

- nflows divides the width and height logits of a spline by sqrt(hidden_features);
- its slopes and scales are softplus(a) + m, ours softplus(a + c) + m with c such that a = 0 gives 1;
- its last layer emits the numbers feature by feature, ours number by number;
- the degrees of its MADE's hidden units go round (1, 2, ..., 1, 2, ...), ours ascend;
- it scales and then shifts where we centre and then divide.

The weights come beside the transform and stay attached to nflows' parameters: a gradient through a flow that runs on
them (`torch.func.functional_call`) arrives there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flowpath.interop.nflows_networks import (
    Converted,
    NoTwin,
    Numbers,
    Weights,
    autoregressive,
    coupling,
    exactly,
    spline_numbers,
    under,
    unit,
)
from flowpath.interop.nflows_parts import NflowsTransform
from flowpath.interop.nflows_twins import (
    SigmoidAffine,
)
from flowpath.transform import Chain, Inverse, Transform
from flowpath.transforms import (
    LU,
    ActNorm,
    Additive,
    Affine,
    Elementwise,
    Householder,
    Permutation,
    Whiten,
)

_TOLERANCE = 1e-8  # of the comparison that each rebuilt layer must pass, in float64


def convert(theirs: nn.Module, features: int | None, context: int) -> Converted:
    """A float64 nflows transform in flowpath's parts, layers without a counterpart wrapped, and its weights by name.

    Args:
        theirs: the transform; wrapped layers are those it is made of, not copies.
        features: width of its events, None where unknown.
        context: width of the context, 0 for none.
    """
    if isinstance(theirs, Transform):
        return theirs, {}
    kind = _kind(theirs)
    if kind == "InverseTransform":
        inner, weights = convert(theirs._transform, features, context)  # type: ignore[arg-type]
        return _in_mode(Inverse(inner), theirs), under("transform", weights)
    if kind in ("CompositeTransform", "CompositeCDFTransform"):
        chain, weights = _chain(list(theirs._transforms), features, context)  # type: ignore[arg-type]
        return _in_mode(chain, theirs), weights
    try:
        with torch.random.fork_rng(devices=[]):
            ours, weights = _RULES[kind](theirs, features, context)
        ours = ours.to(device=_device(theirs)).double().train(theirs.training)
        _load(ours, weights)
        _check_same(ours, theirs, context)
    except (KeyError, NoTwin):
        shape = None if features is None else (features,)
        return NflowsTransform(theirs, data_shape=shape, noise_shape=shape, context=context), {}
    return ours, weights


def _in_mode(ours: Transform, theirs: nn.Module) -> Transform:
    """A container in the mode of the original; its parts have theirs."""
    ours.training = theirs.training
    return ours


def _kind(t: Any) -> str:
    """The class of nflows, or of a library that carries a copy of it, whose forward and inverse these are; or ""."""
    kind: Any
    for kind in type(t).__mro__:
        place = kind.__module__.split(".")
        if "nflows" in place and "transforms" in place:
            same = type(t).forward is kind.forward and type(t).inverse is kind.inverse
            return kind.__name__ if same else ""
    return ""


def _chain(parts: Sequence[nn.Module], features: int | None, context: int) -> Converted:
    found = [convert(t, features, context) for t in parts if _kind(t) != "IdentityTransform"]
    if not found and features is not None:
        return Permutation(range(features)), {}
    if not found:
        raise ValueError("from_nflows: a CompositeTransform that does nothing; pass features=")
    weights = {f"transforms.{i}.{name}": w for i, (_, ws) in enumerate(found) for name, w in ws.items()}
    return Chain([t for t, _ in found]), weights


def _load(ours: nn.Module, weights: Weights) -> None:
    left = ours.load_state_dict({k: w.detach() for k, w in weights.items()}, strict=False)
    if left.unexpected_keys:
        raise NoTwin
    for name, p in ours.named_parameters():
        if name in weights:
            p.requires_grad_(weights[name].requires_grad)


@torch.no_grad()
def _check_same(ours: Transform, theirs: nn.Module, context: int) -> None:
    """The rebuilt layer does to a few rows what the original does, or it is not used: versions of nflows differ."""
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros((), dtype=torch.float64, device=_device(theirs))
    x = 1.5 * torch.randn(8, *(ours.data_shape or ()), generator=generator, dtype=torch.float64).to(like)
    c = torch.randn(8, context, generator=generator, dtype=torch.float64).to(like) if context else None
    given = c if ours.context else None
    ours, theirs = copy.deepcopy(ours).eval(), copy.deepcopy(theirs).eval()
    for a, b in zip(ours(x, given), theirs(x, given), strict=True):
        if a.shape != b.shape or not bool(((a - b).abs() <= _TOLERANCE * (1.0 + b.abs())).all()):
            raise NoTwin


def _device(t: nn.Module) -> torch.device:
    return next((v.device for v in (*t.parameters(), *t.buffers())), torch.device("cpu"))


# Layers with a network.


def _with_kept(theirs: Any, context: int, numbers: Numbers) -> Converted:
    more = theirs.unconditional_transform
    return coupling(theirs, context, numbers, None if more is None else convert(more, theirs.num_identity_features, 0))


def _spline_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _with_kept(theirs, context, spline_numbers(theirs, theirs.num_bins, theirs.transform_net))


def _affine_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _with_kept(theirs, context, Numbers(SigmoidAffine(), torch.ones(2), torch.zeros(2), False, True))


def _additive_coupling(theirs: Any, features: int | None, context: int) -> Converted:
    return _with_kept(theirs, context, Numbers(Additive(), torch.ones(1), torch.zeros(1), False))


def _affine_autoregressive(theirs: Any, features: int | None, context: int) -> Converted:
    floor = float(theirs._epsilon)
    numbers = Numbers(Affine(min_scale=floor), torch.ones(2), exactly([unit(floor), 0.0]))
    return autoregressive(theirs.autoregressive_net, numbers)


def _spline_autoregressive(theirs: Any, features: int | None, context: int) -> Converted:
    return autoregressive(theirs.autoregressive_net, spline_numbers(theirs, theirs.num_bins, theirs.autoregressive_net))


# Layers without a network.


def _lu(theirs: Any, features: int | None, context: int) -> Converted:
    lower, upper = theirs._create_lower_upper()
    s = theirs.upper_diag
    raw = s + torch.log(-torch.expm1(-s))  # softplus(raw) = s
    weights = {"lower": lower.tril(-1), "upper": upper.triu(1), "diagonal": raw, "bias": theirs.bias}
    return LU(theirs.features), weights


def _householder(theirs: Any, features: int | None, context: int) -> Converted:
    if theirs.num_transforms % 2:
        raise NoTwin
    return Householder(theirs.features, theirs.num_transforms), {"vectors": theirs.q_vectors}


def _permutation(theirs: Any, features: int | None, context: int) -> Converted:
    if theirs._dim != 1:
        raise NoTwin
    return Permutation(theirs._permutation.tolist()), {}


def _act_norm(theirs: Any, features: int | None, context: int) -> Converted:
    weights = {
        "loc": -theirs.shift * (-theirs.log_scale).exp(),
        "log_scale": -theirs.log_scale,
        "is_set": theirs.initialized,
    }
    return ActNorm(len(theirs.shift)), weights


def _pointwise(theirs: Any, features: int | None, context: int) -> Converted:
    shift, scale = theirs._shift.double(), theirs._scale.double()
    width = features or max(shift.numel(), scale.numel())
    if max(shift.dim(), scale.dim()) > 1 or (features is None and width == 1):
        raise NoTwin
    one = torch.ones(width, dtype=torch.float64, device=scale.device)
    return Whiten(width), {"loc": -shift / scale * one, "scale": one / scale, "is_set": torch.tensor(True)}


def _spline_cdf(theirs: Any, features: int | None, context: int) -> Converted:
    raw = [theirs.unnormalized_widths, theirs.unnormalized_heights, theirs.unnormalized_derivatives]
    if raw[0].dim() != 2:
        raise NoTwin
    numbers = spline_numbers(theirs, raw[0].shape[-1])
    params = torch.cat(raw, -1).T - numbers.shift.to(raw[0])[:, None]
    return Elementwise(raw[0].shape[0], numbers.element), {"params": params}


_RULES: dict[str, Callable[[Any, int | None, int], Converted]] = {
    "ActNorm": _act_norm,
    "AdditiveCouplingTransform": _additive_coupling,
    "AffineCouplingTransform": _affine_coupling,
    "AffineTransform": _pointwise,
    "HouseholderSequence": _householder,
    "LULinear": _lu,
    "MaskedAffineAutoregressiveTransform": _affine_autoregressive,
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": _spline_autoregressive,
    "Permutation": _permutation,
    "PiecewiseRationalQuadraticCDF": _spline_cdf,
    "PiecewiseRationalQuadraticCouplingTransform": _spline_coupling,
    "PointwiseAffineTransform": _pointwise,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
}
