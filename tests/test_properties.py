"""One property a test, over every transform: those of `flowpath.testing`, and some that need more than one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from registry import (
    ARCHITECTURES,
    CASES,
    ELEMENTS,
    STRUCTURES,
    Case,
    amplify,
    autoregressive,
    cases_that,
    coupling,
    each_property,
    made,
    normal,
    roughen,
)
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import flowpath as fp
from flowpath import testing
from flowpath.transforms import autoregressive_inverse as ar

# --- every transform ---------------------------------------------------------------------------------------------


@each_property
def test_property(name: str, case: Case) -> None:
    testing.properties[name](case.ready(), case.x(), case.c(), case.tolerance)


@cases_that("identity")
def test_identity_as_built(case: Case) -> None:
    testing.is_identity(case.fresh(), case.x(), case.c(), 1e-6)


COMPILED = [n for n in CASES if "/" not in n and n.split("-")[0] not in ARCHITECTURES and "simplex" not in n]
COMPILED += [f"{s}/affine" for s in STRUCTURES] + ["elementwise/spline", "elementwise/circular"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name: str, fresh_compiler: None) -> None:
    """Forward and back in one graph; what the graph does, test_architectures.py checks with a real backend."""
    case = CASES[name]
    t, x, c = case.ready(), case.x(), case.c()

    def there_and_back(x: Tensor) -> tuple[Tensor, ...]:
        z, ladj = t(x, c)
        return *t.inverse(z, c), z, ladj

    with torch.no_grad():
        got = torch.compile(there_and_back, fullgraph=True, backend="eager")(x)
        for g, want in zip(got, there_and_back(x), strict=True):
            assert torch.allclose(g, want, atol=1e-10)


ROUGH = [n for n, c in CASES.items() if any(isinstance(m, fp.Element) for m in c.fresh().modules())]


@pytest.mark.parametrize("factor", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ROUGH)
def test_rough_parameters_stay_finite(name: str, dtype: torch.dtype, factor: float) -> None:
    case = CASES[name]
    t, x, c = amplify(case.ready(), factor).to(dtype), case.x().to(dtype), case.c()
    c = None if c is None else c.to(dtype)
    for direction in ("forward", "inverse"):
        testing.finite(t, direction, x, c)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [10.0, 100.0])
@pytest.mark.parametrize("name", [n for n in ROUGH if "/" in n])
def test_rough_parameters_are_inverted(name: str, factor: float) -> None:
    """Backward error: T(T^-1(z)) is z, however ill-conditioned T^-1 is."""
    case = CASES[name]
    t, z, c = amplify(case.ready(), factor), case.x(), case.c()
    x, _ = t.inverse(z, c)
    back, _ = t(x, c)
    error = (back - z).abs()
    if "circular" in name:
        error = torch.minimum(error, 2 * torch.pi - error)
    assert error.max() < 1e-9


# --- no transform is forgotten -----------------------------------------------------------------------------------


def public_classes(kind: type) -> list[type]:
    found = {getattr(fp, n) for n in fp.__all__} | {getattr(fp.transforms, n) for n in fp.transforms.__all__}
    return sorted((c for c in found if isinstance(c, type) and issubclass(c, kind)), key=lambda c: c.__name__)


def test_registry_has_every_public_transform() -> None:
    built = {type(m) for case in CASES.values() for m in case.build().modules()}
    public = [c for c in public_classes(nn.Module) if issubclass(c, fp.Transform) and c is not fp.Transform]
    elements = [c for c in public_classes(nn.Module) if hasattr(c, "inverse") and not issubclass(c, fp.Transform)]
    assert len(public) > 10 and len(elements) > 3
    missing = [c.__name__ for c in [*public, *elements] if c not in built]
    assert not missing, f"add a line to tests/registry.py for {missing}"


@pytest.mark.parametrize("element", ELEMENTS)
def test_element_with_zero_numbers_is_the_identity(element: str) -> None:
    e, x = ELEMENTS[element](), normal(4, 3).clamp(-2.5, 2.5)
    for y, ladj in (e.forward(x, x.new_zeros(e.num_params, 4, 3)), e.inverse(x, x.new_zeros(e.num_params, 4, 3))):
        assert torch.allclose(y, x) and torch.allclose(ladj, torch.zeros_like(x), atol=1e-12)


@pytest.mark.parametrize("element", ELEMENTS)
def test_element_params_broadcast_against_x(element: str) -> None:
    e, x = ELEMENTS[element](), normal(4, 3).clamp(-2.5, 2.5)
    params = normal(e.num_params, 3, seed=1)
    for run in (e.forward, e.inverse):
        for got, want in zip(run(x, params.unsqueeze(1)), run(x, params.unsqueeze(1).expand(-1, 4, -1)), strict=True):
            assert got.shape == (4, 3)
            assert torch.allclose(got, want)


# --- check_transform, for transforms of your own -----------------------------------------------------------------


class Shift(fp.Transform):
    """A correct transform of somebody else's."""

    context = None

    def __init__(self, features: int = 2) -> None:
        super().__init__(features)
        self.shift = nn.Parameter(torch.ones(features))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + self.shift, x.new_zeros(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - self.shift, z.new_zeros(z.shape[:-1])


class WrongLadj(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2.0 * x, x.new_zeros(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z / 2.0, z.new_zeros(z.shape[:-1])


class WrongInverse(Shift):
    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - 0.9 * self.shift, z.new_zeros(z.shape[:-1])


class LadjPerFeature(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + self.shift, torch.zeros_like(x)


class MixesRows(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = x + self.shift
        return z + 0.1 * z.sum(tuple(range(x.dim() - 1)), keepdim=True), x.new_zeros(x.shape[:-1])


class Detaches(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + self.shift.detach(), x.new_zeros(x.shape[:-1])


class HoldsPlainTensor(Shift):
    def __init__(self, features: int = 2) -> None:
        super().__init__(features)
        self.plain = torch.ones(features, dtype=torch.float64)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x + self.plain, x.new_zeros(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - self.plain, z.new_zeros(z.shape[:-1])


class InPlace(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x.add_(0.5)
        return x + self.shift, x.new_zeros(x.shape[:-1])


class BranchesOnData(Shift):
    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return (x + self.shift if bool((x > -100).all()) else x), x.new_zeros(x.shape[:-1])


def test_check_transform_passes_a_right_one() -> None:
    testing.check_transform(Shift())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (WrongLadj, "ladj_is_slogdet: forward, row 0: off by"),
        (WrongInverse, "round_trip: forward and back, value: off by"),
        (LadjPerFeature, "shapes: forward of batch ()"),
        (MixesRows, "batch_is_loop: forward, value: off by"),
        (Detaches, "derivatives"),
        (HoldsPlainTensor, "dtype_follows_module: forward of a torch.float32 module"),
        (InPlace, "the input was changed in place"),
        (BranchesOnData, "vmap_is_loop: RuntimeError"),
    ],
)
def test_check_transform_names_what_is_wrong(wrong: type[Shift], named: str) -> None:
    with pytest.raises(testing.PropertyError) as error:
        testing.check_transform(wrong())
    assert wrong.__name__ in str(error.value) and named in str(error.value)


def test_check_transform_leaves_the_module_and_the_generator_alone(keeps_rng: Callable) -> None:
    t = fp.ActNorm(2).train()
    with keeps_rng():
        testing.check_transform(t)
    assert t.training and t.loc.dtype == torch.float32 and not t.is_set and t.loc.grad is None


def test_check_transform_skips_by_name_and_refuses_unknown_names() -> None:
    testing.check_transform(WrongInverse(), skip=["round_trip", "pulls_score", "ladj_is_slogdet"])
    with pytest.raises(ValueError, match="knows no properties \\['speed'\\]"):
        testing.check_transform(Shift(), skip=["speed"])


def test_check_transform_can_ask_for_the_identity() -> None:
    testing.check_transform(fp.LU(2), identity=True, tolerance=1e-6)
    with pytest.raises(testing.PropertyError, match="is_identity: forward, value: off by 0.5"):
        testing.check_transform(Shift(), identity=True, x=torch.ones(3, 2))


# --- ensembles: torch.func over stacked parameters ---------------------------------------------------------------


class Inverted(nn.Module):
    def __init__(self, t: fp.Transform) -> None:
        super().__init__()
        self.t = t

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.t.inverse(z)


ENSEMBLES: dict[str, Callable[[int], nn.Module]] = {
    "coupling": lambda seed: roughen(coupling([False, True, True], fp.RationalQuadratic(3)).double(), seed=seed),
    "coupling-inverse": lambda seed: roughen(Inverted(coupling([False, True, True], fp.Affine())).double(), seed=seed),
    "maf": lambda seed: roughen(autoregressive(fp.Affine(), [1, 2, 0]).double(), seed=seed),
    "maf-inverse": lambda seed: roughen(Inverted(autoregressive(fp.Affine(), [1, 2, 0])).double(), seed=seed),
    "maf-spline-inverse": lambda seed: roughen(Inverted(autoregressive(fp.RationalQuadratic(3))).double(), seed=seed),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensemble_by_vmap_over_parameters(name: str) -> None:
    models, x = [ENSEMBLES[name](seed) for seed in range(3)], normal(4, 3)
    params, buffers = stack_module_state(models)

    def run(p: dict, b: dict, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(models[0], (p, b), (x,))

    got = torch.func.vmap(run, (0, 0, None))(params, buffers, x)
    for g, want in zip(got, zip(*(m(x) for m in models), strict=True), strict=True):
        assert torch.allclose(g, torch.stack(want), atol=1e-10)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_gradient_by_torch_func(name: str) -> None:
    model, x = ENSEMBLES[name](0), normal(4, 3)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p: dict) -> Tensor:
        value, ladj = functional_call(model, p, (x,))
        return (value.sin().sum(-1) + ladj).mean()

    value, ladj = model(x)
    want = torch.autograd.grad((value.sin().sum(-1) + ladj).mean(), list(model.parameters()), materialize_grads=True)
    for g, w in zip(torch.func.grad(loss)(params).values(), want, strict=True):
        assert torch.allclose(g, w, atol=1e-10)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_gradient_of_an_ensemble(name: str) -> None:
    models, x = [ENSEMBLES[name](seed) for seed in range(2)], normal(4, 3)
    params, buffers = stack_module_state(models)

    def loss(p: dict, b: dict) -> Tensor:
        value, ladj = functional_call(models[0], (p, b), (x,))
        return (value.sin().sum(-1) + ladj).mean()

    got = torch.func.vmap(torch.func.grad(loss))({k: p.detach() for k, p in params.items()}, buffers)
    for i, model in enumerate(models):
        value, ladj = model(x)
        want = torch.autograd.grad(
            (value.sin().sum(-1) + ladj).mean(), list(model.parameters()), materialize_grads=True
        )
        for g, w in zip(got.values(), want, strict=True):
            assert torch.allclose(g[i], w, atol=1e-10)


# --- the inverse of a masked autoregressive transform ------------------------------------------------------------


class Plain(nn.Module):
    """Hides that a net is a MaskedMLP: the inverse then takes a full pass a feature, by autograd's own rules."""

    def __init__(self, net: fp.MaskedMLP) -> None:
        super().__init__()
        self.net, self.num_params = net, net.num_params

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x, context)


# features, rows, context, order: 16 features of at most 8 rows take the Jacobi sweeps
SIZES = {
    "steps": (7, 5, 0, None),
    "steps-context": (7, 5, 2, [2, 0, 3, 6, 1, 4, 5]),
    "passes": (4, 5, 2, [2, 0, 3, 1]),
    "sweeps": (16, 4, 0, None),
    "sweeps-context": (16, 8, 2, list(range(15, -1, -1))),
    "one-feature": (1, 5, 2, None),
    "one-row": (4, 1, 0, None),
}
DRIVEN = {"affine": fp.Affine, "spline": lambda: fp.RationalQuadratic(3, bound=3.0)}
each_size = pytest.mark.parametrize("size", SIZES)
each_driven = pytest.mark.parametrize("element", DRIVEN)


def pair(size: str, element: str) -> tuple[fp.MaskedAutoregressive, fp.MaskedAutoregressive, Tensor, Tensor | None]:
    """A transform, the same one inverted by plain passes, noise and context."""
    features, rows, context, order = SIZES[size]
    e, net = DRIVEN[element](), made(features, DRIVEN[element](), context, hidden=(20, 24))
    fast = fp.MaskedAutoregressive(features, e, net, order=order, context=context)
    roughen(fast.double(), 0.3)
    plain = fp.MaskedAutoregressive(features, e, Plain(net), order=order, context=context).double()
    return fast, plain, normal(rows, features), normal(rows, context, seed=2) if context else None


def gradients(t: nn.Module, z: Tensor, c: Tensor | None, **options: bool) -> list[Tensor]:
    """Gradients of a scalar of (x, ladj) in z, context and parameters."""
    z, c = z.clone().requires_grad_(), None if c is None else c.clone().requires_grad_()
    x, ladj = t.inverse(z, c)
    wanted = [z, *([] if c is None else [c]), *t.parameters()]
    return list(torch.autograd.grad(x.sin().sum() + (ladj * ladj).sum(), wanted, materialize_grads=True, **options))


@each_size
@each_driven
def test_incremental_inverse_equals_passes_and_sweeps(size: str, element: str) -> None:
    t, _, z, c = pair(size, element)
    want = ar.invert_by_passes(t, z, c)
    for how in (
        ar.invert_by_sweeps(t, z, c),
        ar.invert_by_steps(t, z, c, keep_graph=False),
        ar.invert_by_steps(t, z, c, keep_graph=True),
    ):
        for got, w in zip(how, want, strict=True):
            assert torch.allclose(got, w, atol=1e-11)


@each_size
@each_driven
def test_implicit_gradient_equals_the_plain_one(size: str, element: str) -> None:
    t, plain, z, c = pair(size, element)
    for got, want in zip(gradients(t, z, c), gradients(plain, z, c), strict=True):
        assert torch.allclose(got, want, atol=1e-10)


@each_size
@each_driven
def test_second_derivatives_equal_the_plain_ones(size: str, element: str) -> None:
    t, plain, z, c = pair(size, element)

    def second(t: nn.Module) -> list[Tensor]:
        squares = sum(g.square().sum() for g in gradients(t, z, c, create_graph=True))
        return list(torch.autograd.grad(squares, list(t.parameters()), materialize_grads=True))

    for got, want in zip(second(t), second(plain), strict=True):
        assert torch.allclose(got, want, atol=1e-8)


@pytest.mark.parametrize(("size", "most"), [("steps", 0), ("sweeps", 16)])
def test_inverse_never_takes_a_pass_per_feature(size: str, most: int) -> None:
    t, _, z, c = pair(size, "affine")
    calls: list[int] = []
    t.conditioner.register_forward_hook(lambda *_: calls.append(1))
    t.inverse(z, c)
    assert len(calls) <= most


@each_driven
def test_frozen_parameters_stay_frozen(element: str) -> None:
    t, plain, z, _ = pair("steps", element)
    for p in t.conditioner.hidden.parameters():
        p.requires_grad_(False)
    flags = [p.requires_grad for p in t.parameters()]
    z.requires_grad_()
    t.inverse(z)[0].sum().backward()
    assert [p.requires_grad for p in t.parameters()] == flags
    assert [p.grad is not None for p in t.parameters()] == flags
    got = [z.grad, *(p.grad for p in t.parameters() if p.requires_grad)]
    want = torch.autograd.grad(plain.inverse(z)[0].sum(), [z, *(p for p in t.parameters() if p.requires_grad)])
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-11)


def test_all_frozen_inverse_of_constant_noise_has_no_graph() -> None:
    t, _, z, _ = pair("steps", "affine")
    t.requires_grad_(False)
    assert not t.inverse(z)[0].requires_grad
    assert t.inverse(z.requires_grad_())[0].requires_grad


def test_no_grad_inverse_has_no_graph() -> None:
    t, _, z, _ = pair("steps", "spline")
    with torch.no_grad():
        x, ladj = t.inverse(z)
    assert not x.requires_grad and not ladj.requires_grad
    assert torch.equal(x, t.inverse(z)[0])


@pytest.mark.parametrize("size", ["steps", "passes"])
def test_a_hook_on_a_parameter_is_called_once(size: str) -> None:
    t, _, z, c = pair(size, "affine")
    weight, found = t.conditioner.final.weight, []
    for factor in (1.0, 2.0):
        with weight.register_hook(lambda g, factor=factor: factor * g):
            (gradient,) = torch.autograd.grad(t.inverse(z, c)[0].sin().sum(), weight)
        found.append(gradient)
    assert torch.allclose(found[1], 2 * found[0])


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    t, _, z, _ = pair("steps", "spline")
    z.requires_grad_()
    loss = t.inverse(z)[0].sin().sum()
    first = torch.autograd.grad(loss, [z, *t.parameters()], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [z, *t.parameters()]), strict=True):
        assert torch.equal(a, b)


@each_driven
def test_one_layer_used_twice_in_a_graph(element: str) -> None:
    t, plain, z, _ = pair("steps", element)

    def twice(t: nn.Module) -> tuple[Tensor, ...]:
        x, ladj = t.inverse(z)
        x, more = t.inverse(x)
        return torch.autograd.grad(x.sin().sum() + (ladj + more).sum() + t(z)[1].sum(), list(t.parameters()))

    for got, want in zip(twice(t), twice(plain), strict=True):
        assert torch.allclose(got, want, atol=1e-10)


def test_gradient_after_an_update_in_place_is_refused() -> None:
    t, _, z, _ = pair("steps", "affine")
    loss = t.inverse(z)[0].sum()
    with torch.no_grad():
        t.conditioner.final.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("size", ["steps", "sweeps"])
def test_dropout_in_training_mode_is_drawn_once(size: str) -> None:
    features, rows, _, _ = SIZES[size]
    net = fp.MaskedMLP(features, num_params=2, hidden_features=(32,), dropout=0.5)
    t = roughen(fp.MaskedAutoregressive(features, fp.Affine(), net).double(), 0.3)
    z = normal(rows, features).requires_grad_()

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return t.inverse(z)

    assert not torch.equal(run(z)[0], t.inverse(z)[0])
    assert torch.autograd.gradcheck(run, z, fast_mode=True)
    jacobian = torch.autograd.functional.jacobian(lambda v: run(v)[0], z)[0][:, 0]
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, run(z)[1][0], atol=1e-10)
    with torch.no_grad():
        assert t.inverse(z)[0].isfinite().all()


class Tilted(fp.Affine):
    """An Element with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, params + self.tilt)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(y, params + self.tilt)


def test_an_element_with_parameters_gets_its_gradient() -> None:
    t = roughen(autoregressive(Tilted()).double())
    plain = fp.MaskedAutoregressive(3, t.element, Plain(t.conditioner)).double()
    z = normal(5, 3)
    for got, want in zip(gradients(t, z, None), gradients(plain, z, None), strict=True):
        assert torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("size", ["steps", "sweeps", "steps-context"])
def test_jacobian_of_the_inverse_by_torch_func(size: str) -> None:
    t, plain, z, c = pair(size, "affine")
    row = None if c is None else c[0]
    got = torch.func.jacrev(lambda v: t.inverse(v, row)[0])(z[0])
    assert torch.allclose(got, torch.autograd.functional.jacobian(lambda v: plain.inverse(v, row)[0], z[0]), atol=1e-10)


def test_vmap_over_contexts_and_noise_of_the_inverse() -> None:
    t, _, z, c = pair("steps-context", "spline")
    want = torch.stack([t.inverse(z, row)[0] for row in c])
    assert torch.allclose(torch.func.vmap(lambda row: t.inverse(z, row)[0])(c), want, atol=1e-11)
    want = torch.stack([t.inverse(row, c[0])[0] for row in z])
    assert torch.allclose(torch.func.vmap(lambda row: t.inverse(row, c[0])[0])(z), want, atol=1e-11)


def test_sweeps_stop_whatever_comes() -> None:
    t, _, z, _ = pair("sweeps", "affine")
    z = torch.cat([z[:3], torch.full_like(z[:1], torch.nan)])
    x, ladj = t.inverse(z)
    assert x[:3].isfinite().all() and ladj[:3].isfinite().all() and x[3].isnan().all()


def test_copy_of_a_used_transform() -> None:
    t, _, z, _ = pair("steps", "spline")
    t.inverse(z)[0].sum().backward()
    assert torch.equal(copy.deepcopy(t).inverse(z)[0], t.inverse(z)[0])
