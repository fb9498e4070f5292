"""The rational-quadratic splines: against nflows and autodiff, at knots and edges, rough in float32."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.distributions import Distribution

from flowpath.transforms.rational_quadratic import _evaluate, _knots
from flowpath.transforms.spline import CircularRationalQuadratic, RationalQuadratic
from flowpath.transforms.spline_box import Box

both_ways = pytest.mark.parametrize("way", ["forward", "inverse"])
elements = pytest.mark.parametrize(
    "element", [RationalQuadratic(4), CircularRationalQuadratic(4)], ids=["interval", "circle"]
)
rough = pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 100.0], ids="scale{:g}".format)
quiet_jvp = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(element: nn.Module, *batch: int, scale: float = 1.0, seed: int = 1, **kw: torch.dtype) -> Tensor:
    """Params of `batch` as conditioners emit them: parameters, then features, then the batch in memory."""
    *rows, d = batch
    return scale * normal(element.num_params, d, *rows, seed=seed, **kw).movedim(1, -1)


def gradients(run: Callable, *inputs: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
    inputs = tuple(v.detach().requires_grad_() for v in inputs)
    y, ladj = run(*inputs)
    weights = normal(2, *y.shape, seed=5).to(y.dtype)
    return torch.autograd.grad((y, ladj), inputs, tuple(weights), create_graph=create_graph)


def score(element: nn.Module, way: str, x: Tensor, params: Tensor) -> Tensor:
    y, ladj = getattr(element, way)(x, params)
    return y.sin().sum() + ladj.sum()


def on_circle(a: Tensor, b: Tensor, period: float) -> Tensor:
    """The distance from a to b the short way round."""
    return (torch.remainder(a - b + period / 2.0, period) - period / 2.0).abs()


# --- what it computes ---------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_nflows(way: str, scale: float) -> None:
    element, x = RationalQuadratic(8, bound=3.0), 2.0 * normal(40, 3)
    params = numbers(element, 40, 3, scale=scale)
    w, h, d = params.movedim(0, -1).split((8, 8, 7), -1)
    theirs = unconstrained_rational_quadratic_spline(
        x, w, h, d + math.log(math.expm1(1.0 - 1e-3)), inverse=way == "inverse", tail_bound=3.0
    )
    for a, b in zip(getattr(element, way)(x, params), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@elements
@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_zero_params_are_the_identity(element: nn.Module, way: str, dtype: torch.dtype) -> None:
    x = normal(50, 2, dtype=dtype).clamp(-3.0, 3.0)
    y, ladj = getattr(element, way)(x, torch.zeros(element.num_params, 50, 2, dtype=dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, x, rtol=0.0, atol=16.0 * eps)
    torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0.0, atol=16.0 * eps)


@elements
@both_ways
def test_ladj_is_the_log_derivative(element: nn.Module, way: str) -> None:
    x, params = 2.0 * normal(30, 2), numbers(element, 30, 2)
    x.requires_grad_()
    y, ladj = getattr(element, way)(x, params)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0].log(), ladj, rtol=0.0, atol=1e-11)


@elements
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_inverse_undoes_forward(element: nn.Module, scale: float) -> None:
    """x comes back within dx = 16 eps bound (1 + 1 / slope), a few roundings of x and of y."""
    x, params = normal(400, 2).clamp(-3.0, 3.0), numbers(element, 400, 2, scale=scale)
    y, ladj = element.forward(x, params)
    back, ladj_back = element.inverse(y, params)
    dx = 16.0 * torch.finfo(x.dtype).eps * element.box.high * (1.0 + (-ladj).exp())
    assert (on_circle(back, x, 2.0 * math.pi) <= dx).all()
    torch.testing.assert_close(element.forward(back, params)[1], -ladj_back, rtol=0.0, atol=1e-9)


# --- knots, edges, tails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 5.0, 64.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_knots_are_met_exactly(bound: float, scale: float) -> None:
    element = RationalQuadratic(8, bound=bound)
    params = numbers(element, 30, 1, scale=scale, dtype=torch.float32).unsqueeze(1).expand(-1, 9, -1, -1)
    p = torch.softmax(params[:16].reshape(2, 8, 9 * 30), 1)
    xs, ys = _knots(p, element.box).view(2, 9, 9, 30).diagonal(dim1=1, dim2=2).transpose(1, 2)  # knot j in row j
    assert torch.equal(xs[[0, -1]], ys[[0, -1]])
    assert torch.equal(xs[-1], torch.full((30,), bound))
    y, _ = element.forward(xs.unsqueeze(-1), params)
    x, _ = element.inverse(ys.unsqueeze(-1), params)
    assert torch.equal(y[..., 0], ys)
    assert torch.equal(x[..., 0], xs)


@elements
def test_value_and_derivative_are_continuous_at_knots(element: nn.Module) -> None:
    params = numbers(element, 30, 1)
    box = element.box
    xs = _knots(torch.softmax(params[: 2 * box.bins, :, 0].unflatten(0, (2, box.bins)), 1), box)[0]
    xs = xs[1:-1].unsqueeze(-1)
    step = torch.full_like(xs, math.inf)
    below, above = (element.forward(torch.nextafter(xs, side), params.unsqueeze(1)) for side in (-step, step))
    for a, b in zip(below, above, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-11)


@both_ways
@pytest.mark.parametrize("create_graph", [False, True], ids=["analytic", "plain"])
def test_tails_are_the_identity(way: str, create_graph: bool) -> None:
    element = RationalQuadratic(6, bound=2.0)
    x = torch.tensor([2.0000002, -2.1, 7.3, 1e6, -1e6, 1e30, math.inf, -math.inf]).unsqueeze(-1)
    params = numbers(element, 8, 1, scale=30.0, dtype=torch.float32)
    y, ladj = getattr(element, way)(x, params)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros_like(x))
    gx, gp = gradients(getattr(element, way), x, params, create_graph=create_graph)
    assert torch.equal(gx, normal(2, 8, 1, seed=5)[0].float())
    assert torch.equal(gp, torch.zeros_like(gp))


@both_ways
def test_edges_belong_to_both_sides(way: str) -> None:
    element = RationalQuadratic(6, bound=5.0)
    x, params = torch.tensor([[-5.0], [5.0]]), numbers(element, 2, 1, scale=10.0, dtype=torch.float32)
    y, ladj = getattr(element, way)(x, params)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros_like(x))
    gx = torch.autograd.functional.jacobian(lambda v: getattr(element, way)(v, params)[0].sum(), x)
    torch.testing.assert_close(gx, torch.ones_like(x))


@both_ways
def test_nan_spoils_its_own_element_only(way: str) -> None:
    element = RationalQuadratic(4)
    x, params = normal(6, 2), numbers(element, 6, 2)
    hurt = x.clone()
    hurt[2, 1] = math.nan
    for good, bad in zip(
        (*getattr(element, way)(x, params), *gradients(getattr(element, way), x, params)),
        (*getattr(element, way)(hurt, params), *gradients(getattr(element, way), hurt, params)),
        strict=True,
    ):
        assert bad[..., 2, 1].isnan().any()
        bad[..., 2, 1] = good[..., 2, 1]
        assert torch.equal(good, bad)


@elements
def test_nan_params_spoil_their_own_element_only(element: nn.Module) -> None:
    x, params = normal(6, 2), numbers(element, 6, 2)
    params[:, 2, 1] = math.nan
    y, _ = element.forward(x, params)
    assert y.isnan().sum() == 1


# --- rough numbers in float32 -------------------------------------------------------------------------------


def rough_case(bound: float, scale: float, bins: int = 8) -> tuple[RationalQuadratic, Tensor, Tensor]:
    """1000 splines, each at 20 points inside the box, at its edges and beyond."""
    element = RationalQuadratic(bins, bound=bound)
    params = numbers(element, 1000, 1, scale=scale, dtype=torch.float32)
    inside = bound * (2.0 * torch.rand(20, 1000, 1, generator=torch.Generator().manual_seed(2)) - 1.0)
    edges = torch.tensor([-1e30, -1e6, -bound, bound, 1.5 * bound, 1e6, 1e30]).view(-1, 1, 1)
    x = torch.cat((inside, edges.expand(-1, 1000, 1))).sort(0).values
    return element, x, params.unsqueeze(1)


@rough
@both_ways
@pytest.mark.parametrize("bound", [3.0, 50.0])
def test_rough_float32_is_finite_and_monotone(scale: float, way: str, bound: float) -> None:
    element, x, params = rough_case(bound, scale)
    y, ladj = getattr(element, way)(x, params)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    inside = y.clamp(-bound, bound)
    assert (inside.diff(dim=0) >= -2.0 * torch.finfo(torch.float32).eps * bound).all()
    assert (y.diff(dim=0)[x.diff(dim=0) > 1e-3 * bound] >= 0.0).all()


@rough
@pytest.mark.parametrize("bound", [3.0, 50.0])
@pytest.mark.parametrize("bins", [2, 8, 32])
def test_rough_float32_is_inverted(scale: float, bound: float, bins: int) -> None:
    """|T(T^-1(y)) - y| <= 1e-5 bound, or slope dx for dx = 8 eps bound (1 + 1 / slope).

    Either way the two log-derivatives at the point the inverse returns are one number.
    """
    element, y, params = rough_case(bound, scale, bins)
    eps, inside = torch.finfo(torch.float32).eps, y.abs() <= bound
    x, ladj_inverse = element.inverse(y, params)
    again, ladj = element.forward(x, params)
    error, slope = (again - y).abs()[inside], ladj.exp()[inside]
    assert ((error <= 1e-5 * bound) | (error <= 8.0 * eps * bound * (1.0 + slope))).all()
    torch.testing.assert_close(ladj_inverse, -ladj, rtol=0.0, atol=1e-5)

    y, ladj = element.forward(x, params)
    back, _ = element.inverse(y, params)
    error, slope = (back - x).abs()[inside], ladj.exp()[inside]
    again = (element.forward(back, params)[0] - y).abs()[inside]
    assert ((error <= 8.0 * eps * bound * (1.0 + 1.0 / slope)) | (again <= 1e-5 * bound)).all()


@rough
def test_rough_float32_agrees_with_float64(scale: float) -> None:
    """|y - y64| <= 16 eps bound (1 + slope): as if x and y had each been moved by a few roundings."""
    element, x, params = rough_case(5.0, scale)
    x = x[x.abs().amax((1, 2)) < 1e6]
    y, _ = element.forward(x, params)
    exact, ladj = element.forward(x.double(), params.double())
    slope = ladj.exp()
    assert ((y - exact).abs() <= 16.0 * torch.finfo(torch.float32).eps * 5.0 * (1.0 + slope)).all()


@rough
@both_ways
@pytest.mark.parametrize("create_graph", [False, True], ids=["analytic", "plain"])
def test_rough_float32_gradients_are_finite(scale: float, way: str, create_graph: bool) -> None:
    element, x, params = rough_case(5.0, scale)
    params = params.expand(-1, len(x), -1, -1)
    for g in gradients(getattr(element, way), x, params, create_graph=create_graph):
        assert g.isfinite().all()


@elements
@both_ways
def test_large_slopes_and_flat_bins_keep_the_gradient_of_float64(element: nn.Module, way: str) -> None:
    x, params = normal(200, 1, dtype=torch.float32), numbers(element, 200, 1, scale=2.0, dtype=torch.float32)
    single = gradients(getattr(element, way), x, params)
    double = gradients(lambda *v: getattr(element, way)(*(w.double() for w in v)), x, params)
    for a, b in zip(single, double, strict=True):
        assert ((a - b).abs() <= 2e-3 * (1.0 + b.abs())).float().mean() > 0.99


# --- derivatives and torch's transforms ---------------------------------------------------------------------


@elements
@both_ways
def test_gradcheck_and_gradgradcheck(element: nn.Module, way: str) -> None:
    x, params = normal(3, 1).requires_grad_(), numbers(element, 3, 1).requires_grad_()
    assert gradcheck(getattr(element, way), (x, params))
    assert gradgradcheck(getattr(element, way), (x, params))


@elements
@both_ways
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_analytic_gradient_equals_the_plain_one(element: nn.Module, way: str, scale: float) -> None:
    x, params = 4.0 * normal(300, 2), numbers(element, 300, 2, scale=scale)
    analytic = gradients(getattr(element, way), x, params)
    for a, b in zip(analytic, gradients(getattr(element, way), x, params, create_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@both_ways
def test_gradient_in_the_middle_of_an_identity_bin(way: str) -> None:
    """There the root's b is exactly 0."""
    element, x = RationalQuadratic(4, bound=4.0), torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    params = torch.zeros(element.num_params, 1, 4, dtype=torch.float64)
    for g in (gradients(getattr(element, way), x, params, create_graph=c)[0] for c in (False, True)):
        torch.testing.assert_close(g, normal(2, 1, 4, seed=5)[0])  # the ladj is 0 around


@quiet_jvp
@elements
@both_ways
def test_torch_func_agrees_with_autograd(element: nn.Module, way: str) -> None:
    x, params = normal(3, 2), numbers(element, 3, 2)

    def f(v: Tensor) -> Tensor:
        return score(element, way, v, params)

    gradient = torch.autograd.functional.jacobian(f, x)
    hessian = torch.autograd.functional.hessian(f, x)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.func.grad(f)(x), gradient, **close)
    torch.testing.assert_close(torch.func.jacfwd(f)(x), gradient, **close)
    torch.testing.assert_close(torch.func.hessian(f)(x), hessian, **close)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(f))(x), hessian, **close)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(x), hessian, **close)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x))))
    torch.testing.assert_close(out.tangent, gradient.sum(), **close)


@elements
@both_ways
def test_vmap_equals_a_batch(element: nn.Module, way: str) -> None:
    x, params = normal(5, 2).requires_grad_(), numbers(element, 5, 2).requires_grad_()
    run = getattr(element, way)
    for a, b in zip(torch.vmap(run, (0, 1))(x, params), run(x, params), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.vmap(run, (None, 1))(x[0], params), run(x[:1], params), strict=True):
        torch.testing.assert_close(a, b)
    rows = torch.vmap(torch.func.grad(lambda *v: score(element, way, *v)), (0, 1))(x, params)
    torch.testing.assert_close(rows, torch.autograd.grad(score(element, way, x, params), x)[0])
    jacobian = torch.autograd.functional.jacobian
    one, together = (jacobian(lambda v: run(v, params)[1].sum(0), x, vectorize=v) for v in (False, True))
    torch.testing.assert_close(together, one)


@pytest.fixture
def validation() -> Iterator[None]:
    """torch.compile turns the validation of distributions off for good."""
    before = Distribution._validate_args
    yield
    Distribution.set_default_validate_args(before)


def compiled(run: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.usefixtures("validation")
def test_compiles_in_one_graph_for_any_batch() -> None:
    element = CircularRationalQuadratic(3)
    run = compiled(element.inverse)
    for n in (4, 7):
        x, params = 3.0 * normal(n, 2, seed=n), numbers(element, n, 2)
        for a, b in zip(run(x, params), element.inverse(x, params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("validation")
def test_compiled_gradient_equals_the_analytic_one() -> None:
    element = RationalQuadratic(2)
    x, params = 3.0 * normal(5, 1), numbers(element, 5, 1)
    analytic = gradients(element.inverse, x, params)
    for a, b in zip(gradients(compiled(element.inverse), x, params), analytic, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- shapes, dtypes, memory ---------------------------------------------------------------------------------


@elements
@both_ways
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_params_and_x_broadcast(element: nn.Module, way: str, batch: tuple[int, ...]) -> None:
    x, params, run = normal(*batch, 3), numbers(element, *batch, 3), getattr(element, way)
    for free in (params[(slice(None), *(slice(1),) * len(batch))], numbers(element, 3)):
        full = free.reshape(len(free), *(1,) * len(batch), 3) if 0 not in free.shape else params
        full = full.expand(-1, *batch, -1)
        for a, b in zip(run(x, free), run(x, full), strict=True):
            assert a.shape == x.shape
            torch.testing.assert_close(a, b)
    y, ladj = run(normal(3), params)
    assert y.shape == ladj.shape == (*batch, 3)


@elements
def test_gradient_of_shared_params_is_the_sum(element: nn.Module) -> None:
    x, free = normal(5, 3), numbers(element, 3)
    _, shared = gradients(element.forward, x, free)
    _, each = gradients(element.forward, x, free.unsqueeze(1).repeat(1, 5, 1))
    torch.testing.assert_close(shared, each.sum(1))


@both_ways
def test_any_strides_give_the_same(way: str) -> None:
    element = RationalQuadratic(5)
    x, params = normal(7, 3), numbers(element, 7, 3)
    ours = gradients(getattr(element, way), x, params)
    x, params = x.t().contiguous().t(), params.movedim(0, -1).contiguous().movedim(-1, 0)
    theirs = gradients(getattr(element, way), x, params)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_features_stay_first_in_memory() -> None:
    element = RationalQuadratic(5)
    params = numbers(element, 7, 3).requires_grad_()
    y, ladj = element.forward(normal(7, 3), params)
    assert y.t().is_contiguous()
    assert ladj.t().is_contiguous()
    assert torch.autograd.grad(y.sum(), params)[0].movedim(-1, 1).is_contiguous()


@both_ways
def test_graph_keeps_little_and_not_the_params(way: str) -> None:
    """Kept per element: K-wide the fractions and slopes (3 K + 1), and a dozen numbers of its bin."""
    element, kept = RationalQuadratic(8), dict[int, int]()
    x, params = normal(100, 3).requires_grad_(), numbers(element, 100, 3).requires_grad_()
    output = params * 1.0

    def keep(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        getattr(element, way)(x, output)
    assert output.untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) <= 300 * 8 * (3 * 8 + 1 + 12)


@elements
@both_ways
def test_autocast_and_half_params_are_done_in_the_dtype_of_x(element: nn.Module, way: str) -> None:
    x, params = normal(20, 2, dtype=torch.float32), numbers(element, 20, 2, dtype=torch.float32).bfloat16()
    expected = getattr(element, way)(x, params.float())
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(getattr(element, way)(x, params), expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        gx, gp = gradients(getattr(element, way), x, params, create_graph=True)
    assert (gx.dtype, gp.dtype) == (torch.float32, torch.bfloat16)
    assert getattr(element, way)(x.bfloat16(), params)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_low_matmul_precision_leaves_the_knots_alone(dtype: torch.dtype) -> None:
    element = CircularRationalQuadratic(6, min_width=1e-2, min_height=2e-3)
    x, params = normal(20, 2, dtype=dtype), numbers(element, 20, 2, dtype=dtype)
    y, _ = element.forward(x, params)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        again, _ = element.forward(x, params)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(again, y)


@elements
def test_copies_and_pickles_without_state(element: nn.Module) -> None:
    element.forward(normal(2, 2), numbers(element, 2, 2))
    for again in (copy.deepcopy(element), pickle.loads(pickle.dumps(element)), element.double()):
        assert not again.state_dict()
        x, params = normal(4, 2), numbers(element, 4, 2)
        assert torch.equal(again.forward(x, params)[0], element.forward(x, params)[0])


def test_widths_heights_and_slopes_have_their_floors() -> None:
    box = Box(4, -2.0, 2.0, min_width=0.1, min_height=0.05, min_slope=0.2)
    p = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1).repeat(2, 1, 5)
    xs, ys = _knots(p, box)
    torch.testing.assert_close(xs.diff(dim=0)[:, 0], torch.tensor([2.8, 0.4, 0.4, 0.4]))
    torch.testing.assert_close(ys.diff(dim=0)[:, 0], torch.tensor([3.4, 0.2, 0.2, 0.2]))
    _, _, slopes, _ = _evaluate(torch.linspace(-1.9, 1.9, 5), torch.full((11, 5), -50.0), box, False)
    assert slopes.min() == pytest.approx(0.2)
    assert slopes[0, 0] == 1.0
    assert slopes[1, -1] == 1.0


# --- the circle ---------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(("start", "period"), [(-math.pi, 2.0 * math.pi), (0.0, 1.0), (10.0, 24.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_circle_wraps(way: str, start: float, period: float, dtype: torch.dtype) -> None:
    element = CircularRationalQuadratic(5, start=start, period=period)
    x = start + period * torch.rand(200, 1, generator=torch.Generator().manual_seed(3), dtype=dtype)
    ends = [start, start + period, start - 1e-9, math.nextafter(start + period, 0.0)]
    x[:4, 0] = torch.tensor(ends, dtype=dtype)
    params = numbers(element, 1, scale=2.0, dtype=dtype)
    tolerance = 1e3 * torch.finfo(dtype).eps * (period + abs(start))
    y, ladj = getattr(element, way)(x, params)
    again, ladj_again = getattr(element, way)(x + 3.0 * period, params)
    assert (y >= torch.tensor(start, dtype=dtype)).all()
    assert (y < torch.tensor(start + period, dtype=dtype)).all()
    assert (on_circle(y, again, period) <= tolerance).all()
    assert ((ladj - ladj_again).abs() <= 1e4 * torch.finfo(dtype).eps).all()
    back, _ = getattr(element, "inverse" if way == "forward" else "forward")(y, params)
    assert (on_circle(back, x, period) <= tolerance).all()


def test_circle_is_smooth_at_its_cut() -> None:
    element = CircularRationalQuadratic(5)
    params = numbers(element, 1, scale=2.0)
    ends = torch.tensor([[-math.pi], [math.nextafter(math.pi, 0.0)]], dtype=torch.float64)
    y, ladj = element.forward(ends, params)
    assert on_circle(y[0], y[1], 2.0 * math.pi) < 1e-13
    torch.testing.assert_close(ladj[0], ladj[1], rtol=0.0, atol=1e-12)
    assert ladj.abs().min() > 0.01


def test_circle_is_covered_once() -> None:
    element = CircularRationalQuadratic(5)
    x = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64).unsqueeze(-1)[:-1]
    _, ladj = element.forward(x, numbers(element, 1))
    assert ladj.exp().mean().item() == pytest.approx(1.0, abs=1e-6)


def test_circle_shift_moves_every_point() -> None:
    element = CircularRationalQuadratic(5)
    x, params = normal(50, 1), numbers(element, 1, scale=0.0)
    params[-1] = 2.5
    y, ladj = element.forward(x, params)
    torch.testing.assert_close(on_circle(y, x, 2.0 * math.pi), torch.full_like(x, 2.5))
    torch.testing.assert_close(ladj, torch.zeros_like(x))


@rough
@both_ways
def test_rough_circle_is_finite(scale: float, way: str) -> None:
    element = CircularRationalQuadratic(8)
    x = 4.0 * normal(2000, 1, dtype=torch.float32)
    params = numbers(element, 2000, 1, scale=scale, dtype=torch.float32)
    x[:4, 0] = torch.tensor([1e6, -1e6, 1e30, -1e30])
    for v in (*getattr(element, way)(x, params), *gradients(getattr(element, way), x, params)):
        assert v.isfinite().all()


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 1}, "bins to be a whole number of at least 2, got 1"),
        ({"bins": 2.0}, "bins to be a whole number of at least 2, got 2.0"),
        ({"bound": 0.0}, "interval of finite, positive length"),
        ({"bound": math.inf}, "interval of finite, positive length"),
        ({"min_width": 0.2}, "min_width < 1 / bins = 0.125, got 0.2"),
        ({"min_height": 0.0}, "1e-5 <= min_height"),
        ({"min_slope": 1.0}, "0 < min_slope < 1, got 1.0"),
    ],
    ids=lambda v: "-".join(map(str, *v.items())) if isinstance(v, dict) else "",
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"RationalQuadratic expects .*{message}"):
        RationalQuadratic(**arguments)


@elements
def test_params_of_another_size_are_refused(element: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"expects params of shape \({element.num_params}, \*batch, d\)"):
        element.forward(torch.zeros(4, 2), torch.zeros(4, 2, element.num_params))
