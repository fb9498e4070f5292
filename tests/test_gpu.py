"""What must hold on a CUDA device: `pytest -m gpu`. Without one every test here skips and says so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from registry import CASES, HIDDEN, Case, each_architecture, normal, rough_flow, small_flow
from torch import nn
from torch.distributions import Distribution, Independent, Normal, biject_to, constraints

import flowpath as fp
from flowpath.training.joint import JointStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

each_transform = pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_matmuls() -> Iterator[None]:
    """float32 without tf32, so that the two devices may be compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@each_transform
def test_transform_equals_the_cpu(case: Case) -> None:
    t, x, c = case.ready(), case.x(), case.c()
    on_gpu, c_gpu = copy.deepcopy(t).to(GPU), None if c is None else c.to(GPU)
    z, _ = t(x, c)
    for got, want in (
        (on_gpu(x.to(GPU), c_gpu), t(x, c)),
        (on_gpu.inverse(z.detach().to(GPU), c_gpu), t.inverse(z.detach(), c)),
    ):
        for g, w in zip(got, want, strict=True):
            assert g.device.type == "cuda" and torch.allclose(g.cpu(), w, atol=1e-8)


@each_architecture
@pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])
def test_flow_equals_the_cpu(name: str, context: int) -> None:
    """Density, draws from the same noise, and their gradients, in float64."""
    flow, x = rough_flow(name, 3, context), normal(8, 3)
    c = normal(8, context) if context else None
    on_gpu, found = copy.deepcopy(flow).to(GPU), []
    for f, device in ((flow, "cpu"), (on_gpu, GPU)):
        here = None if c is None else c.to(device)
        drawn, log_q = f.rsample_and_log_prob(() if context else 8, here, noise=x.to(device))
        scored = f.log_prob(x.to(device), here)
        loss = drawn.sin().sum() + log_q.sum() + scored.sum()
        grads = torch.autograd.grad(loss, list(f.parameters()), materialize_grads=True)
        found.append([t.cpu() for t in (drawn, log_q, scored, *grads)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


@each_architecture
def test_draws_are_made_on_the_device(name: str) -> None:
    flow = small_flow(name).to(GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    x, log_q = flow.rsample_and_log_prob(16, generator=generator)
    assert x.device.type == log_q.device.type == "cuda"
    assert torch.equal(x, flow.rsample(16, generator=torch.Generator(GPU).manual_seed(0)))
    assert flow().sample((4,)).device.type == "cuda" and flow().mean.device.type == "cuda"


@pytest.mark.parametrize(
    "base",
    [
        lambda: fp.DiagonalNormal(3),
        lambda: fp.StudentT(3),
        lambda: fp.BoxUniform(-50.0, 50.0, features=3),
        lambda: fp.NormalMixture(3, 4),
        lambda: Independent(Normal(torch.zeros(3), torch.ones(3)), 1),
    ],
    ids=["diagonal", "student", "uniform", "mixture", "torch"],
)
def test_bases_move(base: Callable) -> None:
    flow = fp.Flow(fp.LU(3), base()).to(GPU)
    x, log_q = flow.rsample_and_log_prob(16, generator=torch.Generator(GPU).manual_seed(0))
    assert x.device.type == "cuda" and torch.allclose(flow.log_prob(x), log_q, atol=1e-4)


def test_supports_move() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.0])
    on = biject_to(constraints.independent(constraints.interval(low, high), 1))
    flow = fp.Flow(fp.Chain([fp.from_torch(on), fp.LU(2)]), fp.StandardNormal(2)).to(GPU)
    x = flow.sample(50)
    assert bool(flow.support.check(x).all()) and flow.log_prob(x).device.type == "cuda"


def test_mixed_devices_are_refused_by_name() -> None:
    flow = small_flow("nsf", 3, 2).to(GPU)
    with pytest.raises(ValueError, match="Flow is on cuda:0, got x on cpu; move one with .to"):
        flow.log_prob(torch.zeros(4, 3), torch.zeros(4, 2, device=GPU))
    with pytest.raises(ValueError, match="Flow is on cuda:0, got context on cpu; move one with .to"):
        flow.log_prob(torch.zeros(4, 3, device=GPU), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="got noise on cpu"):
        flow.sample(4, torch.zeros(2, device=GPU), noise=torch.zeros(4, 3))


@pytest.mark.parametrize("name", ["realnvp", "nsf", "gaussian"])
def test_parallel_flows_never_wait_for_the_device(name: str) -> None:
    """No `.item()`, no branch on data: density, draws and both gradients queue up without one synchronisation."""
    flow, x = small_flow(name, 4).to(GPU), torch.randn(64, 4, device=GPU)

    def step() -> None:
        _, log_q = flow.rsample_and_log_prob(64)
        (flow.log_prob(x).sum() + log_q.sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_default_device_builds_there() -> None:
    torch.set_default_device(GPU)
    try:
        flow = fp.nsf_autoregressive(4, 2, hidden_features=HIDDEN, transforms=2)
        assert flow.sample(5, torch.zeros(2)).device.type == "cuda"
    finally:
        torch.set_default_device(None)
    assert all(t.device.type == "cuda" for t in (*flow.parameters(), *flow.buffers()))


@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_no_tensor_stays_behind(name: str) -> None:
    flow = small_flow(name, 4, 2).to(GPU)
    assert all(t.device.type == "cuda" for t in (*flow.parameters(), *flow.buffers()))
    flow.cpu()
    assert flow.sample(2, torch.zeros(2)).device.type == "cpu"


def test_saved_on_the_device_and_loaded_on_the_cpu(tmp_path: Path) -> None:
    flow = fp.nsf(3, hidden_features=HIDDEN, transforms=2).to(GPU)
    nn.init.normal_(next(flow.parameters()))
    x = torch.randn(8, 3)
    fp.save(flow, tmp_path / "flow.safetensors")
    loaded = fp.load(tmp_path / "flow.safetensors")
    assert next(loaded.parameters()).device.type == "cpu"
    assert torch.allclose(loaded.log_prob(x), flow.log_prob(x.to(GPU)).cpu(), atol=1e-4)


def test_fit_runs_on_the_device_and_returns_the_flow_there() -> None:
    flow = fp.nsf(2, hidden_features=HIDDEN, transforms=2)
    x = normal(512, 2, dtype=torch.float32) * 0.3 + 1.0
    result = fp.fit(flow, x, epochs=3, seed=0, device="cuda", progress=False)
    assert next(result.flow.parameters()).device.type == "cuda"
    assert bool(result.flow.log_prob(x.to(GPU)).isfinite().all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["one graph", "compiled"])
@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_one_graph_of_a_step_on_the_device(name: str, compiled: bool) -> None:
    """Compiled, its gradients lie in the static buffers of a CUDA graph: each step's must be read before the next."""
    flow = small_flow(name, 3).double().to(GPU)
    objective = fp.MaximumLikelihood(flow)
    step = JointStep(objective, (normal(64, 3).to(GPU),))
    if compiled:
        step.compile((normal(64, 3).to(GPU),))
    for seed in range(4):
        x = normal(64, 3, seed=seed).to(GPU)
        loss = step((x,))
        found = [p.grad.clone() for p in flow.parameters() if p.grad is not None]
        flow.zero_grad()
        expected = objective(x)
        expected.backward()
        assert torch.allclose(loss, expected, atol=1e-8)
        for got, p in zip(found, [p for p in flow.parameters() if p.grad is not None], strict=True):
            assert torch.allclose(got, p.grad, atol=1e-8)  # type: ignore[arg-type]
        flow.zero_grad()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_compiled_on_the_device(name: str) -> None:
    flow, x = small_flow(name, 4).to(GPU), torch.randn(64, 4, device=GPU)
    validate = Distribution._validate_args
    try:
        compiled = torch.compile(flow.log_prob, fullgraph=True)
        assert torch.allclose(compiled(x), flow.log_prob(x), atol=1e-4)
    finally:
        torch._dynamo.reset()
        Distribution.set_default_validate_args(validate)


def _hierarchy(y: torch.Tensor) -> None:
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize("when", ["follows", "before", "after"])
def test_auto_flow_is_on_the_device(when: str, pyro_store: None) -> None:
    y = normal(8).to(GPU if when != "after" else "cpu")
    guide = fp.svi.AutoFlow(_hierarchy, transforms=2, hidden_features=HIDDEN)
    guide = guide.to(GPU) if when == "before" else guide
    guide.setup(y)
    guide = guide.to(GPU) if when == "after" else guide
    assert {p.device.type for p in guide.parameters()} == {"cuda"}
    elbo = fp.svi.PathELBO(num_particles=4, vectorize_particles=True)
    svi = pyro.infer.SVI(_hierarchy, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    losses = [svi.step(y.to(GPU)) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    draws = guide.sample(10)
    assert draws["theta"].device.type == "cuda" and guide.log_prob(draws).shape == (10,)
    assert guide.median()["mu"].device.type == "cuda"


def test_amortized_flow_is_on_the_device(pyro_store: None) -> None:
    x = normal(40, 2).to(GPU)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=10, device=x.device) as i:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])

    guide = fp.svi.AmortizedFlow(model, nn.Linear(2, 4).double().to(GPU), transforms=2, hidden_features=HIDDEN)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), fp.svi.PathELBO(num_particles=2))
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) and guide.sample(3, x)["z"].device.type == "cuda"


def test_dreg_on_the_device(pyro_store: None) -> None:
    y = normal(8).to(GPU)
    guide = fp.svi.AutoFlow(_hierarchy, transforms=2, hidden_features=HIDDEN).setup(y)
    found = fp.svi.DRegELBO(4).loss_and_grads(_hierarchy, guide, y)
    assert torch.isfinite(torch.tensor(found)) and all(p.grad is not None for p in guide.flow.parameters())


def test_a_training_step_can_be_captured_as_a_cuda_graph() -> None:
    """No synchronisation and no new shape: a replayed step leaves the weights that a plain one leaves."""
    plain = fp.nsf(2, hidden_features=HIDDEN, transforms=2, whiten="none").to(GPU)
    captured = copy.deepcopy(plain)
    x, ends = torch.randn(64, 2, device=GPU), []
    for flow in (plain, captured):
        adam = torch.optim.Adam(flow.parameters(), lr=1e-3, capturable=True)

        def step(flow: fp.Flow = flow, adam: torch.optim.Adam = adam) -> None:
            adam.zero_grad(set_to_none=False)
            (-flow.log_prob(x).mean()).backward()
            adam.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if flow is captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graph.replay()
            graph.replay()
        else:
            step()
            step()
        ends.append([p.detach().clone() for p in flow.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends, strict=True))


def test_autocast_keeps_the_log_density() -> None:
    flow, x = rough_flow("nsf", 4).float().to(GPU), torch.randn(200, 4, device=GPU)
    exact = flow.log_prob(x)
    with torch.autocast("cuda", torch.bfloat16):
        low = flow.log_prob(x)
    assert low.dtype == torch.float32
    assert float((low - exact).abs().mean()) < 5e-2
