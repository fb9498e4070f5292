"""Traced functions: the same numbers as the function under the same seed, live tensors, honest refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import dropout, softplus

import flowpath as fp
from flowpath.tracing import Traced, TracingError, trace
from flowpath.tracing.compiler import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

X = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def seeded(fn: Callable[..., Any], *args: Any, seed: int = 3) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fn(*args)


def gaussian_noise(x: Tensor) -> Tensor:
    return x + torch.randn(2, 3, dtype=x.dtype) * dist.Normal(0.0, 2.0).rsample((3,))


def filled_noise(x: Tensor) -> Tensor:
    u = torch.empty(3, dtype=x.dtype).uniform_(1.0, 2.0)
    return x * u + torch.rand_like(x) + u.log()


def subsample(x: Tensor) -> Tensor:
    with pyro.plate("rows", 10, subsample_size=2) as i:
        return x + i.unsqueeze(-1)


def mixed_laws(x: Tensor) -> Tensor:
    first = torch.randn(3, dtype=x.dtype)
    gamma = dist.Gamma(softplus(x), 1.0).rsample()
    return first + gamma + torch.randn(3, dtype=x.dtype)


def fixed_laws(x: Tensor) -> Tensor:
    coins = dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)).sample((2, 3))
    return x * coins + dist.Dirichlet(torch.ones(3, dtype=x.dtype)).rsample() + torch.randint(0, 5, (3,))


def dropped(x: Tensor) -> Tensor:
    return dropout(x, 0.5, True).sum(-1)


def slopes(x: Tensor) -> Any:
    z = x.detach().requires_grad_()
    y = (z.exp() * torch.randn(3, dtype=x.dtype)).sum()
    (g,) = torch.autograd.grad(y, z, create_graph=True)
    return {"value": y, "slope": g, "curvature": torch.autograd.grad(g.sum(), z)[0]}


def twice_filled(x: Tensor) -> Tensor:
    u = torch.zeros(3, dtype=x.dtype)
    a = u.normal_() * 1.0
    return x + a * u.normal_()


def item_as_number(x: Tensor) -> Tensor:
    return x * x.sum().item() + 2.0


FUNCTIONS = [
    gaussian_noise,
    filled_noise,
    subsample,
    mixed_laws,
    fixed_laws,
    dropped,
    slopes,
    twice_filled,
    item_as_number,
]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_traced_equals_function_under_one_seed(fn: Callable[..., Any]) -> None:
    traced = trace(fn, [torch.zeros_like(X)])
    for seed in (1, 2):
        torch.testing.assert_close(seeded(traced, X, seed=seed), seeded(fn, X, seed=seed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_noise_comes_from_the_global_generator_as_often_as_in_the_function(fn: Callable[..., Any]) -> None:
    traced = trace(fn, [torch.zeros_like(X)])

    def after(call: Callable[..., Any]) -> Tensor:
        call(X)
        return torch.rand(3)

    assert torch.equal(seeded(after, traced), seeded(after, fn))


@pytest.mark.parametrize(
    ("fn", "inside"),
    [
        (gaussian_noise, ()),
        (filled_noise, ()),
        (subsample, ()),
        (fixed_laws, ()),
        (dropped, ()),
        (mixed_laws, ("_standard_gamma", "normal_", "randn")),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_draws_of_fixed_law_leave_the_graph(fn: Callable[..., Any], inside: tuple[str, ...]) -> None:
    traced = trace(fn, [torch.zeros_like(X)])
    assert set(traced.random) <= set(inside)
    assert traced.noise()


def test_tracing_leaves_generator_validation_and_flags_alone(keeps_rng: Callable[[], Any]) -> None:
    flag = torch.compiler.is_compiling()
    with keeps_rng():
        trace(gaussian_noise, [X])
        with pytest.raises(TracingError):
            trace(lambda x: x if x.sum() > 0 else -x, [X])
    assert torch.compiler.is_compiling() == flag
    assert dist.Normal(0.0, 1.0)._validate_args == Distribution._validate_args


def test_steps_of_an_optimiser_are_seen() -> None:
    net = nn.Linear(3, 2).double()
    traced = trace(lambda x: net(x).tanh(), [X], live=net.parameters())
    with torch.no_grad():
        net.weight.mul_(3.0)
    assert torch.equal(traced(X), net(X).tanh().detach())
    assert traced.constants == ()


def test_buffers_are_updated_by_calls_and_not_by_tracing() -> None:
    net = nn.BatchNorm1d(3).double()
    before = net.running_mean.clone()
    traced = trace(lambda x: net(x), [X], live=[*net.parameters(), *net.buffers()])
    assert torch.equal(net.running_mean, before)
    assert net.num_batches_tracked == 0
    traced(X)
    twin = nn.BatchNorm1d(3).double()
    twin(X)
    assert torch.equal(net.running_mean, twin.running_mean)
    assert net.num_batches_tracked == 1


def test_data_in_closures_are_named_and_written_in_place_seen() -> None:
    y, scale = torch.arange(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    traced = trace(lambda x: x + y * scale + torch.tensor([1.0, 2.0, 3.0]), [X])
    assert [c.told({id(y): "y"}) for c in traced.constants] == ["y (3,)", "a literal (3,)"]
    y.fill_(5.0)
    scale.fill_(-1.0)
    assert torch.equal(traced(X), X - 5.0 + torch.tensor([1.0, 2.0, 3.0]))


def test_gradients_reach_live_tensors() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    traced = trace(lambda x: torch.autograd.grad((w.exp() * x).sum(), [w])[0], [X], live=[w])
    assert torch.equal(traced(X), w.detach().exp() * X.sum(0))


def test_outputs_share_no_memory() -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    traced = trace(lambda x: (w, w.expand(2, 3), torch.autograd.grad(w.sum(), w)[0], x.t(), x), [X], live=[w])
    results = traced(X)
    with torch.no_grad():
        for r in results:
            r.mul_(2.0)
    assert torch.equal(w, torch.ones_like(w))
    assert [r.sum().item() for r in results] == pytest.approx([6, 12, 6, 2 * X.sum().item(), 2 * X.sum().item()])


def test_equal_results_are_two_tensors() -> None:
    a, b = traced = trace(lambda x: (x.exp(), x.exp()), [X])(X)
    assert a.data_ptr() != b.data_ptr()
    assert torch.equal(*traced)


def test_argument_given_twice_has_two_places() -> None:
    x = X.clone()
    traced = trace(lambda a, b: a - 2 * b, [x, x])
    assert torch.equal(traced(X, 3 * X), X - 6 * X)


def test_pytrees_in_and_out() -> None:
    traced = trace(lambda d, k: [d["a"] * k, {"b": d["b"][0] + k}], [{"a": X, "b": (X,)}, 2.0])
    a, rest = traced({"a": X, "b": (X,)}, 2.0)
    assert torch.equal(a, 2 * X)
    assert torch.equal(rest["b"], X + 2)


@pytest.mark.parametrize(
    "inputs",
    [(torch.zeros(3, 3, dtype=torch.float64), 2), (X.float(), 2), (X, 3), ((X,), 2)],
    ids=["shape", "dtype", "number", "structure"],
)
def test_other_inputs_are_refused(inputs: tuple[Any, ...]) -> None:
    traced = trace(lambda x, k: x * k, [X, 2])
    with pytest.raises(ValueError, match="Traced expects .* trace the function again"):
        traced(*inputs)


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def loops(x: Tensor) -> Tensor:
    while x.norm() > 1.0:
        x = x / 2
    return x


@pytest.mark.parametrize("fn", [branches, loops], ids=lambda f: f.__name__)
def test_control_flow_on_values_is_refused(fn: Callable[..., Any]) -> None:
    with pytest.raises(TracingError, match="hangs on the value of a tensor"):
        trace(fn, [X])


def test_errors_of_the_function_are_told() -> None:
    with pytest.raises(TracingError, match="ValueError: no such thing"):
        trace(lambda x: (_ for _ in ()).throw(ValueError("no such thing")), [X])


@pytest.mark.parametrize("build", [fp.iaf, fp.nsf, fp.maf], ids=lambda f: f.__name__)
def test_flows_are_traced_with_their_path_gradients(build: Callable[..., fp.Flow]) -> None:
    flow = build(3, transforms=2, hidden_features=(8,)).double()
    params = list(flow.parameters())

    def step() -> tuple[Tensor, ...]:
        d = fp.draw(flow(), 4)
        loss = (d.log_prob_path + d.value.square().sum(-1)).mean()
        return loss, *torch.autograd.grad(loss, params)

    traced: Traced = trace(step, [], live=[*params, *flow.buffers()])
    torch.testing.assert_close(seeded(traced), seeded(step), rtol=1e-9, atol=1e-10)
    assert traced.constants == ()


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_traced() -> None:
    net = nn.Linear(3, 2).double()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        loss = (net(x + torch.randn(2, 3, dtype=x.dtype)).tanh().square() * 3.0).sum()
        return loss, *torch.autograd.grad(loss, list(net.parameters()))

    traced = trace(step, [X], live=net.parameters())
    run = traced.compiled([X])
    with torch.no_grad():
        net.weight.add_(1.0)
    torch.testing.assert_close(seeded(run, [X]), seeded(traced.run, [X]), rtol=1e-12, atol=1e-12)


@needs_gpu
@pytest.mark.gpu
def test_compiled_equals_traced_on_a_gpu() -> None:
    net = nn.Linear(3, 2).cuda()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        loss = net(x + torch.randn(2, 3, device=x.device)).tanh().square().sum()
        return loss, *torch.autograd.grad(loss, list(net.parameters()))

    x = X.float().cuda()
    traced = trace(step, [x], live=net.parameters())
    run = traced.compiled([x])
    for seed in (1, 2, 3):
        expected = [r.clone() for r in seeded(traced.run, [x], seed=seed)]
        torch.testing.assert_close(seeded(run, [x], seed=seed), expected, rtol=1e-5, atol=1e-6)
