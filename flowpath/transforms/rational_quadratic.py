"""The rational-quadratic spline of N elements: the curve, its exact inverse, and its analytic derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowpath.eager import differentiates_by_hand, is_plain, keeps_operations
from flowpath.transforms.spline_box import Box, Constants, constants, sums

Pair = tuple[Tensor, Tensor]


class _Piece(NamedTuple):
    """Of each element: the knots `(2, N)` at the ends of its bin, width, height, and the place t = 1 - u in it."""

    ends: Tensor
    w: Tensor
    h: Tensor
    t: Tensor
    u: Tensor
    outside: Tensor


def rational_quadratic(x: Tensor, numbers: Tensor, box: Box, inverse: bool = False) -> tuple[Tensor, Tensor]:
    r"""Splines of N elements, each with K bins of its own; the identity outside the box.

    In a bin of width w and height h, with s = h / w, end slopes d0 and d1, t = (x - x0) / w and u = 1 - t,

    .. math:: y = y_0 + h \frac{t A_1}{D}, \quad \frac{dy}{dx} = \frac{s^2 q}{D^2}, \quad
              D = u A_0 + t A_1, \quad q = t A_0 + u A_1, \quad A_0 = d_1 t + s u, \quad A_1 = s t + d_0 u

    (eqs 4 and 5 of "Neural Spline Flows", Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032, in
    positive terms only). The inverse is exact; its log-derivative is minus the forward one at the very point
    it returns, rounding included, so that a sample and its density agree. First derivatives are analytic and
    keep of the K-wide tensors the fractions p alone; create_graph, torch.func and torch.compile differentiate
    the plain operations.

    Args:
        x: N elements of any shape; the y to go back from where `inverse`.
        numbers: `(box.rows, *shape of x)`: logits of the widths and heights above their floors, softmax(logits) =
            p; then the raw slopes, one a knot but for the ends: slope = min_slope + softplus(raw + c), c so
            that raw = 0 gives 1. Without `box.unit_ends` the first is that of both ends.
        box: where the spline acts, and its floors.
        inverse: the direction.

    Returns:
        The value and the ladj of the direction asked for, each of x's shape. NaN in x spoils its own element only.
    """
    if differentiates_by_hand():
        return _Spline.apply(x, numbers, box, inverse)[:2]
    y, ladj = _evaluate(*_flat(x, numbers), box, inverse)[0]
    return y.view(x.shape), ladj.view(x.shape)


def _flat(x: Tensor, numbers: Tensor) -> Pair:
    """x `(N,)` and numbers `(P, N)`."""
    n = x.numel()
    return x.reshape(n), numbers.reshape(numbers.shape[0], n)


def _evaluate(x: Tensor, numbers: Tensor, box: Box, inverse: bool) -> tuple[Pair, Tensor, Tensor, _Piece]:
    """(value, ladj), the fractions p `(2, K, N)`, the end slopes `(2, N)` and the piece."""
    K, c = box.bins, constants(box, x)
    p = torch.softmax(numbers[: 2 * K].view(2, K, -1), 1)
    knots, inner = _knots(p, box, c), x.clamp(box.low, box.high)  # clamped, so that gradients outside are finite
    ends = _bin(inner, knots[int(inverse)], c)
    d = _slopes(numbers, ends, box, c)
    values, piece = _curve(x, inner, knots, d, ends, inverse, c)
    return values, p, d, piece


def _curve(
    x: Tensor, inner: Tensor, knots: Tensor, d: Tensor, ends: Tensor, inverse: bool, c: Constants
) -> tuple[Pair, _Piece]:
    """The formulas, in the bins between the knots `ends` `(2, N)` with slopes d there."""
    corners = knots.gather(1, ends.expand(2, *ends.shape))
    (x0, x1, y0, y1), (d0, d1) = corners.view(4, -1).unbind(0), d.unbind(0)
    w, h = x1 - x0, y1 - y0
    s = h / w
    z = torch.lerp(x0, x1, _root(inner - y0, y1 - inner, d0, d1, s, c)) if inverse else inner
    t, u = (z - x0) / w, (x1 - z) / w
    A0, A1 = torch.addcmul(d1 * t, s, u), torch.addcmul(d0 * u, s, t)
    R = t * A1
    D, q = torch.addcmul(R, u, A0), torch.addcmul(u * A1, t, A0)
    y = z if inverse else torch.lerp(y0, y1, R / D)  # lerp meets both knots exactly
    f = s / D
    ladj = torch.log(q * f * f)
    outside = (x - inner).abs() > c.zero  # false for NaN, which the spline passes on
    y = torch.where(outside, x, y)
    ladj = torch.where(outside, c.zero, -ladj if inverse else ladj)
    return (y, ladj), _Piece(ends, w, h, t, u, outside)


def _knots(p: Tensor, box: Box, c: Constants | None = None) -> Tensor:
    """The `(2, K + 1, N)` knots in x and y. Matmul is fastest on a CPU; tf32 or bf16 would spoil them."""
    if keeps_operations() and _matmul_is_exact(p):
        return torch.baddbmm(*((c and c.sums) or sums(box, p)), p)
    widths = torch.stack([p[i] * box.free[i] + box.floors[i] for i in (0, 1)])
    inner = box.low + widths[:, :-1].cumsum(1)
    low, high = (torch.full_like(inner[:, :1], end) for end in (box.low, box.high))
    return torch.cat((low, inner, high), 1)


def _matmul_is_exact(p: Tensor) -> bool:
    return (
        p.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.get_float32_matmul_precision() == "highest"
    )


def _bin(z: Tensor, knots: Tensor, c: Constants) -> Tensor:
    """`(2, N)`: the knots below and above z. The sum is over 0 and 1 as floats: bools are slow on a CPU."""
    over = (z - knots[1:-1]).detach()
    passed = over.ge_(c.zero) if is_plain(over) else (over >= 0.0).to(over.dtype)  # vmap knows no ge_
    return (passed.sum(0, keepdim=True) + c.ends).long()


def _slopes(numbers: Tensor, ends: Tensor, box: Box, c: Constants) -> Tensor:
    """The slopes at the knots `ends`, `(2, N)`."""
    K = box.bins
    if not box.unit_ends:
        raw = numbers[2 * K :].gather(0, ends % K)
        return F.softplus(raw + c.shift) + c.floor
    inner = ends.clamp(1, K - 1)  # the raw slope of knot j stands in row 2 K - 1 + j
    raw = numbers[2 * K - 1 :].gather(0, inner)
    return torch.where(inner == ends, F.softplus(raw + c.shift) + c.floor, c.one)


def _root(below: Tensor, above: Tensor, d0: Tensor, d1: Tensor, s: Tensor, c: Constants) -> Tensor:
    r"""t at the height `below` over the bin's lower knot, which is `above` under its upper one.

    The odds z = t / u solve :math:`e_1 z^2 + 2 b z - e_0 = 0` with :math:`2 b = d_0\,above - d_1\,below`,
    :math:`e_0 = s\,below`, :math:`e_1 = s\,above`. The discriminant :math:`b^2 + e_0 e_1` is a sum that never
    vanishes, and for either sign of b one form of the root has no cancellation. (The paper's 2c / (b + sqrt)
    loses all digits where its b < 0 and an end is steep beside s.)
    """
    b = c.half * torch.addcmul(d0 * above, d1, below, value=-1.0)
    e0, e1 = s * below, s * above
    sign = torch.copysign(torch.ones_like(b), b)  # b sign for |b|, whose derivative at b = 0 would be 0
    n = torch.addcmul(torch.sqrt(torch.addcmul(b * b, e0, e1)), b, sign)
    first = sign.clamp(min=0.0)  # 1 or 0: z = e0 / n or n / e1
    return torch.lerp(n, e0, first) / (n + torch.lerp(e1, e0, first))


class _Spline(torch.autograd.Function):
    """`_evaluate` with an analytic first derivative.

    p and d are outputs as well: kept for the backward pass they stay part of the graph, so that a second derivative
    finds its way through them, and the numbers themselves need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, box: Box, inverse: bool) -> tuple[Tensor, ...]:
        (y, ladj), p, d, piece = _evaluate(*_flat(x, numbers), box, inverse)
        ctx.box, ctx.inverse = box, inverse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, p, d, *piece)
        return y.view(x.shape), ladj.view(x.shape), p, d

    @staticmethod
    def backward(
        ctx: Any, gy: Tensor | None, gl: Tensor | None, more_p: Tensor | None, more_d: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, p, d, *piece = ctx.saved_tensors
        shape, x = x.shape, x.reshape(x.numel())
        gy, gl = (torch.zeros_like(x) if g is None else g.reshape(x.shape) for g in (gy, gl))
        gradients = _pulled if torch.is_grad_enabled() else _gradients  # create_graph
        c = constants(ctx.box, x)
        gx, gp, gd = gradients(gy, gl, x, p, d, _Piece(*piece), ctx.box, ctx.inverse, c)
        gp, gd = (g if more is None else g + more for g, more in ((gp, more_p), (gd, more_d)))
        g_numbers = _to_numbers(gp, gd, p, d, piece[0], ctx.box, c)
        return gx.view(shape), g_numbers.view(g_numbers.shape[0], *shape), None, None


def _pulled(
    gy: Tensor, gl: Tensor, x: Tensor, p: Tensor, d: Tensor, piece: _Piece, box: Box, inverse: bool, c: Constants
) -> tuple[Tensor, ...]:
    """What `_gradients` gives, from the plain operations, with a graph."""

    def run(x: Tensor, p: Tensor, d: Tensor) -> Pair:
        inner = x.clamp(box.low, box.high)
        return _curve(x, inner, _knots(p, box), d, piece.ends, inverse, constants(box, x))[0]

    return torch.func.vjp(run, x, p, d)[1]((gy, gl))


def _gradients(
    gy: Tensor, gl: Tensor, x: Tensor, p: Tensor, d: Tensor, piece: _Piece, box: Box, inverse: bool, k: Constants
) -> tuple[Tensor, ...]:
    """Gradients in x `(N,)`, p `(2, K, N)` and d `(2, N)` from those in the value and the ladj L, each `(N,)`.

    With v = R / D, R = t A1, U = u A0, subscripts for derivatives. The inverse is differentiated implicitly: it has
    the forward formulas for a = (gl L_t - gy w) / (h v_t) and c = -gl in place of gy and gl. Width j < k moves the bin
    k, width k is its size; in p the gradient is right but for a constant, as p sums to one.
    """
    (ends, w, h, t, u, outside), (d0, d1) = piece, d.unbind(0)
    a, c = torch.where(outside, k.zero, gy), torch.where(outside, k.zero, -gl if inverse else gl)
    s, sum_d, e0, e1 = h / w, d0 + d1, d0 * u, d1 * t
    A0, A1 = torch.addcmul(e1, s, u), torch.addcmul(e0, s, t)
    U, R, q = u * A0, t * A1, torch.addcmul(u * A1, t, A0)
    iD, c2 = (U + R).reciprocal(), c * k.two
    cD, cq, hD = c2 * iD, c2 / q, h * iD * iD
    c_L_t = torch.addcmul(cq * (A0 - A1), cD * torch.sub(sum_d, s, alpha=2.0), t - u)
    if inverse:
        g_x0 = a
        gx = torch.addcmul(c_L_t, a, w) / (hD * s * q)
        a = -gx
        aD = a * hD
    else:
        aD = a * hD
        gx = torch.addcmul(c_L_t, aD, s * q) / w
        g_x0 = -gx
    g_s = torch.addcmul(torch.addcmul(cq, cD, sum_d / s), aD, torch.addcmul(e1 * t, e0, u, value=-1.0)) * (t * u) / w
    g_d0 = u * torch.addcmul(t * torch.addcmul(cD, aD, U, value=-1.0), cq, u, value=-0.5)  # lowered, as g_d1
    g_d1 = t * torch.addcmul(u * torch.addcmul(cD, aD, R), cq, t, value=-0.5)
    g_w = torch.addcmul(g_x0 * t, g_s, s, value=-1.0)
    move, size = torch.stack((g_x0, a, g_w, torch.addcmul(g_s, a * iD, R))).mul_(k.free).view(2, 2, 1, -1)
    below = (ends[:1] - k.places).gt_(k.zero)
    g_p = (below * move).scatter_(1, ends[:1].expand(2, 1, -1), size)
    return torch.where(outside, gy, gx), g_p, torch.stack((g_d0, g_d1)).neg_()


def _to_numbers(gp: Tensor, gd: Tensor, p: Tensor, d: Tensor, ends: Tensor, box: Box, c: Constants) -> Tensor:
    """The gradient in the numbers from those in the fractions and the slopes, through softmax and softplus."""
    K, N = box.bins, p.shape[-1]
    gd = torch.addcmul(gd, gd, (c.floor - d).exp(), value=-1.0)
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gd):
        logits = p * (gp - (p * gp).sum(1, keepdim=True))
        knots = gd.new_zeros(K + 1, N).scatter(0, ends, gd)
        raw = knots[1:-1] if box.unit_ends else torch.cat((knots[:1] + knots[K:], knots[1:K]))
        return torch.cat((logits.view(2 * K, N), raw))
    first = 2 * K - int(box.unit_ends)  # an end knot's row is written over, or lies behind the last
    g = p.new_empty(first + K + 1, N)
    knots = g[first:].zero_().scatter_(0, ends, gd)
    if not box.unit_ends:
        knots[0] += knots[K]
    torch._softmax_backward_data(gp, p, 1, p.dtype, grad_input=g[: 2 * K].view(2, K, N))
    return g[: box.rows]
