"""fit with compile=...: the same fit as without, or plain running and a word why."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowpath as fp
from flowpath.objectives import MaximumLikelihood
from flowpath.tracing import Traced
from flowpath.tracing.compiler import has_compiler
from flowpath.training import compiling, joint
from flowpath.training.compiling import Runner

CPU = torch.device("cpu")
X = 10 + 3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are: all of compiling but the compiler, which takes its time."""
    monkeypatch.setattr(Traced, "compiled", lambda traced, inputs: traced.run)
    monkeypatch.setattr(compiling, "has_compiler", lambda device: True)


def quick(flow: Any = "gaussian", **options: Any) -> fp.FitResult:
    return fp.fit(flow, X, **{"seed": 0, "epochs": 2, "batch_size": 32, **options})


def weights_of(flow: fp.Flow) -> Tensor:
    return torch.cat([t.double().flatten() for t in flow.state_dict().values()])


def drop_out() -> fp.Flow:
    return fp.nsf(2, transforms=2, hidden_features=(8,), bins=4, dropout=0.3)


def normalised() -> fp.Flow:
    return fp.Flow(fp.Chain([fp.ActNorm(2), fp.Permutation.reverse(2), fp.LU(2)]), fp.StandardNormal(2))


class Scaled(nn.Module):
    """A loss with one parameter, which `seen` may look at or change."""

    def __init__(self, seen: Callable[[Scaled, Tensor], float] | None = None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.calls, self.seen = 0, seen

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        factor = 1.0 if self.seen is None else self.seen(self, x)
        return (self.a * x).square().mean() * factor


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is taken for one that a graph may hold."""
    monkeypatch.setattr(compiling, "is_known", lambda objective: True)


def gradient(runner: Runner, model: nn.Module, *batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = runner(*batch)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# --- the same fit ---


@pytest.mark.skipif(not has_compiler(CPU), reason="needs a C++ compiler")
def test_compiled_fit_follows_the_plain_one() -> None:
    compiled, plain = (quick(compile=mode, epochs=None, steps=6) for mode in (True, False))
    assert compiled.compiled and not plain.compiled
    assert torch.allclose(weights_of(compiled.flow), weights_of(plain.flow), atol=1e-5)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    "options",
    [
        {"flow": drop_out},
        {"flow": lambda: fp.maf(2, transforms=2, hidden_features=(8,)), "weights": torch.linspace(0, 1, 200)},
        {"flow": lambda: fp.nsf(2, 1, transforms=2, hidden_features=(8,)), "context": X[:, :1].sin()},
        {"flow": normalised},
    ],
    ids=["dropout", "weights", "context", "activation normalisation"],
)
def test_one_graph_gives_the_same_fit(options: dict[str, Any]) -> None:
    made = options.pop("flow")
    fits = []
    for mode in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            flow = made()
        fits.append(quick(flow, compile=mode, clip=5.0, **options))
    assert fits[0].compiled
    assert fits[0].history[-1]["train"] == pytest.approx(fits[1].history[-1]["train"], abs=1e-4)
    assert torch.allclose(weights_of(fits[0].flow), weights_of(fits[1].flow), atol=1e-4)


@pytest.mark.usefixtures("untouched")
def test_the_plain_gradients_whatever_the_batch() -> None:
    flow = fp.nsf(2, transforms=2, hidden_features=(8,), bins=4)
    goal = MaximumLikelihood(flow)
    compiled, plain = Runner(goal, True, CPU), Runner(goal, False, CPU)
    for n in (16, 16, 16, 5, 16, 7, 7):
        x = torch.randn(n, 2) * (n / 8)
        for a, b in zip(gradient(compiled, goal, x), gradient(plain, goal, x), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


# --- where one graph will not do ---


@pytest.fixture
def by_torch(untouched: None, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that torch.compile is given."""
    given: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: given.append(module) or (lambda *batch: module(*batch)))  # type: ignore[func-returns-value]
    return given


@pytest.mark.usefixtures("taken")
def test_an_objective_that_looks_at_values_goes_through_torch_compile(by_torch: list[nn.Module]) -> None:
    model = Scaled(lambda m, x: 1.0 if x.sum() > 0 else 2.0)
    runner = Runner(model, True, CPU)
    for _ in range(3):
        runner(torch.ones(3))
    assert by_torch == [model] and runner.compiled


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


def normal_base() -> fp.Flow:
    flat = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    return fp.Flow(fp.LU(2), torch.distributions.Independent(flat, 1))


def hooked(where: str) -> nn.Module:
    goal = fp.MaximumLikelihood(fp.realnvp(2, transforms=1, hidden_features=(4,)))
    if where == "parameter":
        next(goal.parameters()).register_hook(lambda g: 3 * g)
    elif where == "module":
        goal.flow.transform.register_forward_hook(lambda *_: None)
    return goal


@pytest.mark.parametrize(
    "made",
    [
        lambda: hooked("parameter"),
        lambda: hooked("module"),
        lambda: fp.MaximumLikelihood(normal_base()),
        lambda: fp.MaximumLikelihood(fp.nsf(2, transforms=1, hidden_features=(4,), activation=Softened)),
    ],
    ids=["a hook on a parameter", "a hook on a module", "a base from outside", "a module from outside"],
)
def test_what_a_graph_may_not_hold_goes_through_torch_compile(
    made: Callable[[], nn.Module], by_torch: list[nn.Module]
) -> None:
    model = made()
    runner = Runner(model, True, CPU)
    for _ in range(3):
        model.zero_grad()
        runner(torch.ones(3, 2))
    assert by_torch == [model]


class Softened(nn.Module):
    """An activation that NumPy has a part in: what it did to one batch is no function of the next."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.tanh(x.detach().numpy()))


def test_fit_target_goes_through_torch_compile(by_torch: list[nn.Module]) -> None:
    """Its estimators keep state in Python."""
    normal = torch.distributions.Normal(0.0, 1.0)
    fp.fit_target("gaussian", lambda x: normal.log_prob(x).sum(-1), features=2, steps=4, compile=True)
    assert len(by_torch) == 1


@pytest.mark.usefixtures("untouched", "taken")
def test_state_in_python_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_CHECK", 4)
    model = Scaled(lambda m, x: 1.0 if m.calls < 5 else 2.0)
    runner = Runner(model, True, CPU)
    with pytest.warns(UserWarning, match="is not the step: its loss is 4 where the plain") as caught:
        for _ in range(40):
            loss = runner(torch.ones(3))
    assert loss.item() == 8.0 and len(caught) == 1 and not runner.compiled


@pytest.mark.usefixtures("untouched")
def test_a_compiler_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(traced: Traced, inputs: Any) -> Callable[[list[Tensor]], list[Any]]:
        return lambda tensors: [2 * r for r in traced.run(tensors)]

    monkeypatch.setattr(Traced, "compiled", off)
    with pytest.warns(UserWarning, match="the graph of the step is not the step"):
        result = quick(compile=True)
    assert not result.compiled and result.skipped == 0


# --- no compiler, or one that fails ---


def test_without_a_compiler_it_warns_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)
    with pytest.warns(UserWarning, match="without torch.compile: there is no compiler"):
        assert not quick(compile=True).compiled


def _fails(*_: Any) -> Any:
    raise RuntimeError("no such backend")


@pytest.mark.parametrize("late", [True, False], ids=["when it runs", "at once"])
@pytest.mark.parametrize("hooked", [True, False], ids=["by torch.compile", "one graph"])
def test_failed_compilation_falls_back_with_one_warning(
    late: bool, hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([None, None])  # the first call of the step is the comparison with plain running

    def fails_then(traced: Traced, inputs: Any) -> Any:
        return lambda tensors: traced.run(tensors) if next(calls, "failed") is None else _fails()

    monkeypatch.setattr(Traced, "compiled", fails_then if late else _fails)
    monkeypatch.setattr(torch, "compile", lambda module: _fails if late else _fails())
    monkeypatch.setattr(compiling, "has_compiler", lambda device: True)
    flow = fp.nsf(2, transforms=1, hidden_features=(8,))
    if hooked:
        next(flow.parameters()).register_hook(lambda g: g)
    with pytest.warns(UserWarning, match="compilation failed: RuntimeError: no such backend") as caught:
        result = quick(flow, compile=True)
    assert len(caught) == 1 and not result.compiled and result.skipped == 0


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("pace", "compiled"), [(1.0, True), (1e-3, False)], ids=["long", "short"])
def test_auto_compiles_where_it_pays(pace: float, compiled: bool) -> None:
    runner = Runner(nn.Linear(1, 1), "auto", CPU)
    for step in range(1, 100):
        runner.observe(step, pace * step, step / 1000)
    assert (runner._wanted == "compiled") is compiled


# --- graphs that are not compiled ---


def watched(model: nn.Module, batch: Tensor, steps: int, pace: float = 1.0, **options: Any) -> Runner:
    """A runner after steps of such a pace, of which a thousand are to come in all."""
    runner = Runner(model, "auto", CPU, **options)
    for step in range(1, steps + 1):
        model.zero_grad()
        runner(batch)
        runner.observe(step, pace * step, step / 1000)
    return runner


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)


@pytest.mark.usefixtures("untouched", "taken")
@pytest.mark.parametrize("quicker", [True, False])
def test_auto_keeps_the_quicker_of_the_two(quicker: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: quicker)
    model = Scaled()
    runner = watched(model, torch.ones(3), steps=99)
    assert float(model.a.grad) == 4.0 and runner.compiled is quicker  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_compiler", "taken")
@pytest.mark.parametrize(("pace", "graph"), [(0.1, True), (0.01, False)], ids=["long", "short"])
def test_auto_runs_a_long_fit_as_a_graph(pace: float, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: True)
    model = Scaled()
    watched(model, torch.ones(3), steps=80, pace=pace)
    assert (model.calls < 60) is graph
    assert float(model.a.grad) == 4.0  # type: ignore[arg-type]


FLOWS = {
    "spline coupling": lambda: fp.nsf(5, transforms=3, hidden_features=(16,)),
    "with a context": lambda: fp.nsf(3, 2, transforms=2, hidden_features=(16,)),
    "affine autoregressive": lambda: fp.maf(5, transforms=2, hidden_features=(16,)),
    "spline autoregressive": lambda: fp.nsf_autoregressive(3, transforms=2, hidden_features=(16,)),
    "affine coupling": lambda: fp.realnvp(4, transforms=2, hidden_features=(16,)),
    "dropout": drop_out,
    "activation normalisation": normalised,
}


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("made", [pytest.param(make, id=name) for name, make in FLOWS.items()])
def test_a_graph_gives_the_plain_numbers_bit_for_bit(
    made: Callable[[], fp.Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: True)
    monkeypatch.setattr(compiling, "_TRACE_COST", 0.0)
    built = made().train()
    x = 2 * torch.randn(400, *built.event_shape)
    context = torch.randn(400, built.context) if built.context else None
    calls: list[int] = []
    real = joint.JointStep.__call__
    monkeypatch.setattr(joint.JointStep, "__call__", lambda self, batch: (calls.append(1), real(self, batch))[1])
    fits = []
    for mode in ("auto", False):
        flow = copy.deepcopy(built)
        fits.append(fp.fit(flow, x, context=context, seed=0, steps=80, batch_size=64, compile=mode))
        assert len(calls) > 20
    graph, plain = fits
    assert torch.equal(weights_of(graph.flow), weights_of(plain.flow))
    assert [row["train"] for row in graph.history] == [row["train"] for row in plain.history]


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("watched_by", [None, lambda state: None], ids=["nobody", "a callback"])
def test_a_fit_with_callbacks_has_no_graph(watched_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may change anything between two steps."""
    made: list[int] = []
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: bool(made.append(1)))
    monkeypatch.setattr(compiling, "_TRACE_COST", 0.0)
    quick(epochs=None, steps=80, callbacks=[] if watched_by is None else [watched_by])
    assert len(made) == (1 if watched_by is None else 0)


@pytest.mark.usefixtures("no_compiler", "taken")
def test_a_graph_ends_where_its_parameters_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: True)
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0), Mean())
    runner = watched(model, torch.ones(3, 2), steps=70)
    model[0].bias.requires_grad_(False)
    model.zero_grad()
    runner(torch.ones(3, 2))
    assert model[0].bias.grad is None and model[0].weight.grad is not None


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.mark.usefixtures("no_compiler", "taken")
@pytest.mark.parametrize("seen", [lambda m, x: 1.0 if x.sum() > 0 else 2.0, lambda m, x: 1.0 + 1e-5 * (m.calls % 2)])
def test_auto_is_silent_where_no_graph_will_do(seen: Any, recwarn: pytest.WarningsRecorder) -> None:
    model = Scaled(seen)
    watched(model, torch.ones(3), steps=80)
    assert model.calls >= 80 and not recwarn.list


@pytest.mark.usefixtures("no_compiler", "taken")
def test_a_graph_that_goes_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "is_quicker", lambda new, old: True)
    monkeypatch.setattr(joint, "_CHECK", 4)
    model = Scaled(lambda m, x: 1.0 if m.calls < 56 else 2.0)
    with pytest.warns(UserWarning, match="without a graph of its step: Differs: .* its loss is 4 where") as caught:
        watched(model, torch.ones(3), steps=99)
    assert len(caught) == 1 and float(model.a.grad) == 8.0  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_compiler", "taken")
def test_a_batch_that_is_not_finite_puts_a_comparison_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_CHECK", 2)
    model = Scaled()
    step = joint.JointStep(model, (torch.ones(3),))
    step((torch.ones(3),))
    assert not step((torch.full((3,), math.nan),)).isfinite()
    model.zero_grad()
    assert float(step((torch.ones(3),))) == 4.0 and step._checks == 1
    with pytest.raises(joint.Differs, match="not finite"):
        joint.JointStep(model, (torch.full((3,), math.nan),))


def test_gradients_add_up_as_those_of_backward_do() -> None:
    model = Scaled()
    step = joint.JointStep(model, (torch.ones(3),))
    for _ in range(2):
        step((torch.ones(3),))
    assert float(model.a.grad) == 8.0  # type: ignore[arg-type]


def test_buffers_are_compared() -> None:
    class Mean(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return super().forward(x)

    normed = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1), Square())
    step = joint.JointStep(normed, (torch.randn(8, 2),))
    before = normed[0].running_mean.clone()  # type: ignore[union-attr, operator]
    step((torch.randn(8, 2) + 5,))
    assert bool((normed[0].running_mean > before).all())  # type: ignore[operator]
    with pytest.raises(joint.Differs, match="replaces buffers"):
        joint.JointStep(Mean(), (torch.randn(8),))


def test_graphs_are_made_in_several_threads(recwarn: pytest.WarningsRecorder) -> None:
    def make(seed: int) -> float:
        flow = fp.realnvp(2, transforms=1, hidden_features=(4,))
        return float(joint.JointStep(fp.MaximumLikelihood(flow), (torch.ones(4, 2),))((torch.ones(4, 2),)))

    validate = torch.distributions.Distribution._validate_sample
    with ThreadPoolExecutor(3) as pool:
        losses = list(pool.map(make, range(9)))
    assert len(losses) == 9
    assert not torch.compiler.is_compiling()
    assert torch.distributions.Distribution._validate_sample is validate
