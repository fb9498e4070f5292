"""Architectures: sizes, identity start, options, costs, and compilation of both directions."""

from __future__ import annotations

import inspect

import pytest
import torch
from registry import HIDDEN, each_architecture, normal, rough_flow, small_flow
from torch import Tensor, nn

import flowpath as fp
from flowpath.architectures import architectures
from flowpath.tracing.compiler import has_compiler

each_size = pytest.mark.parametrize("features", [1, 2, 5])
each_context = pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])


@each_architecture
@each_size
@each_context
def test_starts_as_its_base(name: str, features: int, context: int) -> None:
    """Identity at the start: untrained, every architecture is the standard normal it stands on."""
    flow, x = small_flow(name, features, context).double(), 2 * normal(4, features)
    c = normal(4, context) if context else None
    assert torch.allclose(flow.log_prob(x, c), flow.base.log_prob(x), atol=1e-6)
    assert flow.sample(3, c).shape == ((3, 4, features) if context else (3, features))


@each_architecture
@each_size
@each_context
def test_every_parameter_gets_a_gradient(name: str, features: int, context: int) -> None:
    """Of log_prob, at rough parameters; a single feature has no features before it to look at."""
    flow = rough_flow(name, features, context)
    flow.log_prob(normal(8, features), normal(8, context) if context else None).sum().backward()
    idle = [n for n, p in flow.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    if features == 1 and not context:
        idle = [n for n in idle if "conditioner" not in n]
    assert [n for n in idle if "lower" not in n and "upper" not in n] == []


def test_public_names_are_the_recipes() -> None:
    assert {getattr(fp, n) for n in architectures} == set(architectures.values())
    assert all(set(architectures) >= {n} for n in ("realnvp", "maf", "iaf", "nsf", "nsf_autoregressive", "gaussian"))


@each_architecture
def test_takes_the_common_arguments(name: str) -> None:
    parameters = inspect.signature(architectures[name]).parameters
    assert list(parameters)[:2] == ["features", "context"]
    assert {"hidden_features", "whiten"} <= set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])


@each_architecture
@pytest.mark.parametrize("whiten", ["diagonal", "full", "none"])
def test_whiten(name: str, whiten: str) -> None:
    flow = small_flow(name, 3, 2, whiten=whiten)
    first = flow.transform.transforms[0]  # type: ignore[index]
    assert isinstance(first, fp.Whiten) is (whiten != "none")
    assert isinstance(flow.embedding, fp.Standardize) is (whiten != "none")
    assert getattr(first, "mode", whiten) == whiten


@pytest.mark.parametrize(
    ("name", "forward", "inverse"),
    [
        ("realnvp", "parallel", "parallel"),
        ("nsf", "parallel", "parallel"),
        ("gaussian", "parallel", "parallel"),
        ("maf", "parallel", "sequential"),
        ("nsf_autoregressive", "parallel", "sequential"),
        ("iaf", "sequential", "parallel"),
    ],
)
def test_costs(name: str, forward: str, inverse: str) -> None:
    t = small_flow(name).transform
    assert (t.forward_cost, t.inverse_cost) == (forward, inverse)


@pytest.mark.parametrize("name", ["realnvp", "maf", "iaf", "nsf", "nsf_autoregressive"])
def test_options_reach_the_layers(name: str) -> None:
    flow = architectures[name](4, transforms=3, hidden_features=(7, 9), activation=nn.SiLU, dropout=0.25)
    nets = [m for m in flow.modules() if isinstance(m, fp.MLP | fp.MaskedMLP)]
    assert len(nets) == 3
    for net in nets:
        assert [layer.out_features for layer in net.hidden] == [7, 9]
        assert isinstance(net.activation, nn.SiLU) and net.dropout.p == 0.25


@pytest.mark.parametrize("name", ["nsf", "nsf_autoregressive"])
def test_spline_options(name: str) -> None:
    flow = architectures[name](3, bins=5, bound=2.5, hidden_features=HIDDEN)
    splines = [m for m in flow.modules() if isinstance(m, fp.RationalQuadratic)]
    assert splines and all(s.bins == 5 and s.box.high == 2.5 for s in splines)


@each_architecture
def test_two_builds_share_structure_and_seed_nothing(name: str) -> None:
    """Permutations are seeded on their own: two builds differ in weights alone."""
    a, b = small_flow(name, 5), small_flow(name, 5)
    for (n, x), (m, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert n == m and torch.equal(x, y)


@pytest.mark.parametrize("name", ["realnvp", "maf", "iaf", "nsf", "nsf_autoregressive"])
@pytest.mark.parametrize("features", [2, 5])
def test_every_feature_can_depend_on_every_other(name: str, features: int) -> None:
    """The mixing between layers leaves no feature out: the Jacobian has no structural zero."""
    flow = rough_flow(name, features, transforms=3)
    jacobian = torch.autograd.functional.jacobian(flow.to_noise, normal(features))
    assert bool((jacobian != 0).all())


# --- torch.compile -----------------------------------------------------------------------------------------------


def both_ways(flow: fp.Flow) -> tuple[nn.Module, nn.Module]:
    """log_prob of data, and draws with their density from given noise, as modules to compile."""

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.flow.log_prob(x, context)

    class Draw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.flow.rsample_and_log_prob(noise.shape[0] if context is None else (), context, noise=noise)

    return Score(), Draw()


each_way = pytest.mark.parametrize("way", ["log_prob", "rsample"])


def outputs(module: nn.Module, *given: Tensor) -> list[Tensor]:
    out = module(*given)
    return [out] if isinstance(out, Tensor) else list(out)


@each_architecture
@each_way
def test_compiles_as_one_graph(name: str, way: str, fresh_compiler: None) -> None:
    module = both_ways(rough_flow(name, 2, 2))[way == "rsample"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = normal(4, 2), normal(4, 2, seed=1)
    with torch.no_grad():
        for got, want in zip(outputs(compiled, *given), outputs(module, *given), strict=True):
            assert torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize(("name", "way"), [("nsf", "log_prob"), ("maf", "rsample")])
def test_compiled_gradients(name: str, way: str, fresh_compiler: None) -> None:
    module = both_ways(rough_flow(name, 3))[way == "rsample"]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (module, compiled):
        loss = sum(out.sin().sum() for out in outputs(run, normal(4, 3)))
        grads.append(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_compiles_with_fresh_draws(fresh_compiler: None) -> None:
    flow = rough_flow("realnvp", 2)
    draw = torch.compile(lambda: flow.rsample_and_log_prob(4), fullgraph=True, backend="aot_eager")
    x, log_q = draw()
    assert torch.allclose(log_q, flow.log_prob(x), atol=1e-9)
    assert not torch.equal(x, draw()[0])


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="inductor needs a C++ compiler: g++ or clang++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_compiles_by_inductor(fresh_compiler: None) -> None:
    """Scoring a draw: both directions in one graph, by the compiler that users get."""
    flow = rough_flow("nsf", 2, transforms=1)

    def both(noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, log_q = flow.rsample_and_log_prob(noise.shape[0], noise=noise)
        return x, log_q, flow.log_prob(x + 0.1)

    with torch.no_grad():
        for got, want in zip(torch.compile(both, fullgraph=True)(normal(4, 2)), both(normal(4, 2)), strict=True):
            assert torch.allclose(got, want, atol=1e-9)


@pytest.mark.parametrize("name", ["maf", "iaf", "nsf_autoregressive"])
def test_one_feature_alone_maps_both_ways(name: str) -> None:
    """Every hidden unit then sees nothing, or the context alone."""
    for context in (0, 2):
        flow = getattr(fp, name)(1, context, hidden_features=(8,), transforms=2)
        for p in flow.parameters():
            nn.init.normal_(p, std=0.3)
        x, c = torch.randn(5, 1), torch.randn(5, context) if context else None
        assert torch.allclose(flow.to_data(flow.to_noise(x, c), c), x, atol=1e-4)
