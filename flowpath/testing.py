"""The properties every transform must have, each a function, and `check_transform`, which runs them on yours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import functional_call

from flowpath.transform import Direction, Transform

Property = Callable[[Transform, Tensor, "Tensor | None", float], None]
_BATCHES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3), (0,), (2, 0))
_EDGES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)  # where boxes tend to end


class PropertyError(AssertionError):
    """A transform lacks a property it should have; the message says which, where, and by how much."""


def check_transform(
    t: Transform,
    *,
    x: Tensor | None = None,
    context: Tensor | None = None,
    tolerance: float = 1e-8,
    identity: bool = False,
    skip: Collection[str] = (),
) -> None:
    """Check that a transform of your own keeps the contract of `flowpath.Transform`.

    Runs every entry of `flowpath.testing.properties` on a float64 copy in eval mode; neither your module nor any global
    state changes. Give the parameters rough values first: at an identity start most mistakes are invisible.

    Args:
        t: the transform.
        x: data to try, `(N, *event)`, N at least 3; by default 6 seeded normal rows, mapped into `t.data_support`.
        context: contexts to go with them, `(N, C)`; by default normal rows of width `t.context`.
        tolerance: largest error allowed, relative to 1 + |value|, where two ways to the same number are compared.
        identity: also check that the transform, as given, is the identity.
        skip: names of properties to leave out.

    Raises:
        PropertyError: a property fails; the message lists each with its numbers.
        ValueError: a name in `skip` that is no property.

    Example:
        >>> import torch, flowpath as fp
        >>> t = fp.LU(3)
        >>> _ = torch.nn.init.normal_(t.lower)
        >>> fp.testing.check_transform(t)
    """
    unknown = set(skip) - set(properties)
    if unknown:
        raise ValueError(f"check_transform knows no properties {sorted(unknown)}; it has {sorted(properties)}")
    t = copy.deepcopy(t).double().eval()
    x = example(t, 6) if x is None else x.double()
    if context is None and t.context:
        context = _normal(len(x), t.context)
    context = None if context is None else context.double()
    chosen = {name: p for name, p in properties.items() if name not in skip}
    failures = [f"{n}: {e}" for n, p in chosen.items() if (e := _failure(p, t, x, context, tolerance))]
    if identity and (e := _failure(is_identity, t, x, context, tolerance)):
        failures.append(f"is_identity: {e}")
    if failures:
        raise PropertyError(f"{type(t).__name__} fails {len(failures)} properties\n" + "\n".join(failures))


def _failure(p: Property, t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> str:
    try:
        with torch.random.fork_rng(devices=[]):
            p(copy.deepcopy(t), x, context, tolerance)
    except Exception as error:
        return str(error) if isinstance(error, PropertyError) else f"{type(error).__name__}: {error}"
    return ""


def example(t: Transform, rows: int, *, seed: int = 0) -> Tensor:
    """Seeded data `(rows, *event)` in float64 from the transform's data support."""
    shape = (3,) if t.data_shape is None else t.data_shape
    if t.data_support is None:
        return _normal(rows, *shape, seed=seed)
    to_support = biject_to(t.data_support)
    return to_support(_normal(rows, *to_support.inverse_shape(torch.Size(shape)), seed=seed))


def _normal(*shape: int, seed: int = 1) -> Tensor:
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


def _call(t: Transform, direction: Direction, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return t(v, context) if direction == "forward" else t.inverse(v, context)


def _sides(t: Transform, x: Tensor, context: Tensor | None) -> Iterator[tuple[Direction, Tensor]]:
    """Each direction with inputs for it."""
    yield "forward", x
    yield "inverse", t(x, context)[0].detach()


def _other(direction: Direction) -> Direction:
    return "inverse" if direction == "forward" else "forward"


def _rows(v: Tensor | None, batch: Sequence[int]) -> Tensor | None:
    """Rows of v as a batch of that shape, repeated where there are too few."""
    if v is None:
        return None
    count = torch.Size(batch).numel()
    return v[torch.arange(count) % len(v)].reshape(*batch, *v.shape[1:])


def shapes(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """Any batch shape goes through, none and an empty one too, and ladj has it; the input stays as it was."""
    for direction, v in _sides(t, x, context):
        event = _call(t, direction, v, context)[0].shape[1:]
        for batch in _BATCHES:
            given, c = (
                v[torch.arange(torch.Size(batch).numel()) % len(v)].reshape(*batch, *v.shape[1:]),
                _rows(context, batch),
            )
            before = given.clone()
            out, ladj = _call(t, direction, given, c)
            found = tuple(out.shape), tuple(ladj.shape)
            _need(
                found == ((*batch, *event), batch), f"{direction} of batch {batch}: value and ladj have shapes {found}"
            )
            _need(torch.equal(before, given), f"{direction} of batch {batch}: the input was changed in place")


def round_trip(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """x -> z -> x and z -> x -> z return where they came from, and the two ladj cancel."""
    for direction, v in _sides(t, x, context):
        start = v if direction == "forward" else v.flip(0)  # paired with other contexts, z is a new point
        middle, ladj = _call(t, direction, start, context)
        end, back = _call(t, _other(direction), middle, context)
        _close(f"{direction} and back", end, start, tolerance)
        _close(f"{direction} and back, ladj", back, -ladj, tolerance)


def ladj_is_slogdet(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """ladj is log |det| of the autodiff Jacobian, both ways."""
    for direction, v in _sides(t, x, context):
        for i in range(min(3, len(v))):
            c = None if context is None else context[i]
            _close(
                f"{direction}, row {i}", _call(t, direction, v[i], c)[1], _log_volume(t, direction, v[i], c), tolerance
            )


def _log_volume(t: Transform, direction: Direction, v: Tensor, c: Tensor | None) -> Tensor:
    """log |det dS/dv|; a simplex counts by all its coordinates but the last, as torch's transforms do."""
    out = _call(t, direction, v, c)[0].detach()
    if out.numel() < v.numel():
        return -_log_volume(t, _other(direction), out, c)
    jacobian = torch.autograd.functional.jacobian(lambda v: _call(t, direction, v, c)[0], v)
    square = jacobian.reshape(out.numel(), v.numel())[: v.numel()]
    return torch.linalg.slogdet(square).logabsdet


def batch_is_loop(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """A batch gives what its rows give one by one."""
    for direction, v in _sides(t, x, context):
        whole = _call(t, direction, v, context)
        one_by_one = [_call(t, direction, v[i], None if context is None else context[i]) for i in range(len(v))]
        for what, got, want in zip(("value", "ladj"), whole, zip(*one_by_one, strict=True), strict=True):
            _close(f"{direction}, {what}", got, torch.stack(want), tolerance)


def bad_row_stays_alone(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """A row of NaN comes out as NaN, without an exception, and leaves the other rows as they are."""
    for direction, v in _sides(t, x, context):
        spoilt = torch.cat([torch.full_like(v[:1], torch.nan), v[1:]])
        out, ladj = _call(t, direction, spoilt, context)
        want, want_ladj = _call(t, direction, v, context)
        _need(bool(out[0].isnan().all()), f"{direction}: NaN came out as {out[0].tolist()}")
        _close(f"{direction} beside a NaN row", out[1:], want[1:], tolerance)
        _close(f"{direction} beside a NaN row, ladj", ladj[1:], want_ladj[1:], tolerance)


def finite_far_out(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """Value, ladj and every gradient are finite at box edges and up to |x| = 1e6, in float32 and float64.

    Of transforms between unbounded spaces; the ends of a bounded one map to infinity.
    """
    if t.data_support is not None or t.noise_support is not None:
        return
    for dtype in (torch.float64, torch.float32):
        module, rows = t.to(dtype), _far_rows(x.shape[1:], dtype)
        c = None if context is None else _rows(context.to(dtype), rows.shape[:1])
        for direction in ("forward", "inverse"):
            _finite(module, direction, rows, c, f"{direction}, {dtype}")  # type: ignore[arg-type]
    t.double()


def _far_rows(event: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Every feature, only the first, and only the last at, beside, beyond and far beyond likely edges."""
    edges = torch.tensor(_EDGES, dtype=dtype)
    far = torch.tensor([1e2, 1e4, 1e6], dtype=dtype)
    places = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), far])
    values = torch.cat([places, -places]).reshape(-1, *(1,) * len(event))
    every = torch.ones(1, *event, dtype=dtype)
    first, last = torch.zeros_like(every), torch.zeros_like(every)
    first[..., 0], last[..., -1] = 1.0, 1.0
    return torch.cat([values * every, values * first, values * last])


def _finite(t: Transform, direction: Direction, v: Tensor, context: Tensor | None, where: str) -> None:
    inputs = [v.clone().requires_grad_(), *([] if context is None else [context.clone().requires_grad_()])]
    out, ladj = _call(t, direction, inputs[0], inputs[1] if len(inputs) > 1 else None)
    wanted = inputs + [p for p in t.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.sum() + ladj.sum(), wanted, allow_unused=True)
    for what, value in (("value", out), ("ladj", ladj), *((f"gradient {i}", g) for i, g in enumerate(grads))):
        if value is None or bool(value.isfinite().all()):
            continue
        rows = value.shape[:1] == v.shape[:1]
        bad = value.isfinite().flatten(1).all(1).logical_not() if rows and value.dim() > 1 else None
        _need(False, f"{where}: {what} is not finite" + ("" if bad is None else f" at {v[bad][0].tolist()}"))


def first_derivatives(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """Gradients in x, context and parameters are those of finite differences (gradcheck, its fast mode)."""
    for direction, v in _sides(t, x, context):
        run, inputs = _as_function(t, direction, v[:2], None if context is None else context[:2])
        _agrees(direction, torch.autograd.gradcheck, run, inputs)


def second_derivatives(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """So are gradients of gradients (gradgradcheck, its fast mode)."""
    for direction, v in _sides(t, x, context):
        run, inputs = _as_function(t, direction, v[:2], None if context is None else context[:2])
        back = [_normal(*o.shape, seed=2).requires_grad_() for o in run(*inputs) if o.requires_grad]
        _agrees(direction, torch.autograd.gradgradcheck, run, inputs, back)


def _agrees(direction: str, check: Callable[..., bool], run: Callable[..., Any], *inputs: list[Tensor]) -> None:
    try:
        check(run, *inputs, fast_mode=True)
    except torch.autograd.gradcheck.GradcheckError as error:
        inputs_are = "x, context (if any), and all parameters as one vector, are inputs 0, 1, ..."
        raise PropertyError(f"{direction} ({inputs_are}): {str(error)[:400]}") from None


class _Run(nn.Module):
    """One direction of a transform as a module's forward, which is what functional_call calls."""

    def __init__(self, t: Transform, direction: Direction) -> None:
        super().__init__()
        self.t, self.direction = t, direction

    def forward(self, v: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _call(self.t, self.direction, v, context)


def _as_function(
    t: Transform, direction: Direction, v: Tensor, context: Tensor | None
) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """A direction as a function of v, context (if any) and the parameters as one vector, and leaves to call it with."""
    module = _Run(t, direction)
    parameters = dict(module.named_parameters())
    given = [v, *([] if context is None else [context])]

    def run(*leaves: Tensor) -> Any:
        pieces = leaves[-1].split([p.numel() for p in parameters.values()]) if parameters else ()
        values = {n: piece.view_as(p) for (n, p), piece in zip(parameters.items(), pieces, strict=True)}
        return functional_call(module, values, leaves[: len(given)])

    flat = [nn.utils.parameters_to_vector(parameters.values())] if parameters else []
    return run, [p.detach().clone().requires_grad_() for p in (*given, *flat)]


def dtype_follows_module(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """float() and double() move it, before and after use, and float32 agrees with float64 roughly."""
    exact = {d: (v, *_call(t, d, v, context)) for d, v in _sides(t, x, context)}
    for dtype in (torch.float32, torch.float64):
        t = t.to(dtype)
        for direction, (v, value, ladj) in exact.items():
            got = _call(t, direction, v.to(dtype), None if context is None else context.to(dtype))
            found = [g.dtype for g in got]
            _need(found == [dtype, dtype], f"{direction} of a {dtype} module gives {found}")
            for what, g, want in zip(("value", "ladj"), got, (value, ladj), strict=True):
                _close(f"{direction}, {what} in {dtype}", g.double(), want, max(tolerance, 1e-2))


def context_is_checked(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """A context that is missing, superfluous or of the wrong width is refused by name; one row broadcasts."""
    width, name = t.context, type(t).__name__
    one = None if context is None else context[:1].expand_as(context)
    for direction, v in _sides(t, x, one):
        if width is None:
            _close("ignored context", _call(t, direction, v, x.new_zeros(2))[0], _call(t, direction, v, None)[0], 0.0)
        elif width == 0:
            _refuses(t, direction, v, x.new_zeros(2), f"{name} takes no context")
        else:
            _refuses(t, direction, v, None, f"{name} expects a context with {width} features")
            _refuses(t, direction, v, x.new_zeros(width + 1), f"{name} expects a context with {width} features")
            first = None if context is None else context[0]
            for got, want in zip(_call(t, direction, v, first), _call(t, direction, v, one), strict=True):
                _close(f"{direction}, one context for all rows", got, want, tolerance)


def _refuses(t: Transform, direction: Direction, v: Tensor, context: Tensor | None, words: str) -> None:
    said = "nothing"
    try:
        _call(t, direction, v, context)
    except ValueError as error:
        said = repr(str(error))
    _need(words in said, f"{direction}: expected a ValueError with the words {words!r}, got {said}")


def survives_copying(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """deepcopy, pickle, and a state_dict loaded into a spoilt copy all give the same map, after use too."""
    want = t(x, context)
    copies = {"deepcopy": copy.deepcopy(t), "pickle": pickle.loads(pickle.dumps(t)), "state_dict": copy.deepcopy(t)}
    with torch.no_grad():
        for p in copies["state_dict"].parameters():
            p.add_(1.0)
    copies["state_dict"].load_state_dict(t.state_dict())
    for how, same in copies.items():
        for got, value in zip(same(x, context), want, strict=True):
            _close(how, got, value, 0.0)


def vmap_is_loop(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """torch.func.vmap over rows gives what the batch gives."""
    for direction, v in _sides(t, x, context):
        given = (v,) if context is None else (v, context)
        mapped = torch.func.vmap(_Run(t, direction))(*given)
        for what, got, want in zip(("value", "ladj"), mapped, _call(t, direction, v, context), strict=True):
            _close(f"{direction}, {what}", got, want, tolerance)


def pulls_score(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """`pull_score` of what `record` left equals autograd through the other direction, whichever was recorded."""
    for direction, v in _sides(t, x, context):
        out, ladj, record = t.record(direction, v, context)
        for what, got, want in zip(("value", "ladj"), (out, ladj), _call(t, direction, v, context), strict=True):
            _close(f"record {direction}, {what}", got, want, tolerance)
        moved = out.detach().requires_grad_()
        start, back = _call(t, _other(direction), moved, context)
        log_density = back.sum() - 0.5 * (start - 0.3).square().sum() + start.sin().sum()
        score = -(v - 0.3) + v.cos()
        (want,) = torch.autograd.grad(log_density, moved)
        _close(f"score after {direction}", t.pull_score(record, score), want, tolerance)


def is_identity(t: Transform, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    """It maps every point to itself."""
    for direction, v in _sides(t, x, context):
        out, ladj = _call(t, direction, v, context)
        _close(f"{direction}, value", out, v, tolerance)
        _close(f"{direction}, ladj", ladj, torch.zeros_like(ladj), tolerance)


properties: dict[str, Property] = {
    p.__name__: p
    for p in (
        shapes,
        round_trip,
        ladj_is_slogdet,
        batch_is_loop,
        bad_row_stays_alone,
        finite_far_out,
        first_derivatives,
        second_derivatives,
        dtype_follows_module,
        context_is_checked,
        survives_copying,
        vmap_is_loop,
        pulls_score,
    )
}
"""What `check_transform` runs, by name: functions of (transform, x, context, tolerance) that raise PropertyError."""
