"""Layers recomputed in the backward pass, chunks, low precision: the same numbers for less memory or time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flowpath as fp
from flowpath.training import front

NAMES = ("realnvp", "nsf", "maf", "iaf", "nsf_autoregressive")
architectures = pytest.mark.parametrize("name", NAMES)
HIDDEN = (16, 16)


def rough(name: str, features: int = 4, context: int = 0, scale: float = 0.3, **options: object) -> fp.Flow:
    """An architecture whose weights are no longer those of the identity."""
    flow = getattr(fp, name)(features, context, hidden_features=HIDDEN, **options)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(scale * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    return flow


def losses(flow: fp.Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """Density and draws, the noise held."""
    drawn, log_q = flow.rsample_and_log_prob(() if context is not None else len(x), context, noise=x)
    return flow.log_prob(x, context).mean() + drawn.sin().mean() + log_q.mean()


def gradients(flow: fp.Flow, loss: Callable[[], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # for dropout
    return list(torch.autograd.grad(loss(), list(flow.parameters()), materialize_grads=True))


# --- checkpoint_layers --------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["plain", "dropout"])
def test_gradients_are_the_same_bit_for_bit(name: str, context: int, dropout: float) -> None:
    flow, x = rough(name, context=context, dropout=dropout), torch.randn(8, 4)
    c = torch.randn(8, context) if context else None
    with torch.random.fork_rng(devices=[]):
        found = []
        for flow.checkpoint_layers in (False, True):
            found.append(gradients(flow, lambda: losses(flow, x, c)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(bool(g.any()) for g in found[0])


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """What the graph of a loss holds, storage by storage."""
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    assert value.requires_grad
    return sum(held.values())


def test_the_graph_keeps_a_seventh() -> None:
    flow, x = rough("nsf", 6, transforms=8, whiten="none"), torch.randn(500, 6)
    plain = kept_bytes(lambda: flow.log_prob(x).mean())
    flow.checkpoint_layers = True
    assert kept_bytes(lambda: flow.log_prob(x).mean()) < plain / 7


def test_second_derivatives_go_through() -> None:
    flow, found = rough("nsf").double(), []
    for flow.checkpoint_layers in (False, True):
        x = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).view(2, 4).requires_grad_()
        (slope,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
    assert torch.allclose(*found)


def test_fit_obeys_and_gives_the_same() -> None:
    x, found = torch.randn(300, 3).cumsum(-1), []
    start = fp.nsf(3, hidden_features=HIDDEN, transforms=2)
    for checkpointed in (False, True):
        flow = copy.deepcopy(start)
        result = fp.fit(flow, x, steps=6, seed=0, progress=False, compile=False, checkpoint_layers=checkpointed)
        assert flow.checkpoint_layers is False  # a setting of the fit, not of the flow
        found.append(result.flow.log_prob(x))
    assert torch.equal(*found)


# --- torch.autocast -----------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("context", [0, 2], ids=["free", "context"])
def test_autocast_keeps_the_log_density(name: str, context: int) -> None:
    """Within 1e-2 nats on average, a hundredth of a nat; hidden layers alone run low."""
    flow, x = rough(name, 5, context), torch.randn(200, 5)
    c = torch.randn(200, context) if context else None
    exact = flow.log_prob(x, c)
    with torch.autocast("cpu", torch.bfloat16):
        low = flow.log_prob(x, c)
        drawn, log_q = flow.rsample_and_log_prob(() if context else 50, c)
        (losses(flow, x, c)).backward()
    assert low.dtype == drawn.dtype == log_q.dtype == torch.float32
    assert float((low - exact).abs().mean().detach()) < 1e-2
    assert torch.equal(low, exact) == (name == "iaf")  # its density is the sequential direction, which stays exact
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in flow.parameters())


@pytest.mark.parametrize(
    "layer",
    [fp.LU(4), fp.Householder(4), fp.TriangularAffine(4), fp.Permutation.reverse(4)],
    ids=lambda t: type(t).__name__,
)
def test_linear_layers_stay_exact_under_autocast(layer: fp.Transform) -> None:
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(20, 4)
    z, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], z)
        assert torch.equal(layer.inverse(z)[0], layer.inverse(z)[0].float())
        assert layer.inverse(z)[0].dtype == torch.float32


def test_conditioners_do_run_low() -> None:
    net, seen = fp.MLP(3, 2, num_params=5, hidden_features=(8, 8), activation=Watch), []
    net.activation.seen = seen
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(7, 3)).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.bfloat16]


class Watch(nn.Tanh):
    seen: list[torch.dtype]

    def forward(self, h: Tensor) -> Tensor:
        self.seen.append(h.dtype)
        return super().forward(h)


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.fixture
def compiles(fresh_compiler: None) -> list[int]:
    """A list that grows by one with every compilation of the backend `counting`."""
    return []


@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_one_compilation_serves_every_batch_size(name: str, compiles: list[int]) -> None:
    flow = rough(name)

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiles.append(len(inputs))
        return graph.forward

    run = torch.compile(flow.log_prob, backend=counting, dynamic=True, fullgraph=True)
    for n in (7, 64, 5, 1000, 33):
        x = torch.randn(n, 4)
        assert torch.allclose(run(x), flow.log_prob(x), atol=1e-4)
    assert len(compiles) == 1


# --- chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_scores_do_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = rough("nsf", 3).double(), torch.randn(150, 3, dtype=torch.float64)
    whole = flow.log_prob(x).detach()
    monkeypatch.setattr(front, "_CHUNK", chunk)  # of the whitening
    scores = fp.log_prob(flow, x, batch_size=chunk)
    assert torch.allclose(torch.as_tensor(scores), whole, rtol=1e-12, atol=1e-12)
