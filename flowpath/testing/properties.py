"""The properties every transform must have, each a function of (transform, x, context, tolerance)."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.distributions import biject_to
from torch.func import functional_call

from flowpath.transform import Direction, Transform

Property = Callable[[Transform, Tensor, "Tensor | None", float], None]
Map = tuple[Tensor, Tensor]  # value and ladj
_BATCHES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3), (0,), (2, 0))
_OTHER: dict[Direction, Direction] = {"forward": "inverse", "inverse": "forward"}
_EDGES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)  # where boxes tend to end


class PropertyError(AssertionError):
    """A transform lacks a property it should have; the message says which, where, and by how much."""


properties: dict[str, Property] = {}
"""What `check_transform` runs, by name: functions of (transform, x, context, tolerance) that raise PropertyError."""


def example(t: Transform, rows: int, *, seed: int = 0) -> Tensor:
    """Seeded data `(rows, *event)` in float64 from the transform's data support."""
    shape = torch.Size([3]) if t.data_shape is None else t.data_shape
    if t.data_support is None:
        return normal(rows, *shape, seed=seed)
    to_support = biject_to(t.data_support)
    return to_support(normal(rows, *to_support.inverse_shape(shape), seed=seed))


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Seeded standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise PropertyError(message)


def _close(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` relative to 1 + |want|, infinities and all."""
    _need(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.detach(), want.detach().to(got.dtype)
    error = torch.where(got == want, 0.0, (got - want).abs() / (1.0 + want.abs()))
    worst = float(error.nan_to_num(torch.inf).max()) if error.numel() else 0.0
    _need(worst <= tolerance, f"{what}: off by {worst:.2g}, tolerance {tolerance:.2g}")


def _same(where: str, got: Map, want: Map, tolerance: float) -> None:
    _close(f"{where}, value", got[0], want[0], tolerance)
    _close(f"{where}, ladj", got[1], want[1], tolerance)


def _call(t: Transform, direction: Direction, v: Tensor, c: Tensor | None) -> Map:
    return t(v, c) if direction == "forward" else t.inverse(v, c)


def _rows(v: Tensor, batch: Sequence[int]) -> Tensor:
    """Rows of v as a batch of that shape, repeated where there are too few."""
    return v[torch.arange(torch.Size(batch).numel()) % len(v)].reshape(*batch, *v.shape[1:])


def _both_ways(check: Callable[[Transform, Direction, Tensor, Tensor | None, float], None]) -> Property:
    """A check of one direction as a property: run on data forward, and on their noise inverse."""

    @functools.wraps(check)
    def both(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
        check(t, "forward", x, context, tolerance)
        check(t, "inverse", t(x, context)[0].detach(), context, tolerance)

    properties[check.__name__] = both
    return both


@_both_ways
def shapes(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """Any batch shape goes through, none and an empty one too, and ladj has it; the input stays as it was."""
    event = _call(t, direction, v, c)[0].shape[1:]
    for batch in _BATCHES:
        given, where = _rows(v, batch), f"{direction} of batch {batch}"
        before = given.clone()
        found = [tuple(o.shape) for o in _call(t, direction, given, None if c is None else _rows(c, batch))]
        _need(found == [(*batch, *event), batch], f"{where}: value and ladj have shapes {found}")
        _need(torch.equal(before, given), f"{where}: the input was changed in place")


@_both_ways
def round_trip(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """x -> z -> x and z -> x -> z return where they came from, and the two ladj cancel."""
    start = v if direction == "forward" else v.flip(0)  # paired with other contexts, z is a new point
    middle, ladj = _call(t, direction, start, c)
    _same(f"{direction} and back", _call(t, _OTHER[direction], middle, c), (start, -ladj), tolerance)


@_both_ways
def ladj_is_slogdet(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """ladj is log |det| of the autodiff Jacobian, both ways."""
    for i in range(min(3, len(v))):
        given = v[i], None if c is None else c[i]
        got = _call(t, direction, *given)[1]
        _close(f"{direction}, row {i}", got, _log_volume(t, direction, *given), tolerance)


def _log_volume(t: Transform, direction: Direction, v: Tensor, c: Tensor | None) -> Tensor:
    """log |det dS/dv|; a simplex counts by all its coordinates but the last, as torch's transforms do."""
    out = _call(t, direction, v, c)[0].detach()
    if out.numel() < v.numel():
        return -_log_volume(t, _OTHER[direction], out, c)
    jacobian = torch.autograd.functional.jacobian(lambda v: _call(t, direction, v, c)[0], v)
    return torch.linalg.slogdet(jacobian.reshape(out.numel(), v.numel())[: v.numel()]).logabsdet


@_both_ways
def batch_is_loop(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """A batch gives what its rows give one by one."""
    rows = [_call(t, direction, v[i], None if c is None else c[i]) for i in range(len(v))]
    values, ladjs = zip(*rows, strict=True)
    _same(direction, _call(t, direction, v, c), (torch.stack(values), torch.stack(ladjs)), tolerance)


@_both_ways
def bad_row_stays_alone(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """A row of NaN comes out as NaN, without an exception, and leaves the other rows as they are."""
    spoilt = torch.cat([torch.full_like(v[:1], torch.nan), v[1:]])
    (out, ladj), (want, want_ladj) = _call(t, direction, spoilt, c), _call(t, direction, v, c)
    _need(bool(out[0].isnan().all()), f"{direction}: NaN came out as {out[0].tolist()}")
    _same(f"{direction} beside a NaN row", (out[1:], ladj[1:]), (want[1:], want_ladj[1:]), tolerance)


@_both_ways
def finite_far_out(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """Value, ladj and every gradient are finite at box edges and up to |x| = 1e6, in float32 and float64.

    Of transforms between unbounded spaces; the ends of a bounded one map to infinity.
    """
    if t.data_support is None and t.noise_support is None:
        for dtype in (torch.float32, torch.float64):
            rows = _far_rows(v.shape[1:], dtype)
            finite(t.to(dtype), direction, rows, None if c is None else _rows(c.to(dtype), rows.shape[:1]))


def _far_rows(event: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Every feature, only the first, and only the last at, beside, beyond and far beyond likely edges."""
    edges, far = torch.tensor(_EDGES, dtype=dtype), torch.tensor([1e2, 1e4, 1e6], dtype=dtype)
    places = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), far])
    values = torch.cat([places, -places]).reshape(-1, *(1,) * len(event))
    every = torch.ones(1, *event, dtype=dtype)
    first, last = torch.zeros_like(every), torch.zeros_like(every)
    first[..., 0], last[..., -1] = 1.0, 1.0
    return torch.cat([values * every, values * first, values * last])


def finite(t: Transform, direction: Direction, v: Tensor, context: Tensor | None) -> None:
    """Value, ladj and their gradients in v, context and parameters are finite at these inputs."""
    leaves = [a.clone().requires_grad_() for a in (v, context) if a is not None]
    out, ladj = _call(t, direction, leaves[0], None if context is None else leaves[1])
    wanted = leaves + [p for p in t.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.sum() + ladj.sum(), wanted, allow_unused=True)
    for what, value in (("value", out), ("ladj", ladj), *((f"gradient {i}", g) for i, g in enumerate(grads))):
        if value is not None and not bool(value.isfinite().all()):
            bad = value.isfinite().logical_not().reshape(len(value), -1).any(1) if value.dim() else value
            rows = f" at {v[bad][0].tolist()}" if len(bad) == len(v) else ""
            raise PropertyError(f"{direction}, {v.dtype}: {what} is not finite{rows}")


@_both_ways
def first_derivatives(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """Gradients in x, context and parameters are those of finite differences (gradcheck, its fast mode)."""
    run, inputs = _as_function(t, direction, v[:2], None if c is None else c[:2])
    _agrees(direction, gradcheck, run, inputs)


@_both_ways
def second_derivatives(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """So are gradients of gradients (gradgradcheck, its fast mode)."""
    run, inputs = _as_function(t, direction, v[:2], None if c is None else c[:2])
    back = [normal(*o.shape, seed=2).requires_grad_() for o in run(*inputs) if o.requires_grad]
    _agrees(direction, functools.partial(gradgradcheck, check_undefined_grad=False), run, inputs, back)


def _agrees(direction: str, check: Callable[..., bool], run: Callable[..., Map], *inputs: list[Tensor]) -> None:
    try:
        check(run, *inputs, fast_mode=True)
    except GradcheckError as error:
        inputs_are = "x, context (if any), and all parameters as one vector, are inputs 0, 1, ..."
        raise PropertyError(f"{direction} ({inputs_are}): {str(error)[:400]}") from None


class _Run(nn.Module):
    """One direction of a transform as a module's forward, which is what functional_call calls."""

    def __init__(self, t: Transform, direction: Direction) -> None:
        super().__init__()
        self.t, self.direction = t, direction

    def forward(self, v: Tensor, context: Tensor | None = None) -> Map:
        return _call(self.t, self.direction, v, context)


def _as_function(
    t: Transform, direction: Direction, v: Tensor, context: Tensor | None
) -> tuple[Callable[..., Map], list[Tensor]]:
    """A direction as a function of v, context (if any) and the parameters as one vector, and leaves to call it with."""
    module = _Run(t, direction)
    parameters = dict(module.named_parameters())
    given = [a for a in (v, context) if a is not None]
    flat = [nn.utils.parameters_to_vector(parameters.values())] if parameters else []

    def run(*leaves: Tensor) -> Any:
        pieces = leaves[-1].split([p.numel() for p in parameters.values()]) if parameters else ()
        values = {n: piece.view_as(p) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
        return functional_call(module, values, leaves[: len(given)])

    return run, [p.detach().clone().requires_grad_() for p in (*given, *flat)]


@_both_ways
def dtype_follows_module(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """float() and double() move it, before and after use, and float32 agrees with float64 roughly."""
    want = _call(t, direction, v, c)
    for dtype in (torch.float32, torch.float64):
        out, ladj = _call(t.to(dtype), direction, v.to(dtype), None if c is None else c.to(dtype))
        found = [out.dtype, ladj.dtype]
        _need(found == [dtype, dtype], f"{direction} of a {dtype} module gives {found}")
        _same(f"{direction} in {dtype}", (out.double(), ladj.double()), want, max(tolerance, 1e-2))


@_both_ways
def context_is_checked(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """A context that is missing, superfluous or of the wrong width is refused by name; one row broadcasts."""
    name, width = type(t).__name__, t.context
    if width is None:
        ignored = _call(t, direction, v, v.new_zeros(2))
        _same(f"{direction}, ignored context", ignored, _call(t, direction, v, None), 0.0)
    elif width == 0 or c is None:
        _refuses(t, direction, v, v.new_zeros(2), f"{name} takes no context")
    else:
        _refuses(t, direction, v, None, f"{name} expects a context with {width} features")
        _refuses(t, direction, v, v.new_zeros(width + 1), f"{name} expects a context with {width} features")
        spread = _call(t, direction, v[:2], c[0].expand(2, width))
        _same(f"{direction}, one context for all rows", _call(t, direction, v[:2], c[0]), spread, tolerance)


def _refuses(t: Transform, direction: Direction, v: Tensor, context: Tensor | None, words: str) -> None:
    said = "nothing"
    try:
        _call(t, direction, v, context)
    except ValueError as error:
        said = repr(str(error))
    _need(words in said, f"{direction}: expected a ValueError with the words {words!r}, got {said}")


@_both_ways
def survives_copying(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """deepcopy, pickle, and a state_dict loaded into a spoilt copy all give the same map, after use too."""
    want = _call(t, direction, v, c)
    copies = {"deepcopy": copy.deepcopy(t), "pickle": pickle.loads(pickle.dumps(t)), "state_dict": copy.deepcopy(t)}
    with torch.no_grad():
        for p in copies["state_dict"].parameters():
            p.add_(1.0)
    copies["state_dict"].load_state_dict(t.state_dict())
    for how, twin in copies.items():
        _same(f"{direction} of its {how}", _call(twin, direction, v, c), want, 0.0)


@_both_ways
def vmap_is_loop(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """torch.func.vmap over rows gives what the batch gives."""
    mapped = torch.func.vmap(_Run(t, direction))(*(a for a in (v, c) if a is not None))
    _same(direction, mapped, _call(t, direction, v, c), tolerance)


@_both_ways
def pulls_score(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """`pull_score` of what `record` left equals autograd through the other direction, whichever was recorded."""
    out, ladj, record = t.record(direction, v, c)
    _same(f"record {direction}", (out, ladj), _call(t, direction, v, c), tolerance)
    moved = out.detach().requires_grad_()
    start, back = _call(t, _OTHER[direction], moved, c)
    log_density = back.sum() - 0.5 * (start - 0.3).square().sum() + start.sin().sum()
    (want,) = torch.autograd.grad(log_density, moved)
    _close(f"score after {direction}", t.pull_score(record, 0.3 - v + v.cos()), want, tolerance)


@_both_ways
def is_identity(t: Transform, direction: Direction, v: Tensor, c: Tensor | None, tolerance: float) -> None:
    """It maps every point to itself."""
    _same(direction, _call(t, direction, v, c), (v, v.new_zeros(len(v))), tolerance)


del properties["is_identity"]  # not every transform is
