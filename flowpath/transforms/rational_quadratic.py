"""The rational-quadratic spline of N elements: the curve, its exact inverse, and its analytic derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


@dataclass(frozen=True)
class Box:
    """The square [low, high]^2 that K = `bins` bins fill, and the least they may be.

    `min_width` and `min_height` are shares of the side. `unit_ends` fixes the slopes of the two end knots at
    1, as identity tails need.
    """

    bins: int
    low: float
    high: float
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_slope: float = 1e-3
    unit_ends: bool = True

    @property
    def floors(self) -> tuple[float, float]:
        """The least width and height."""
        side = self.high - self.low
        return side * self.min_width, side * self.min_height

    @property
    def free(self) -> tuple[float, float]:
        """What the bins share above their floors, in x and in y."""
        side = self.high - self.low
        return side * (1.0 - self.bins * self.min_width), side * (1.0 - self.bins * self.min_height)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """b `(2, K + 1, 1)` and A `(2, K + 1, K)`: b + A p are the knots of fractions p, end ones pinned."""
        j = np.arange(self.bins + 1.0)[:, None]
        floors, free = np.reshape(self.floors, (2, 1, 1)), np.reshape(self.free, (2, 1, 1))
        base = np.where(j < self.bins, self.low + j * floors, self.high)
        return base, ((j > j[:-1].T) & (j < self.bins)) * free


Pair = tuple[Tensor, Tensor]


class _Piece(NamedTuple):
    """The bin k of each element, its (width, height) and end slopes, and the place t = 1 - u in it."""

    k: Tensor
    sides: Tensor
    slopes: Tensor
    t: Tensor
    u: Tensor
    outside: Tensor


def rational_quadratic(
    x: Tensor, p: Tensor, raw_slopes: Tensor, box: Box, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Splines of N elements, each with K bins of its own; the identity outside the box.

    In a bin of width w and height h, with s = h / w, end slopes d0 and d1, t = (x - x0) / w and u = 1 - t,

    .. math:: y = y_0 + h \frac{t A_1}{D}, \quad \frac{dy}{dx} = \frac{s^2 q}{D^2}, \quad
              D = u A_0 + t A_1, \quad q = t A_0 + u A_1, \quad A_0 = d_1 t + s u, \quad A_1 = s t + d_0 u

    (eqs 4 and 5 of "Neural Spline Flows", Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032, in
    positive terms only). The inverse is exact; its log-derivative is minus the forward one at the very point
    it returns, rounding included, so that a sample and its density agree. First derivatives are analytic and
    keep no K-wide tensors but p and the slopes; create_graph, torch.func and torch.compile differentiate the
    plain operations.

    Args:
        x: `(N,)`; the y to go back from where `inverse`.
        p: `(2, K, N)`: widths and heights above their floors, as fractions that sum to one.
        raw_slopes: `(K + 1, N)`, one a knot: slope = min_slope + softplus(raw + c), c so that raw = 0 gives
            1. With `box.unit_ends` the first and last row do not count.
        box: where the spline acts, and its floors.
        inverse: the direction.

    Returns:
        The value and the ladj of the direction asked for, each `(N,)`. NaN in x spoils its own element only.
    """
    if _no_backward():
        return _plain(x, p, raw_slopes, box, inverse)
    y, ladj, *_ = _Spline.apply(x, p, raw_slopes, box, inverse)
    return y, ladj


def _no_backward() -> bool:
    """Whether there is nothing to save for a backward pass, or torch differentiates the operations itself."""
    return (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # inside a dual level
    )


def _plain(x: Tensor, p: Tensor, raw_slopes: Tensor, box: Box, inverse: bool) -> tuple[Tensor, Tensor]:
    return _evaluate(x, p, raw_slopes, box, inverse)[:2]


def _evaluate(x: Tensor, p: Tensor, raw: Tensor, box: Box, inverse: bool) -> tuple[Tensor, Tensor, _Piece]:
    knots, inner = _knots(p, box), x.clamp(box.low, box.high)  # clamped, so that gradients outside are finite
    k = _bin(inner, knots[int(inverse)])
    ends = torch.cat((k, k + 1.0)).long()
    corners = knots.gather(1, ends.expand(2, *ends.shape))
    slopes = _slopes(raw.gather(0, ends), k, box)
    sides = corners[:, 1] - corners[:, 0]
    (x0, x1), (y0, y1), (w, h), (d0, d1) = corners[0], corners[1], sides, slopes
    s = h / w
    z = torch.lerp(x0, x1, _root(inner - y0, y1 - inner, d0, d1, s)) if inverse else inner
    t, u = (z - x0) / w, (x1 - z) / w
    _, A1, D, q = _terms(t, u, d0, d1, s)
    y = z if inverse else torch.lerp(y0, y1, t * A1 / D)  # lerp meets both knots exactly
    f = s / D
    ladj = torch.log(q * f * f)
    outside = (x - inner).abs() > 0.0  # false for NaN, which the spline passes on
    y = torch.where(outside, x, y)
    ladj = torch.where(outside, 0.0, -ladj if inverse else ladj)
    return y, ladj, _Piece(k, sides, slopes, t, u, outside)


def _knots(p: Tensor, box: Box) -> Tensor:
    """The `(2, K + 1, N)` knots in x and y. Matmul is fastest on a CPU; tf32 or bf16 would spoil them."""
    if not torch.compiler.is_compiling() and _matmul_is_exact(p):
        base, matrix = box.sums
        return torch.baddbmm(torch.from_numpy(base).to(p), torch.from_numpy(matrix).to(p), p)
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


def _bin(z: Tensor, knots: Tensor) -> Tensor:
    """`(1, N)`: how many inner knots lie at or below z. Floats, as bools are slow on CPU; sign(NaN) is 0."""
    return (z.detach() - knots[1:-1].detach()).sign_().add_(1.0).clamp(max=1.0).sum(0, keepdim=True)


def _slopes(raw: Tensor, k: Tensor, box: Box) -> Tensor:
    """The slopes at both ends of bin k from their raw numbers, `(2, N)`."""
    d = F.softplus(raw + math.log(math.expm1(1.0 - box.min_slope))) + box.min_slope
    if not box.unit_ends:
        return d
    free = torch.cat((k, box.bins - 1.0 - k)).clamp(max=1.0)  # 0 at an end knot, else 1
    return torch.lerp(d.new_ones(()), d, free)


def _terms(t: Tensor, u: Tensor, d0: Tensor, d1: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A0, A1, D and q of the formulas above."""
    A0, A1 = torch.addcmul(d1 * t, s, u), torch.addcmul(d0 * u, s, t)
    return A0, A1, torch.addcmul(u * A0, t, A1), torch.addcmul(t * A0, u, A1)


def _root(below: Tensor, above: Tensor, d0: Tensor, d1: Tensor, s: Tensor) -> Tensor:
    r"""t at the height `below` over the bin's lower knot, which is `above` under its upper one.

    The odds z = t / u solve :math:`e_1 z^2 + 2 b z - e_0 = 0` with :math:`2 b = d_0\,above - d_1\,below`,
    :math:`e_0 = s\,below`, :math:`e_1 = s\,above`. The discriminant :math:`b^2 + e_0 e_1` is a sum that never
    vanishes, and for either sign of b one form of the root has no cancellation. (The paper's 2c / (b + sqrt)
    loses all digits where its b < 0 and an end is steep beside s.)
    """
    b = 0.5 * torch.addcmul(d0 * above, d1, below, value=-1.0)
    e0, e1 = s * below, s * above
    sign = torch.copysign(torch.ones_like(b), b)  # b sign for |b|, whose derivative at b = 0 would be 0
    n = torch.addcmul(torch.sqrt(torch.addcmul(b * b, e0, e1)), b, sign)
    first = 0.5 + 0.5 * sign  # 1 or 0: z = e0 / n or n / e1
    return torch.lerp(n, e0, first) / (n + torch.lerp(e1, e0, first))


class _Spline(torch.autograd.Function):
    """`_evaluate` with an analytic first derivative that keeps p, the raw slopes and the `_Piece`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: Tensor, raw_slopes: Tensor, box: Box, inverse: bool) -> tuple[Tensor, ...]:
        y, ladj, piece = _evaluate(x, p, raw_slopes, box, inverse)
        return y, ladj, *piece

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, p, raw_slopes, ctx.box, ctx.inverse = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, p, raw_slopes, *output[2:])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, gl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, p, raw_slopes, *piece = ctx.saved_tensors
        gy = torch.zeros_like(x) if gy is None else gy
        gl = torch.zeros_like(x) if gl is None else gl
        if torch.is_grad_enabled():  # create_graph
            pull = torch.func.vjp(partial(_plain, box=ctx.box, inverse=ctx.inverse), x, p, raw_slopes)[1]
            return *pull((gy, gl)), None, None
        return *_gradients(gy, gl, _Piece(*piece), ctx.box, ctx.inverse), None, None


def _gradients(gy: Tensor, gl: Tensor, piece: _Piece, box: Box, inverse: bool) -> tuple[Tensor, ...]:
    """Gradients in x, p and the raw slopes from those in the value and the ladj L, each `(N,)`.

    With v = (y - y0) / h, subscripts for derivatives. The inverse is differentiated implicitly: it has the
    forward formulas for a = (gl L_t - gy w) / (h v_t) and c = -gl in place of gy and gl.
    """
    (w, h), (d0, d1), t, u, outside = piece[1:]
    a, c = torch.where(outside, 0.0, gy), torch.where(outside, 0.0, gl)
    s, sum_d = h / w, d0 + d1
    A0, A1, D, q = _terms(t, u, d0, d1, s)
    iD, iq, tu = D.reciprocal(), q.reciprocal(), t * u
    lift = h * iD * iD
    hv_t = lift * s * q
    half_L_t = (A0 - A1) * iq - torch.sub(sum_d, s, alpha=2.0) * (u - t) * iD
    if inverse:
        g_t = -a * w
        a, c = torch.addcmul(g_t, c, half_L_t, value=2.0) / hv_t, -c
        gx = -a
    else:
        g_t = torch.addcmul(a * hv_t, c, half_L_t, value=2.0)
        gx = g_t / w
    lift, cD, cq = a * lift * tu, 2.0 * c * iD, c * iq
    g_s = torch.addcmul(lift * (d1 * t * t - d0 * u * u), tu, torch.addcmul(2.0 * cq, cD, sum_d / s))
    g_d0 = u * torch.addcmul(torch.addcmul(lift * A0, u, cq), t, cD, value=-1.0)
    g_d1 = t * torch.addcmul(torch.addcmul(t * cq, lift, A1, value=-1.0), u, cD, value=-1.0)
    g_w = torch.addcmul(g_t * t, g_s, s) / -w
    g_h = torch.addcmul(g_s / w, a * iD, t * A1)
    g_p, g_raw = _spread((g_t / -w, a), (g_w, g_h), (g_d0, g_d1), piece, box)
    return torch.where(outside, gy, gx), g_p, g_raw


def _spread(move: Pair, size: Pair, slopes: Pair, piece: _Piece, box: Box) -> Pair:
    """Gradients in p and the raw slopes from those in the place, size and end slopes of the bin k.

    Width j < k moves the bin, width k is its size. In p they are right but for a constant, as p sums to one.
    """
    (fw, fh), ends = box.free, torch.cat((piece.k, piece.k + 1.0)).long()
    g_move, g_size = torch.stack((move[0] * fw, move[1] * fh)), torch.stack((size[0] * fw, size[1] * fh))
    j = torch.arange(box.bins, dtype=piece.t.dtype, device=piece.t.device).unsqueeze(1)
    g_p = (piece.k - j).clamp(0.0, 1.0) * g_move.unsqueeze(1)
    g_p = g_p.scatter_(1, ends[:1].expand(2, 1, -1), g_size.unsqueeze(1))
    g_d = torch.stack(slopes)
    g_d = torch.addcmul(g_d, g_d, (box.min_slope - piece.slopes).exp_(), value=-1.0)  # through softplus
    return g_p, g_d.new_zeros(box.bins + 1, g_d.shape[1]).scatter_(0, ends, g_d)
