"""nflows in flowpath, wrapped and rebuilt, and flowpath in nflows. The oracle is nflows itself."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from nflows import transforms as nt
from nflows.distributions.base import Distribution as NflowsDistribution
from nflows.distributions.mixture import MADEMoG
from nflows.distributions.normal import ConditionalDiagonalNormal, DiagonalNormal
from nflows.distributions.normal import StandardNormal as NflowsNormal
from nflows.flows import MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.flows.base import Flow as NflowsFlow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import flowpath as fp
from flowpath.interop import NflowsBase, NflowsTransform
from flowpath.interop.nflows_native import convert
from tests.registry import normal, rough_flow, roughen, small_flow

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Inputs to the softmax are not scaled down:UserWarning"),
]

D, C, H = 4, 3, 8
MASK = [1, 0, 1, 0]
Build = Callable[[], nn.Module]


def resnet(context: int = 0, **options: object) -> Callable[[int, int], nn.Module]:
    return lambda a, b: ResidualNet(a, b, hidden_features=H, context_features=context or None, **options)


class Net(nn.Module):
    """A user's own conditioner, without a `hidden_features`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer(x) if context is None else self.layer(x) + context.sum(-1, keepdim=True)


def rq(net: Callable[[int, int], nn.Module], mask: object = MASK, **options: object) -> nn.Module:
    return nt.PiecewiseRationalQuadraticCouplingTransform(
        mask, net, num_bins=4, tails="linear", tail_bound=3.0, **options
    )


def made(context: int = 0, features: int = D, **options: object) -> nn.Module:
    return nt.MaskedAffineAutoregressiveTransform(features, H, context or None, **options)


def rq_made(context: int = 0, **options: object) -> nn.Module:
    return nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        D, H, context or None, num_bins=4, tails="linear", tail_bound=3.0, **options
    )


def act_norm() -> nn.Module:
    t = nt.ActNorm(D)
    t.initialized.fill_(True)
    return t


def batch_norm() -> nn.Module:
    t = nt.BatchNorm(D)
    t.running_var.fill_(2.0)
    return t


PLAIN = {"use_residual_blocks": False}
# name -> (build, width of the context): those with a twin in flowpath
TWINS: dict[str, tuple[Build, int]] = {
    "rq-coupling": (lambda: rq(resnet()), 0),
    "rq-coupling-context": (lambda: rq(resnet(C)), C),
    "rq-coupling-unconditional": (lambda: rq(resnet(), apply_unconditional_transform=True), 0),
    "rq-coupling-batch-norm": (lambda: rq(resnet(C, use_batch_norm=True, activation=torch.tanh)), C),
    "rq-coupling-own-net": (lambda: rq(Net), 0),
    "rq-coupling-own-net-context": (lambda: rq(Net, [0, 1, 1, 0]), C),
    "rq-coupling-context-alone": (lambda: rq(resnet(C), [1, 1]), C),
    "rq-coupling-odd-activation": (lambda: rq(resnet(activation=lambda v: v.clamp(-1, 1))), 0),
    "affine-coupling": (lambda: nt.AffineCouplingTransform(MASK, resnet()), 0),
    "affine-coupling-context": (lambda: nt.AffineCouplingTransform(MASK, resnet(C)), C),
    "additive-coupling": (lambda: nt.AdditiveCouplingTransform(MASK, resnet()), 0),
    "maf": (lambda: made(), 0),
    "maf-context": (lambda: made(C, activation=F.elu), C),
    "maf-batch-norm": (lambda: made(use_batch_norm=True), 0),
    "maf-plain": (lambda: made(activation=nn.Tanh(), **PLAIN), 0),
    "maf-plain-random": (lambda: made(random_mask=True, **PLAIN), 0),
    "maf-plain-context": (lambda: made(C, use_batch_norm=True, **PLAIN), C),
    "maf-1": (lambda: made(features=1), 0),
    "rq-autoregressive": (lambda: rq_made(), 0),
    "rq-autoregressive-context": (lambda: rq_made(C), C),
    "rq-autoregressive-plain": (lambda: rq_made(**PLAIN), 0),
    "rq-elementwise": (lambda: nt.PiecewiseRationalQuadraticCDF([D], num_bins=4, tails="linear", tail_bound=3.0), 0),
    "lu": (lambda: nt.LULinear(D, identity_init=False), 0),
    "householder": (lambda: nt.HouseholderSequence(D, 4), 0),
    "permutation": (lambda: nt.RandomPermutation(D), 0),
    "reverse": (lambda: nt.ReversePermutation(D), 0),
    "act-norm": (act_norm, 0),
    "pointwise-affine": (lambda: nt.PointwiseAffineTransform(torch.arange(4.0), torch.arange(1.0, 5.0)), 0),
    "inverse": (lambda: nt.InverseTransform(made(C)), C),
    "composite": (lambda: nt.CompositeTransform([nt.IdentityTransform(), nt.LULinear(D), rq(resnet(C)), made(C)]), C),
    "nested": (lambda: nt.CompositeTransform([nt.CompositeTransform([made()]), nt.InverseTransform(rq_made())]), 0),
}
OTHERS: dict[str, tuple[Build, int]] = {
    "batch-norm": (batch_norm, 0),
    "qr": (lambda: nt.QRLinear(D, 3), 0),
    "svd": (lambda: nt.SVDLinear(D, 4), 0),
    "householder-odd": (lambda: nt.HouseholderSequence(D, 3), 0),
    "quadratic-coupling": (lambda: nt.PiecewiseQuadraticCouplingTransform(MASK, resnet(C), tails="linear"), C),
    "cubic-coupling": (lambda: nt.PiecewiseCubicCouplingTransform(MASK, resnet(), tails="linear"), 0),
    "leaky-relu": (nt.LeakyReLU, 0),
}
ALL = TWINS | OTHERS
each_twin = pytest.mark.parametrize("name", TWINS)
each_layer = pytest.mark.parametrize("name", ALL)


def layer(name: str) -> tuple[nn.Module, int]:
    """In float64 and eval mode, with rough parameters."""
    build, context = ALL[name]
    return roughen(build().double().eval(), 0.3), context


def width(name: str) -> int:
    return {"maf-1": 1, "rq-coupling-context-alone": 2}.get(name, D)


def worst(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


@each_layer
def test_wrapped_layer_is_nflows_layer_at_any_batch_shape(name: str) -> None:
    theirs, context = layer(name)
    t = fp.from_nflows(theirs, context=context)
    x, c = 1.5 * normal(2, 5, width(name)), normal(5, context, seed=4) if context else None
    rows = None if c is None else c.expand(2, 5, context).reshape(10, context)
    z, ladj = theirs(x.reshape(10, -1), rows)
    got, back = t(x, c), t.inverse(z.reshape(2, 5, -1), c)
    assert got[0].shape == x.shape and got[1].shape == back[1].shape == (2, 5)
    assert got[1].dtype == torch.float64
    assert worst((got[0].reshape(10, -1), got[1].reshape(10)), (z, ladj.double())) == 0.0
    assert worst(back, (x, -ladj.reshape(2, 5))) < 1e-6
    assert worst(t(x[0, 0], None if c is None else c[0]), (got[0][0, 0], got[1][0, 0])) < 1e-12
    empty = t(x[:, :0], None if c is None else c[:0])
    assert empty[0].shape == (2, 0, x.shape[-1]) and empty[1].shape == (2, 0)


@each_twin
def test_native_layer_is_nflows_layer(name: str) -> None:
    """Values, log-dets and gradients in data, noise and nflows' own weights, to 1e-10."""
    theirs, context = layer(name)
    ours, weights = convert(theirs, width(name), context)
    assert not any(isinstance(m, NflowsTransform) for m in ours.modules())
    x, noise = 1.5 * normal(20, width(name)), normal(20, width(name), seed=2)
    c = normal(20, context, seed=4).requires_grad_() if context else None
    given = c if ours.context else None
    for direction, value in (("forward", x.requires_grad_()), ("inverse", noise.requires_grad_())):
        a = functional_call(
            _Call(ours, direction), {f"t.{k}": w for k, w in weights.items()}, (value, given), tie_weights=False
        )
        b = getattr(theirs, direction)(value, given)
        assert worst(a, b) < 1e-10
        leaves = [value, *([] if given is None else [given]), *theirs.parameters()]
        grads = [
            torch.autograd.grad(
                y.cos().sum() + ladj.sum(), leaves, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            for y, ladj in (a, b)
            if y.requires_grad
        ]
        scale = max(1.0, *(float(g.abs().max()) for g in grads[1] if g.numel()))
        assert max((float((p - q).abs().max()) for p, q in zip(*grads, strict=True) if p.numel())) < 1e-10 * scale


class _Call(nn.Module):
    """A direction of a transform as a module's forward, which functional_call runs on given weights."""

    def __init__(self, t: fp.Transform, direction: str) -> None:
        super().__init__()
        self.t, self.direction = t, direction

    def forward(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return getattr(self.t, self.direction)(value, context)


@pytest.mark.parametrize("name", OTHERS)
def test_layer_without_twin_is_wrapped_as_a_copy(name: str) -> None:
    theirs, context = layer(name)
    t = fp.from_nflows(nt.CompositeTransform([theirs, nt.ReversePermutation(D)]), context=context, native=True)
    assert isinstance(t.transforms[0], NflowsTransform)
    assert not {id(p) for p in t.parameters()} & {id(p) for p in theirs.parameters()}
    x, c = normal(6, D), normal(6, context) if context else None
    assert worst(t(x, c), (lambda z, ladj: (z.flip(-1), ladj))(*theirs(x, c))) < 1e-12


@pytest.mark.parametrize("name", ["rq-coupling-context", "maf", "rq-coupling-own-net-context", "affine-coupling"])
@pytest.mark.parametrize("native", [False, True])
def test_layer_keeps_the_contract(name: str, native: bool) -> None:
    theirs, context = layer(name)
    t = fp.from_nflows(theirs, context=context, native=native)
    skip = {"vmap_is_loop"} if not native or "own" in name else set()
    if not native:
        skip.add("finite_far_out")  # nflows' own arithmetic: in float32 its spline's inverse can end in NaN far out
    fp.testing.check_transform(t, skip=skip)


# Flows.


def embedding() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C))


def composite(context: int = C) -> nn.Module:
    return nt.CompositeTransform([rq(resnet(context)), nt.LULinear(D), made(context)])


def conditional(encoder: Callable | None = None) -> nn.Module:
    return ConditionalDiagonalNormal([D], context_encoder=encoder)


# name -> (build, width of the context)
FLOWS: dict[str, tuple[Build, int]] = {
    "maf": (lambda: MaskedAutoregressiveFlow(D, H, 2, 2, batch_norm_between_layers=True), 0),
    "realnvp": (lambda: SimpleRealNVP(D, H, 2, 1), 0),
    "context": (lambda: NflowsFlow(composite(), NflowsNormal([D])), C),
    "embedding": (lambda: NflowsFlow(composite(), NflowsNormal([D]), embedding()), 5),
    "conditional-base": (lambda: NflowsFlow(composite(), conditional(nn.Linear(C, 2 * D)), embedding()), 5),
    "conditional-base-alone": (lambda: NflowsFlow(nt.LULinear(D), conditional()), 2 * D),
    "diagonal": (lambda: NflowsFlow(nt.LULinear(D), DiagonalNormal([D])), 0),
    "made-mixture": (lambda: NflowsFlow(composite(), MADEMoG(D, H, C, custom_initialization=True)), C),
}
each_flow = pytest.mark.parametrize("name", FLOWS)
each_kind = pytest.mark.parametrize("native", [False, True], ids=["wrapped", "native"])


def flow_and_rows(name: str) -> tuple[nn.Module, Tensor, Tensor | None]:
    build, context = FLOWS[name]
    theirs = roughen(build().double().eval(), 0.3)
    for buffer_name, buffer in theirs.named_buffers():
        if "running_var" in buffer_name:
            buffer.fill_(1.5)
    return theirs, normal(7, D), normal(7, context, seed=4) if context else None


@each_flow
@each_kind
def test_flow_scores_as_nflows_does(name: str, native: bool) -> None:
    theirs, x, c = flow_and_rows(name)
    flow = fp.from_nflows(theirs, native=native)
    assert flow.event_shape == (D,)
    want = theirs.log_prob(x, c)
    assert float((flow.log_prob(x, c) - want).detach().abs().max()) < 1e-10
    if c is not None:
        assert flow.log_prob(x[:, None], c).shape == (7, 7)
        with pytest.raises(ValueError, match="expects a context with"):
            flow.log_prob(x)


@each_flow
@each_kind
def test_flow_samples_what_it_scores(name: str, native: bool) -> None:
    theirs, _, c = flow_and_rows(name)
    flow = fp.from_nflows(theirs, native=native)
    if name == "made-mixture":  # nflows' own cannot sample in float64
        flow, c = flow.float(), c.float()
    draws, log_q = flow.rsample_and_log_prob((2,), c)
    assert draws.shape == ((2, D) if c is None else (2, 7, D)) and draws.dtype == log_q.dtype == flow.base.like.dtype
    assert float((flow.log_prob(draws, c) - log_q).detach().abs().max()) < (1e-3 if name == "made-mixture" else 1e-8)
    assert flow.sample((), c).isfinite().all()
    generator = torch.Generator().manual_seed(1)
    one = flow.sample(3, c, generator=generator)
    assert torch.equal(one, flow.sample(3, c, generator=generator.manual_seed(1)))


@each_flow
def test_native_flow_maps_noise_as_nflows_does(name: str) -> None:
    theirs, noise, c = flow_and_rows(name)
    flow = fp.from_nflows(theirs, native=True)
    embedded = None if c is None else theirs._embedding_net(c)
    want = theirs._transform.inverse(noise, embedded)[0]  # some of it millions away, hence relative
    torch.testing.assert_close(flow.to_data(noise, c), want, rtol=1e-10, atol=1e-10)


def test_native_flow_shares_nothing_and_keeps_modes_dtype_and_frozen_weights() -> None:
    theirs = NflowsFlow(composite(), NflowsNormal([D]), embedding()).train()
    theirs._transform._transforms[1].eval()
    theirs._transform._transforms[1].bias.requires_grad_(False)
    before = torch.get_rng_state()
    flow = fp.from_nflows(theirs, native=True)
    assert torch.equal(before, torch.get_rng_state())
    assert not {p.data_ptr() for p in flow.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    lu = flow.transform.transforms[1]
    assert flow.training and flow.transform.transforms[0].training and not lu.training
    assert [n for n, p in flow.named_parameters() if not p.requires_grad] == ["transform.transforms.1.bias"]
    x, c = torch.randn(5, D), torch.randn(5, 5)
    assert float((flow.log_prob(x, c) - theirs.log_prob(x, c)).detach().abs().max()) < 1e-4


def test_wrapped_flow_trains_the_nflows_flow() -> None:
    theirs = NflowsFlow(composite(0), NflowsNormal([D]))
    flow = fp.from_nflows(theirs)
    flow.log_prob(torch.randn(5, D)).sum().backward()
    assert all(p.grad is not None for p in theirs.parameters())


def test_native_flow_is_saved_without_nflows(tmp_path) -> None:
    theirs = roughen(NflowsFlow(composite(), NflowsNormal([D])).eval(), 0.3)
    flow = fp.from_nflows(theirs, native=True)
    again = fp.load(fp.save(flow, tmp_path))
    x, c = torch.randn(5, D), torch.randn(5, C)
    assert torch.equal(again.log_prob(x, c), flow.log_prob(x, c))


def test_wrapped_flow_is_not_saved_and_says_which_part(tmp_path) -> None:
    flow = fp.from_nflows(NflowsFlow(nt.QRLinear(D, 2), NflowsNormal([D])))
    with pytest.raises(TypeError, match="flow.transform is a NflowsTransform, which is not registered"):
        fp.save(flow, tmp_path)


@each_kind
def test_wrapped_and_native_flows_fit_and_sample(native: bool) -> None:
    flow = fp.from_nflows(NflowsFlow(composite(0), NflowsNormal([D])), native=native)
    result = fp.fit(flow, torch.randn(200, D), epochs=2, seed=0, device="cpu")
    assert result.flow.sample(5).isfinite().all()


def test_context_of_images_is_passed_flat() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, C))
    theirs = NflowsFlow(composite(), NflowsNormal([D]), net)
    flow = fp.from_nflows(theirs, context=(1, 6, 6))
    x, images = torch.randn(5, D), torch.randn(5, 1, 6, 6)
    assert torch.allclose(flow.log_prob(x, images.flatten(1)), theirs.log_prob(x, images))
    assert flow.sample((2,), images.flatten(1)).shape == (2, 5, D)


def test_images_through_a_multiscale_flow() -> None:
    squeeze = nt.MultiscaleCompositeTransform(2)
    for shape in ((4, 2, 2), (2, 2, 2)):
        squeeze.add_transform(nt.OneByOneConvolution(shape[0]), shape)
    theirs = NflowsFlow(nt.CompositeTransform([nt.SqueezeTransform(), squeeze]), NflowsNormal([16])).double()
    flow = fp.from_nflows(theirs, features=(1, 4, 4))
    x = normal(2, 3, 1, 4, 4)
    assert flow.event_shape == (1, 4, 4) and flow.transform.noise_shape == (16,)
    want = theirs.log_prob(x.flatten(0, 1)).reshape(2, 3)
    assert float((flow.log_prob(x) - want).detach().abs().max()) < 1e-12
    assert flow.sample(2).shape == (2, 1, 4, 4)


def test_copies_of_a_newer_nflows_are_not_trusted_blindly() -> None:
    """A layer of the same name that computes something else is wrapped, not rebuilt wrongly."""

    def newer(self: nn.Module, params: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(params[:, 2:]) + 1e-3, params[:, :2]

    theirs, _ = layer("affine-coupling")
    kind = type("AffineCouplingTransform", (nt.AffineCouplingTransform,), {"_scale_and_shift": newer})
    kind.__module__ = "glasflow.nflows.transforms.coupling"
    theirs.__class__ = kind
    t = fp.from_nflows(theirs, native=True)
    assert isinstance(t, NflowsTransform)


class Stack(nt.CompositeTransform):
    """As users write them."""

    def __init__(self) -> None:
        super().__init__([nt.LULinear(D), made()])


class Louder(nt.LULinear):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, ladj = super().forward(inputs, context)
        return 2.0 * z, ladj + D * torch.log(torch.tensor(2.0))


def test_subclasses_are_rebuilt_where_they_change_nothing() -> None:
    assert [type(t) for t in fp.from_nflows(Stack(), native=True).transforms] == [fp.LU, fp.MaskedAutoregressive]
    assert isinstance(fp.from_nflows(Louder(D), native=True), NflowsTransform)


def test_transforms_of_ours_inside_are_kept() -> None:
    inner = fp.LU(D).double()
    t = fp.from_nflows(nt.CompositeTransform([inner, nt.InverseTransform(inner)]), native=True)
    x = normal(5, D)
    assert worst(t(x), (x, torch.zeros(5, dtype=x.dtype))) < 1e-12


# Into nflows.


def test_from_nflows_undoes_to_nflows() -> None:
    flow = small_flow("nsf")
    assert fp.from_nflows(fp.to_nflows(flow)) is flow


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["nsf", "maf", "gaussian"])
def test_flow_of_ours_as_nflows(name: str, context: int) -> None:
    flow = rough_flow(name, 3, context)
    theirs = fp.to_nflows(flow)
    assert isinstance(theirs, NflowsFlow)
    x, c = normal(5, 3), normal(5, context, seed=4) if context else None
    assert torch.equal(theirs.log_prob(x, c), flow.log_prob(x, c))
    assert torch.equal(theirs.transform_to_noise(x, c), flow.to_noise(x, c))
    lead = (4,) if c is None else (5, 4)
    draws, log_q = theirs.sample_and_log_prob(4, c)
    assert draws.shape == (*lead, 3) and log_q.shape == lead and draws.requires_grad
    assert torch.allclose(flow.log_prob(draws, None if c is None else c[:, None]), log_q, atol=1e-8)
    assert theirs.sample(5, c, batch_size=2).shape == ((5, 3) if c is None else (5, 5, 3))


@pytest.mark.parametrize("context", [0, 2])
def test_parts_that_others_reach_for_give_the_density(context: int) -> None:
    """nflows' own Flow, assembled from the parts, is the same density; so do sbi and nessai use them."""
    flow = rough_flow("nsf", 3, context)
    if context:
        flow = fp.Flow(flow.transform, flow.base, fp.Standardize(2).set_from(normal(50, 2) + 1.0))
    ours = fp.to_nflows(flow)
    theirs = NflowsFlow(ours._transform, ours._distribution, ours._embedding_net)
    x, c = normal(5, 3), normal(5, context, seed=4) if context else None
    assert torch.allclose(theirs.log_prob(x, c), ours.log_prob(x, c), atol=1e-12)
    draws, log_q = theirs.sample_and_log_prob(4, c)
    rows = None if c is None else c.repeat_interleave(4, 0)
    assert torch.allclose(ours.log_prob(draws.reshape(-1, 3), rows), log_q.reshape(-1), atol=1e-8)
    z, log_p = ours.forward_and_log_prob(x, c)
    assert torch.allclose(log_p, ours.log_prob(x, c)) and torch.allclose(ours.inverse(z, c)[0], x)
    assert ours.base_distribution_log_prob(ours.sample_latent_distribution(4, c)[0], None).isfinite().all()


def test_conditional_base_of_ours_in_nflows() -> None:
    flow = roughen(fp.Flow(fp.LU(3), fp.DiagonalNormal(3, context=2)).double())
    c = normal(5, 2)
    draws, log_q = fp.to_nflows(flow).sample_and_log_prob(4, c)
    part = fp.to_nflows(flow)._distribution
    assert part.sample(4, c).shape == draws.shape == (5, 4, 3)
    assert torch.allclose(flow.log_prob(draws, c[:, None]), log_q)


def test_flow_of_ours_as_nflows_is_copied_pickled_and_trained() -> None:
    flow = small_flow("maf", 3, 2)
    ours = fp.to_nflows(flow)
    again, copied = pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)
    x, c = torch.randn(5, 3), torch.randn(5, 2)
    assert torch.equal(again.log_prob(x, c), ours.log_prob(x, c))
    assert torch.equal(copied.log_prob(x, c), ours.log_prob(x, c))
    assert set(ours.state_dict()) == {f"flow.{k}" for k in flow.state_dict()}
    ours.log_prob(x, c).sum().backward()
    assert all(p.grad is not None for p in flow.transform.parameters())


def nflows_sandwich(ours: fp.Transform, context: int) -> nn.Module:
    return nt.CompositeTransform([nt.InverseTransform(ours), made(context, features=3).double(), ours])


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["nsf", "maf", "iaf", "gaussian"])
def test_our_transform_runs_inside_nflows(name: str, context: int) -> None:
    ours = rough_flow(name, 3, context).transform
    flow = NflowsFlow(nflows_sandwich(ours, context), NflowsNormal([3]))
    x, c = normal(5, 3), normal(5, context, seed=4) if context else None
    z, ladj = flow._transform(x, c)
    back, down = flow._transform.inverse(z, c)
    assert worst((back, down), (x, -ladj)) < 1e-7
    want = -0.5 * z.square().sum(-1) - 1.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)) + ladj
    assert torch.allclose(flow.log_prob(x, c), want)
    draws, log_q = flow.float().sample_and_log_prob(4, None if c is None else c.float())
    assert draws.shape[-1] == 3 and log_q.isfinite().all()


# What is refused, and in which words.


class NoInverse(nt.Transform):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs, inputs.new_zeros(len(inputs))


class OneEach(NoInverse):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs, torch.zeros_like(inputs)


class Steep(NoInverse):
    """nflows' spline inverse ends so where bins are steep."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert (inputs > 1.0).all()
        return self(inputs)


def no_shape() -> NflowsDistribution:
    return NflowsDistribution()


REFUSED: dict[str, tuple[Callable[[], object], type, str]] = {
    "not-nflows": (lambda: fp.from_nflows(nn.Linear(2, 2)), TypeError, "got Linear, with no inverse"),
    "not-a-module": (lambda: fp.from_nflows("maf"), TypeError, "expects an nflows Transform or Flow; str is neither"),
    "ours": (lambda: fp.from_nflows(fp.LU(2)), TypeError, "LU is flowpath's already"),
    "a-distribution": (lambda: fp.from_nflows(NflowsNormal([2])), TypeError, "got StandardNormal"),
    "features": (lambda: fp.from_nflows(nt.Tanh(), features=0), ValueError, "expects features to be a whole number"),
    "context": (lambda: fp.from_nflows(nt.Tanh(), context=-1), ValueError, "expects context to be a whole number"),
    "domain": (
        lambda: fp.from_nflows(nt.CompositeTransform([nt.LULinear(2), nt.Logit()]))(torch.full((3, 2), 5.0)),
        ValueError,
        "Sigmoid of nflows got values from 5 to 5, some of them outside its domain",
    ),
    "inverse": (
        lambda: fp.from_nflows(NoInverse()).inverse(torch.zeros(1, 2)),
        ValueError,
        "NoInverse of nflows has no inverse",
    ),
    "inverse-in-training": (
        lambda: fp.from_nflows(nt.CompositeTransform([nt.BatchNorm(2)])).inverse(torch.zeros(1, 2)),
        ValueError,
        "BatchNorm of nflows has no inverse in training mode; call .eval() first",
    ),
    "assertion": (
        lambda: fp.from_nflows(Steep()).inverse(torch.zeros(1, 2)),
        ValueError,
        "Steep of nflows failed a check of its own, as its splines do where bins are steep; use fp.from_nflows(...",
    ),
    "log-det": (
        lambda: fp.from_nflows(OneEach())(torch.zeros(3, 2)),
        ValueError,
        "OneEach of nflows should return a log-det of shape (3,), one number a row, and returned (3, 2)",
    ),
    "width": (
        lambda: fp.from_nflows(nt.LULinear(3))(torch.zeros(5, 2)),
        ValueError,
        "NflowsTransform expects x with 3 features, got shape (5, 2)",
    ),
    "embedding": (
        lambda: fp.from_nflows(NflowsFlow(composite(), NflowsNormal([D]), nn.Conv2d(1, 1, 3))),
        ValueError,
        "cannot tell what context Conv2d, the embedding net, takes; pass context=",
    ),
    "embedding-context": (
        lambda: fp.from_nflows(NflowsFlow(composite(), NflowsNormal([D]), embedding()), context=4),
        ValueError,
        "a context of shape (4,) it does not take",
    ),
    "base-shape": (
        lambda: fp.from_nflows(NflowsFlow(nt.Tanh(), no_shape())),
        ValueError,
        "cannot tell the event shape of the base Distribution",
    ),
    "nothing": (
        lambda: fp.from_nflows(nt.CompositeTransform([nt.IdentityTransform()]), native=True),
        ValueError,
        "a CompositeTransform that does nothing; pass features=",
    ),
    "to-nflows": (lambda: fp.to_nflows(fp.LU(2)), TypeError, "got LU; nflows' containers take a Transform as it is"),
    "sample-none": (lambda: fp.to_nflows(small_flow("maf")).sample(0), TypeError, "num_samples must be a positive"),
    "batches": (
        lambda: fp.to_nflows(small_flow("maf")).sample(3, batch_size=1.5),
        TypeError,
        "batch_size must be a positive integer, got 1.5",
    ),
    "set-part": (
        lambda: setattr(fp.to_nflows(small_flow("maf")), "_embedding_net", nn.Identity()),
        AttributeError,
        "_embedding_net is read from the flow",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_missing_nflows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "flowpath.interop.nflows_flow", raising=False)
    monkeypatch.setitem(sys.modules, "nflows.flows.base", None)
    with pytest.raises(ImportError, match="pip install nflows"):
        fp.to_nflows(small_flow("maf"))


def test_wrapped_base_has_no_gradient_and_follows_the_dtype() -> None:
    theirs, _, c = flow_and_rows("made-mixture")
    flow = fp.from_nflows(theirs)
    assert isinstance(flow.base, NflowsBase) and not flow.has_rsample
    assert flow.base.rsample((0, 7), c).shape == (0, 7, D)
    assert flow.log_prob(normal(0, 7, D), c).shape == (0, 7)
